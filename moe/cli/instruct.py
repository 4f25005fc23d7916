"""`moe instruct`: build the instruction benchmark, from public files to frozen splits, and evaluate models on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

instruct = typer.Typer(
    help="The instruction benchmark: build it, check it, look into it, evaluate on it.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(help="Folder written by `moe instruct build`.")]


@instruct.command()
def build(
    definition: Annotated[str, typer.Argument(help="A name in configs/instruct, such as public, or a .yaml file.")],
    data: Annotated[Path, typer.Argument(help="Folder of the downloads that the definition names.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    categories: Annotated[Path | None, typer.Option(help="Another table of categories.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed. Default: the definition's.", min=0)] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail on an example that yields no record, instead of skipping it.")
    ] = False,
) -> None:
    """Read every collection, split it, apply the caps, filter overlaps, and freeze the result with a catalogue."""
    from dataclasses import replace

    from moe.instruct.build import build as run
    from moe.instruct.categories import Categories
    from moe.instruct.definition import find_definition, load_definition

    chosen = load_definition(find_definition(definition))
    chosen = chosen if seed is None else replace(chosen, seed=seed)
    table = None if categories is None else Categories.load(categories)
    benchmark = run(chosen, data, out, categories=table, strict=strict)
    for split, facts in benchmark.manifest["splits"].items():
        line = f"{split}: {facts['tasks']} tasks in {facts['categories']} categories, {facts['records']} records"
        typer.echo(line)
    typer.echo(benchmark.folder / "catalogue.html")


@instruct.command()
def check(
    folder: Folder,
    data: Annotated[Path | None, typer.Option(help="Also compare the downloads with those it was built from.")] = None,
) -> None:
    """Compare every file of a benchmark with its manifest; an error names the first that differs."""
    from moe.instruct.benchmark import Benchmark, changed_inputs

    benchmark = Benchmark(folder)
    changed = [] if data is None else changed_inputs(benchmark, data)
    if changed:
        raise ValueError(f"{len(changed)} inputs are not those that {folder} was built from: {', '.join(changed[:10])}")
    typer.echo(f"{folder} is what was built")


@instruct.command()
def show(
    folder: Folder,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    task: Annotated[str | None, typer.Option(help="Print records of this task instead of the list of tasks.")] = None,
    count: Annotated[int, typer.Option(help="Records to print.", min=1)] = 3,
) -> None:
    """List the tasks of a split, or print records of one."""
    from itertools import islice

    from moe.instruct.benchmark import Benchmark
    from moe.instruct.records import to_json

    benchmark = Benchmark(folder, verify=False)
    if task is None:
        for entry in benchmark.tasks(split):
            typer.echo(f"{entry.task}\t{entry.category}\t{entry.level_name or '-'}\t{entry.records}")
        return
    for record in islice(benchmark.records(split, task), count):
        typer.echo(to_json(record))


@instruct.command("eval")
def evaluate(
    path: Annotated[Path, typer.Argument(help="Run folder or checkpoint.")],
    data: Annotated[Path, typer.Argument(help="Folder of a benchmark, or the files of BIG-Bench Hard or MMLU.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to create. Default: evaluations/<name of PATH>-<protocol>.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="opt_iml, promptsource, flan, super_natural_instructions, unified_skg, bbh or mmlu.")
    ] = "opt_iml",
    split: Annotated[str, typer.Option(help="validation or test.")] = "test",
    tasks: Annotated[str, typer.Option(help="Comma-separated names, which may contain * and ?. Default: all.")] = "",
    shots: Annotated[str | None, typer.Option(help="Demonstrations, such as 0,5. Default: the protocol's.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many examples per task.", min=1)] = None,
    normalisation: Annotated[
        str | None, typer.Option(help="sum, token_mean, byte_mean or unconditional. Default: the protocol's.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Text between demonstrations; \\n is a line break. Default: the protocol's.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest written answer, in tokens.", min=1)] = None,
    rouge: Annotated[
        str, typer.Option(help="ROUGE over words, or over the tokenizer's tokens (for other scripts).")
    ] = "words",
    same_task: Annotated[
        Path | None, typer.Option(help="YAML file that maps a task's name to patterns of its sub-tasks.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Token positions per forward pass.", min=1)] = 8192,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    seed: Annotated[int, typer.Option(help="Seed of wordings, demonstrations and intervals.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
) -> None:
    """Evaluate a model by a published protocol and write results.json, table.md and samples.jsonl.

    Under torchrun the processes share the work.
    """
    from dataclasses import replace

    from moe.instruct.evaluation import EvaluationSettings, find_protocol
    from moe.instruct.evaluation.command import run

    changes: dict[str, Any] = {
        "num_shots": None if shots is None else tuple(_numbers(shots)),
        "limit": limit,
        "normalisation": normalisation,
        "separator": None if separator is None else separator.replace("\\n", "\n"),
        "max_new_tokens": max_new_tokens,
    }
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"--precision ({precision}) must be one of: fp32, bf16, fp16")
    rules = replace(find_protocol(protocol), **{name: value for name, value in changes.items() if value is not None})
    settings = EvaluationSettings(rules, seed, rouge, batch_tokens, precision)
    folder = Path("evaluations") / f"{path.resolve().name}-{protocol}" if out is None else out
    patterns = [name for name in tasks.split(",") if name]
    table = run(path, data, folder, settings, split=split, patterns=patterns, same_task=same_task, device=device)
    if table:
        typer.echo(table)


def _numbers(text: str) -> list[int]:
    """Parse comma-separated numbers. Raises ValueError for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--shots ({text}) must be numbers with commas between, as 0,5")
    return [int(part) for part in parts]


@instruct.command()
def report(
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    evaluations: Annotated[list[str], typer.Argument(help="[MODEL[:STAGE]=]FOLDER; repeat a model for another seed.")],
) -> None:
    """Compare evaluations of the same records: report.md with tables and plots.

    `moe instruct report R dense:before=E1 dense:after=E2 moe:before=E3 moe:after=E4` shows what tuning gained for
    each model, and whether it helps the second one more than the first.
    """
    from moe.instruct.evaluation import compare, parse_source, write_report
    from moe.instruct.evaluation.report import findings

    sources = [parse_source(text) for text in evaluations]
    comparison = compare(sources)
    path = write_report(comparison, sources, out)
    typer.echo("\n".join([*findings(comparison), str(path)]))
