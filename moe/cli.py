"""The `moe` command. One thin function per subcommand; each imports what it runs, so that none pays for another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="moe", help="Mixture-of-Experts language models.", no_args_is_help=True, pretty_exceptions_enable=False
)

Overrides = Annotated[list[str] | None, typer.Argument(help="Hydra overrides, as +moe=512e train.num_steps=800")]


@app.command(context_settings={"ignore_unknown_options": True})
def train(
    overrides: Overrides = None,
    multirun: Annotated[bool, typer.Option("--multirun", "-m", help="one run per comma-separated value")] = False,
) -> None:
    """Train a model: the same as `python train.py`."""
    from moe.compose import compose, expand_multirun

    arguments = [*(["-m"] if multirun else []), *(overrides or [])]
    configs = [compose(each) for each in expand_multirun(arguments)]
    from moe.run import train as run  # after the configuration: a mistyped key should not wait for torch

    for config in configs:
        run(config)


@app.command()
def prepare(overrides: Overrides = None) -> None:
    """Read the corpus, train the tokenizer and write the token shards that training would need."""
    from moe.compose import compose
    from moe.data.prepare import prepare as run

    corpus = run(compose(overrides or []).data)
    typer.echo(corpus.path)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="a run folder or a checkpoint")],
    destination: Annotated[Path, typer.Argument(help="a new folder")],
    upcycle: Annotated[str | None, typer.Option(help="a preset of configs/moe: give a dense model experts")] = None,
    granularity: Annotated[int, typer.Option(help="slices each dense network is cut into", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="of the routers", min=0)] = 0,
    overrides: Overrides = None,
) -> None:
    """Put the weights of a checkpoint, of however many ranks, into one model.safetensors.

    `--upcycle 8e` makes a dense model's sparse twin instead, which computes the same function. Overrides change the
    preset: `moe convert runs/dense runs/sparse --upcycle 8e model.moe.top_k=4`.
    """
    if upcycle is None:
        if overrides or granularity != 1 or seed != 0:
            raise ValueError("overrides, --granularity and --seed are read with --upcycle PRESET alone: leave them out")
        from moe.checkpoint import consolidate

        typer.echo(consolidate(source, destination))
        return
    from moe.compose import compose
    from moe.upcycling import upcycle_checkpoint

    moe = compose([f"+moe={upcycle}", *(overrides or [])]).model.moe
    assert moe is not None
    typer.echo(upcycle_checkpoint(source, destination, moe, granularity=granularity, seed=seed))


@app.command()
def generate(
    path: Annotated[Path, typer.Argument(help="a run folder or a checkpoint")],
    prompt: Annotated[list[str] | None, typer.Option(help="a prompt; may be given several times")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="a text file with one prompt a line")] = None,
    tokens: Annotated[int, typer.Option(help="new tokens per prompt", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0.0)] = 0.8,
    top_p: Annotated[float, typer.Option(help="nucleus probability", min=0.0, max=1.0)] = 0.95,
    seed: Annotated[int, typer.Option(help="of the draws", min=0)] = 0,
) -> None:
    """Continue prompts with a trained model; a single prompt is streamed as it is written."""
    from moe.checkpoint import load_model, load_tokenizer
    from moe.generation import continue_texts, stream_text

    prompts = list(prompt or [])
    if prompts_file is not None:
        prompts += [line.rstrip("\n") for line in prompts_file.open(encoding="utf-8")]
    prompts = prompts or [""]
    model, tokenizer = load_model(path), load_tokenizer(path)
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    if len(prompts) == 1:
        typer.echo(prompts[0], nl=False)
        for piece in stream_text(model, tokenizer, prompts[0], tokens, **settings):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()
        return
    for text, continuation in zip(prompts, continue_texts(model, tokenizer, prompts, tokens, **settings), strict=True):
        typer.echo(f"{text}{continuation}\n{'-' * 20}")


@app.command()
def kernels(
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; all when not given")] = None,
    one_each: Annotated[bool, typer.Option(help="one configuration of each kernel instead of all")] = False,
    out: Annotated[Path | None, typer.Option(help="a file for the table: .csv, or JSON; a roofline's is .md")] = None,
    roofline: Annotated[bool, typer.Option(help="what bounds each kernel, from data sheets; compiles nothing")] = False,
    tune: Annotated[bool, typer.Option(help="measure the grouped products' tiles on this GPU")] = False,
) -> None:
    """Compile every Triton kernel for GPUs that need not be here, and print what each costs on them.

    Ends with an error if one does not compile or spills registers.
    """
    if tune:
        from moe.kernel_table import print_winners

        print_winners()
        return
    if roofline:
        from moe.kernels.roofline import DEVICES, page, write_page

        if one_each:
            raise ValueError("--roofline compiles nothing, so --one-each has no meaning beside it: leave one out")
        text = page(tuple(target or DEVICES))
        typer.echo(text)
        if out is not None:
            write_page(text, out)
        return
    from moe.kernels.aot import TARGETS, compile_all

    as_csv = out is not None and out.suffix == ".csv"
    rows = compile_all(targets=tuple(target or TARGETS), one_each=one_each, out=None if as_csv else out)
    from moe.kernel_table import print_table, write_csv

    print_table(rows)
    if as_csv and out is not None:
        write_csv(rows, out)
    broken = [row for row in rows if row.error is not None or row.spill_instructions > 0]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(rows)} kernels do not compile or spill: "
            + ", ".join(f"{row.kernel} ({row.configuration}, {row.target})" for row in broken)
        )


@app.command()
def launch(
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="an sbatch script")] = False,
    nodes: Annotated[int, typer.Option(help="machines")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="of each; a process runs on every GPU")] = 8,
    cpus_per_task: Annotated[int | None, typer.Option(help="cores of a node; six for each GPU")] = None,
    time: Annotated[str, typer.Option(help="limit: minutes, hours:minutes:seconds or days-hours")] = "24:00:00",
    mem: Annotated[str, typer.Option(help="of a node, as 900G; 0 is all of it")] = "0",
    job_name: Annotated[str, typer.Option(help="in the queue")] = "moe",
    partition: Annotated[str | None, typer.Option(help="the site's default when not given")] = None,
    account: Annotated[str | None, typer.Option(help="your default when not given")] = None,
    max_restarts: Annotated[int, typer.Option(help="of all processes after one failed")] = 3,
    notice: Annotated[int, typer.Option(help="seconds before the limit at which the run saves and stops")] = 300,
    requeue: Annotated[bool, typer.Option("--requeue", help="queue it again until the run is complete")] = False,
    out: Annotated[Path | None, typer.Option(help="a file for the script, instead of printing it")] = None,
) -> None:
    """Print the job script that trains on a cluster; a run that its processes cannot share is refused here."""
    if not slurm:
        raise ValueError(
            "moe launch writes scripts for SLURM: add --slurm. On machines without it start the processes yourself, "
            "`torchrun --nproc-per-node=N train.py ...` (docs/distributed.md)"
        )
    from moe.launch import SlurmJob, slurm_script

    job = SlurmJob(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time=time,
        mem=mem,
        job_name=job_name,
        partition=partition,
        account=account,
        max_restarts=max_restarts,
        notice=notice,
        requeue=requeue,
    )
    script = slurm_script(overrides or [], job)
    if out is None:
        typer.echo(script, nl=False)
    else:
        out.write_text(script, encoding="utf-8")
        typer.echo(f"wrote {out}: submit it with sbatch {out}", err=True)


def main() -> None:
    """Entry point of the console script: user mistakes end in one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
