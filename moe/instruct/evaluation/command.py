"""From paths to a folder of results: `moe instruct eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.checkpoint import find_checkpoint, load_config, load_model, load_tokenizer
from moe.distributed.world import open_world
from moe.evaluation.results import require_writable, write_results
from moe.generation import find_end_ids
from moe.instruct.benchmark import Benchmark, file_sha256
from moe.instruct.evaluation.aggregation import SameTask
from moe.instruct.evaluation.report import results_table
from moe.instruct.evaluation.runner import EvaluationSettings, evaluate_tasks
from moe.instruct.evaluation.tasks import EvaluationTask, benchmark_tasks, read_bbh, read_mmlu

_TIMEOUT_SECONDS = 3600.0  # ranks wait for each other between tasks, whose parts may take different times


def run(
    path: Path,
    data: Path,
    folder: Path,
    settings: EvaluationSettings,
    *,
    split: str,
    patterns: Sequence[str] = (),
    same_task: Path | None = None,
    device: str = "auto",
) -> str:
    """Evaluate the model at `path` on `data`; rank 0 writes `folder` and returns the table, other ranks "".

    Raises ValueError before the model is loaded for a folder that holds results and for unreadable data, and before it
    runs for prompts that cannot be made.
    """
    require_writable(folder)
    names = SameTask() if same_task is None else SameTask.load(same_task)
    tasks, benchmark = read_tasks(data, settings.protocol.name, split, patterns, settings.protocol.limit)
    checkpoint = find_checkpoint(path)
    world = open_world(device, timeout_seconds=_TIMEOUT_SECONDS)
    model, tokenizer = load_model(checkpoint, device=world.device), load_tokenizer(checkpoint)
    tune = load_config(checkpoint).tune
    settings = replace(
        settings,
        leading_separator=tune is None or tune.leading_separator,
        end_ids=find_end_ids(checkpoint, tokenizer),
    )
    results, samples = evaluate_tasks(model, tokenizer, tasks, settings, same_task=names, world=world)
    table = ""
    if world.rank == 0:
        origin = {
            "model": str(checkpoint),
            "tokenizer_sha256": tokenizer.hash,
            "num_processes": world.size,
            "benchmark": benchmark,
        }
        write_results(folder / "results.json", {**origin, **results})
        with (folder / "samples.jsonl").open("w", encoding="ascii", newline="\n") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)
        table = results_table(results)
        (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    world.close()
    return f"{table}\n\n{folder / 'results.json'}" if table else ""


def read_tasks(
    data: Path, protocol: str, split: str, patterns: Sequence[str], limit: int | None
) -> tuple[list[EvaluationTask], dict[str, Any]]:
    """The tasks of a folder, in the protocol's form, and their description for results.json.

    Results are comparable if the descriptions are equal; they contain no paths.
    """
    if protocol == "bbh":
        tasks = read_bbh(data, patterns, limit)
    elif protocol == "mmlu":
        tasks = read_mmlu(data, "val" if split == "validation" else split, patterns, limit)
    else:
        opened = Benchmark(data)
        facts = {
            "name": opened.manifest["name"],
            "split": split,
            "manifest_sha256": file_sha256(Path(data) / "manifest.json"),
        }
        return benchmark_tasks(opened, split, patterns, limit), facts
    return tasks, {"name": protocol, "split": split}
