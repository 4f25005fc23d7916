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
    """Turn one checkpoint into another; `--upcycle 8e` makes the sparse twin that computes the same function.

    Overrides change the preset: `moe convert runs/dense runs/sparse --upcycle 8e model.moe.top_k=4`.
    """
    if upcycle is None:
        raise ValueError("moe convert needs to know what to do: --upcycle PRESET gives a dense model experts")
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
    out: Annotated[Path | None, typer.Option(help="a file for the table: .csv, or JSON")] = None,
) -> None:
    """Compile every Triton kernel for GPUs that need not be here, and print what each costs on them.

    Ends with an error if one does not compile or spills registers.
    """
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


def main() -> None:
    """Entry point of the console script: user mistakes end in one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
