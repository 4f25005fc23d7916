"""`moe eval`: evaluate a trained model on benchmarks, by lm-eval's task definitions or a paper's own protocol."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

Results = dict[str, Any]
_TIMEOUT_SECONDS = 3600.0  # ranks wait for each other between tasks, whose parts may differ in length


def evaluate(
    path: Annotated[Path | None, typer.Argument(help="Run folder or checkpoint.")] = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated names; lm-eval's may contain * and ?.")] = "",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of data sets. lm-eval default: download.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to create. Default: evaluations/<name of PATH>.")] = None,
    protocol: Annotated[str, typer.Option(help="lm-eval, artetxe2021 or xglm.")] = "lm-eval",
    num_fewshot: Annotated[int | None, typer.Option(help="Demonstrations. Default: each task's own number.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many items of each task.", min=1)] = None,
    languages: Annotated[str | None, typer.Option(help="Papers: languages, comma-separated.")] = None,
    template_language: Annotated[
        str | None, typer.Option(help="Papers: language of the prompts, or same. Default: en.")
    ] = None,
    demo_language: Annotated[str | None, typer.Option(help="Papers: language of the demonstrations.")] = None,
    template_set: Annotated[str | None, typer.Option(help="Papers: prompts, corrected or machine.")] = None,
    split: Annotated[str | None, typer.Option(help="Papers: split to evaluate. Default: the authors'.")] = None,
    demo_split: Annotated[str | None, typer.Option(help="Papers: split of the demonstrations.")] = None,
    subsets: Annotated[str | None, typer.Option(help="Papers: subsets, comma-separated, as BLiMP has.")] = None,
    runs: Annotated[int | None, typer.Option(help="Papers: draws of demonstrations.", min=1)] = None,
    beginning: Annotated[str | None, typer.Option(help="lm-eval: what precedes a context, auto or none.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Maximum of token positions per forward pass.", min=1)] = 8192,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    seed: Annotated[int | None, typer.Option(help="lm-eval: seed of all draws. Default: 1234.", min=0)] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    samples: Annotated[bool, typer.Option("--samples", help="lm-eval: write every item to samples.jsonl.")] = False,
    list_data: Annotated[
        bool, typer.Option("--list-data", help="List the data sets that can be read from files.")
    ] = False,
) -> None:
    """Evaluate a model and write results.json, table.md and plot.png.

    `moe eval runs/x --tasks copa,arc_easy,xcopa_et --data-dir data`; under torchrun the processes share the work.
    "Papers:" options belong to --protocol artetxe2021 and xglm, "lm-eval:" ones to --protocol lm-eval.
    """
    from moe.evaluation.results import require_writable

    if list_data:
        from moe.evaluation.datasets import listed_ids

        typer.echo("\n".join(listed_ids()))
        return
    names = _listed(tasks)
    if path is None or not names:
        raise ValueError("moe eval needs a run folder or checkpoint and --tasks: `moe eval runs/x --tasks copa,piqa`")
    folder = Path("evaluations") / path.resolve().name if out is None else out
    require_writable(folder)
    of_papers: Results = {"languages": languages, "demo_language": demo_language, "demo_split": demo_split}
    of_papers |= {"template_language": template_language, "template_set": template_set}
    of_papers |= {"split": split, "subsets": subsets, "runs": runs}
    of_lm_eval = {"beginning": beginning, "seed": seed, "samples": samples or None}
    _check(protocol, precision, data_dir, of_papers, of_lm_eval)
    common = {"batch_tokens": batch_tokens, "precision": precision}
    if protocol == "lm-eval":
        settings = {"num_fewshot": num_fewshot, "limit": limit, **common}
        settings |= {name: value for name, value in (("seed", seed), ("beginning", beginning)) if value is not None}
        _evaluate(path, folder, device, samples, lambda *of: _lm_eval(of, names, data_dir, settings))
        return
    assert data_dir is not None
    setting: Results = {**of_papers, "protocol": protocol, "num_shots": num_fewshot or 0, "limit": limit}
    asked = _settings(setting, names)
    _evaluate(path, folder, device, samples, lambda *of: (_paper(of, asked, data_dir, common), {}))


def _settings(setting: Results, tasks: list[str]) -> list[Results]:
    """The protocol settings of each task in each language, from the command line."""
    languages, runs, subsets = (setting[name] for name in ("languages", "runs", "subsets"))
    common = {name: value for name, value in setting.items() if name not in ("languages", "runs")}
    common |= {"num_runs": runs, "subsets": tuple(_listed(subsets or "")) or None}
    codes: list[str | None] = [*_listed(languages or "")] or [None]
    return [{**common, "task": task, "language": code} for task in tasks for code in codes]


def _listed(text: str) -> list[str]:
    """The names in a comma-separated list; spaces around them do not count."""
    return [name for name in map(str.strip, text.split(",")) if name]


def _evaluate(path: Path, folder: Path, device: str, samples: bool, score: Callable[..., tuple[Results, Any]]) -> None:
    """Call score(model, tokenizer, end_ids, world) on every rank; rank 0 writes the results."""
    from moe.checkpoint import find_checkpoint, load_model, load_tokenizer
    from moe.distributed.world import end_process, open_world
    from moe.evaluation.results import plot, table, write_results
    from moe.generation import find_end_ids

    world = open_world(device, timeout_seconds=_TIMEOUT_SECONDS)
    checkpoint = find_checkpoint(path)
    model, tokenizer = load_model(checkpoint, device=world.device), load_tokenizer(checkpoint)
    results, found = score(model, tokenizer, find_end_ids(checkpoint, tokenizer), world)
    if world.rank == 0:
        origin = {"model": str(checkpoint), "tokenizer_sha256": tokenizer.hash, "num_processes": world.size}
        write_results(folder / "results.json", {**origin, **results})
        (folder / "table.md").write_text(table(results) + "\n", encoding="utf-8")
        plot(results, folder / "plot.png")
        if samples:
            _write_samples(folder / "samples.jsonl", found)
        _report(results)
        typer.echo(f"{table(results)}\n\n{folder / 'results.json'}")
    world.close()
    if world.size > 1:
        end_process()


def _lm_eval(of: tuple[Any, ...], names: list[str], data_dir: Path | None, settings: Results) -> tuple[Results, Any]:
    from moe.evaluation.lm_eval_run import EvaluationSettings, run_lm_eval

    model, tokenizer, end_ids, world = of
    asked = EvaluationSettings(tuple(names), data_dir, **settings)
    return run_lm_eval(model, tokenizer, asked, end_ids=end_ids, world=world)


def _paper(of: tuple[Any, ...], asked: list[Results], data_dir: Path, scoring: Results) -> Results:
    from moe.evaluation.protocol_run import run_protocol
    from moe.evaluation.protocols import Setting

    model, tokenizer, end_ids, world = of
    settings = [Setting(**each) for each in asked]
    return run_protocol(model, tokenizer, settings, data_dir, **scoring, end_ids=end_ids, world=world)


def _check(
    protocol: str, precision: str, data_dir: Path | None, of_papers: dict[str, Any], of_lm_eval: dict[str, Any]
) -> None:
    if protocol not in ("lm-eval", "artetxe2021", "xglm"):
        raise ValueError(f"--protocol ({protocol}) must be one of: lm-eval, artetxe2021, xglm")
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"--precision ({precision}) must be one of: fp32, bf16, fp16")
    unread, reader = (of_papers, "artetxe2021 or xglm") if protocol == "lm-eval" else (of_lm_eval, "lm-eval")
    given = [f"--{name.replace('_', '-')}" for name, value in unread.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} applies only with --protocol {reader}: leave it out")
    if protocol == "lm-eval":
        if find_spec("lm_eval") is None:
            raise ValueError("lm-eval is not installed: pip install 'moe-lm[eval]', or choose --protocol artetxe2021")
    elif data_dir is None:
        raise ValueError(f"--protocol {protocol} reads its data from files: set --data-dir to their folder")


def _report(results: Results) -> None:
    """Report data from mirrors, and demonstrations and contexts that did not fit."""
    for name, file in results["data"].items():
        if file["note"] is not None:
            typer.echo(f"{name}: {file['note']}", err=True)
    for name, task in results["tasks"].items():
        asked, shown, num_cut = task["num_fewshot"], task.get("mean_shots"), task.get("num_cut", 0)
        parts = [] if shown is None or shown >= asked else [f"{shown:.1f} of {asked} demonstrations found room"]
        parts += [f"{num_cut} questions lost their beginning"] if num_cut else []
        if parts:
            limit = f"model.max_seq_len is {results['max_seq_len']}"
            typer.echo(f"{name}: {'; '.join(parts)} ({limit})", err=True)
    for kind, count in results.get("requests", {}).items():
        if count["truncated"]:
            typer.echo(
                f"{kind}: {count['truncated']} of {count['requests']} requests lost the beginning of their context to "
                f"fit model.max_seq_len ({results['max_seq_len']})",
                err=True,
            )


def _write_samples(path: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for task, rows in samples.items():
            for row in rows:
                file.write(json.dumps({"task": task, **row}, ensure_ascii=False, default=str) + "\n")
