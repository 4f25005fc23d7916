"""The tasks to evaluate: records of a benchmark's split, or the published files of BIG-Bench Hard and MMLU."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from moe.instruct.benchmark import Benchmark, TaskEntry
from moe.instruct.raw_files import read_json, read_text
from moe.instruct.records import Record

_POOL = 2000  # training records per task to draw demonstrations from; the file is already in random order
_MMLU_LETTERS = ("A", "B", "C", "D")


class EvaluationTask(NamedTuple):
    """The records of one task, and those available as demonstrations."""

    name: str  # benchmark/task
    benchmark: str
    category: str
    level: int | None  # a key of moe.instruct.splits.LEVELS; None outside our benchmarks
    records: list[Record]
    pool: list[Record]
    in_order: bool = False  # show all records the first ones of the pool, as published, instead of drawing


def benchmark_tasks(
    benchmark: Benchmark, split: str, patterns: Sequence[str] = (), limit: int | None = None
) -> list[EvaluationTask]:
    """The tasks of a split whose names match one of `patterns` (default: all), each with its first `limit` examples.

    A raw example comes with all its prompted versions. Demonstrations come from the task's training records if it has
    any, else from the other records of the split. Raises ValueError for a pattern that no task matches and for the
    training split.
    """
    if split == "train":
        raise ValueError("split ('train') must be validation or test: models are tuned on the training split")
    trained = {entry.task: entry for entry in benchmark.tasks("train")}
    tasks = []
    for entry in _matching(benchmark.tasks(split), split, patterns):
        records = list(benchmark.records(split, entry.task))
        pool = list(islice(benchmark.records("train", entry.task), _POOL)) if entry.task in trained else records
        chosen = first_examples(records, limit)
        tasks.append(EvaluationTask(entry.task, entry.benchmark, entry.category, entry.level, chosen, pool))
    return tasks


def _matching(entries: Sequence[TaskEntry], split: str, patterns: Sequence[str]) -> list[TaskEntry]:
    for pattern in patterns:
        if not any(fnmatchcase(entry.task, pattern) for entry in entries):
            raise ValueError(f"split {split} has no task {pattern!r}; `moe instruct show` lists those that it has")
    found = [
        entry for entry in entries if not patterns or any(fnmatchcase(entry.task, pattern) for pattern in patterns)
    ]
    if not found:
        raise ValueError(f"split ({split}) has no task: the benchmark holds nothing out for it; choose another")
    return found


def first_examples(records: Sequence[Record], limit: int | None) -> list[Record]:
    """All records of the first `limit` raw examples."""
    if limit is None:
        return list(records)
    names = dict.fromkeys(owner(record, number) for number, record in enumerate(records))
    kept = set(islice(names, limit))
    return [record for number, record in enumerate(records) if owner(record, number) in kept]


def owner(record: Record, number: int) -> str:
    """The raw example that a record is a version of; a record without a name counts as its own, by number."""
    return record.example or f"record {number}"


def read_bbh(folder: Path, patterns: Sequence[str] = (), limit: int | None = None) -> list[EvaluationTask]:
    """The tasks of BIG-Bench Hard: `<task>.json` (also gzipped) beside a folder of chain-of-thought prompts.

    The prompts' questions serve as demonstrations, with only their final answers. Raises ValueError naming the file at
    fault.
    """
    tasks = []
    for path in _files(folder, "*.json*", "BIG-Bench Hard's <task>.json"):
        name = path.name.split(".json")[0]
        if patterns and not any(fnmatchcase(f"bbh/{name}", pattern) for pattern in patterns):
            continue
        content = read_json(path)
        rows = content.get("examples") if isinstance(content, dict) else None
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{path}: key 'examples' must be a list of questions")
        instruction, shown = _bbh_prompt(_beside(folder, path, name))
        records = []
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("input", "target")):
                raise ValueError(f"{path}: examples[{number}] must have the texts 'input' and 'target'")
            records.append(_bbh_record(name, instruction, row["input"], row["target"], f"{name} {number}"))
        pool = [_bbh_record(name, instruction, *pair, f"shown {i}") for i, pair in enumerate(shown)]
        category = "BIG-Bench Hard"
        tasks.append(
            EvaluationTask(f"bbh/{name}", "bbh", category, None, first_examples(records, limit), pool, in_order=True)
        )
    return _some(tasks, folder, patterns)


def _bbh_record(name: str, instruction: str, question: str, answer: str, example: str) -> Record:
    asked = f"Q: {question}\nA:"
    return Record(
        f"bbh/{name}", "bbh", "BIG-Bench Hard", f"bbh/{name}", "task", instruction, asked, (answer,), example=example
    )


def _beside(folder: Path, path: Path, name: str) -> Path:
    for base in (folder, path.parent.parent):
        for place in ("cot_prompts", "cot-prompts"):
            if (base / place / f"{name}.txt").is_file():
                return base / place / f"{name}.txt"
    raise ValueError(f"{path} needs its demonstrations: put cot-prompts/{name}.txt beside it or above it")


def _bbh_prompt(path: Path) -> tuple[str, list[tuple[str, str]]]:
    """The description of a task and its questions with their answers, which follow "the answer is"."""
    text = read_text(path).split("-----", 1)[-1].strip()
    description, *parts = re.split(r"\n\n(?=Q: )", text)
    pairs = []
    for part in parts:
        question, found, answer = part.removeprefix("Q: ").partition("\nA: ")
        before, said, last = answer.rpartition("answer is ")
        if not found or not said or not before:
            raise ValueError(f"{path}: a demonstration lacks 'Q: ', 'A: ' or 'the answer is ...': {part[:80]!r}")
        pairs.append((question, last.strip().removesuffix(".")))
    if not pairs:
        raise ValueError(f"{path} has no demonstration that begins with 'Q: '")
    return description.strip(), pairs


def read_mmlu(
    folder: Path, split: str = "test", patterns: Sequence[str] = (), limit: int | None = None
) -> list[EvaluationTask]:
    """The subjects of MMLU: `{dev,val,test}/<subject>_{dev,val,test}.csv`, rows of question, four options and letter.

    The five rows of `dev` are the demonstrations. Raises ValueError naming the file and the row.
    """
    tasks = []
    for path in _files(folder / split, f"*_{split}.csv", f"MMLU's {split}/<subject>_{split}.csv"):
        subject = path.name.removesuffix(f"_{split}.csv")
        if patterns and not any(fnmatchcase(f"mmlu/{subject}", pattern) for pattern in patterns):
            continue
        found: list[list[Record]] = []
        for file in (path, folder / "dev" / f"{subject}_dev.csv"):
            if not file.is_file():
                raise ValueError(f"{path} has no demonstrations: {file} does not exist")
            rows = list(csv.reader(io.StringIO(read_text(file), newline="")))
            found.append(
                [_mmlu_record(subject, row, f"{file} row {i}", f"{subject} {i}") for i, row in enumerate(rows)]
            )
        records, pool = found
        tasks.append(
            EvaluationTask(f"mmlu/{subject}", "mmlu", "MMLU", None, first_examples(records, limit), pool, in_order=True)
        )
    return _some(tasks, folder, patterns)


def _mmlu_record(subject: str, row: list[str], where: str, example: str) -> Record:
    if len(row) != 6 or row[5] not in _MMLU_LETTERS:
        raise ValueError(f"{where} must have a question, four options and one of A, B, C, D: {row!r}")
    name = subject.replace("_", " ")
    instruction = f"The following are multiple choice questions (with answers) about {name}."
    options = "".join(f"\n{letter}. {option}" for letter, option in zip(_MMLU_LETTERS, row[1:5], strict=True))
    asked = f"{row[0].strip()}{options}\nAnswer:"
    return Record(
        f"mmlu/{subject}", "mmlu", "MMLU", f"mmlu/{subject}", "task", instruction, asked, (row[5],), _MMLU_LETTERS,
        example=example,
    )  # fmt: skip


def _files(folder: Path, pattern: str, what: str) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; it must be one that holds {what}")
    files = sorted(folder.glob(pattern)) or sorted(folder.glob(f"bbh/{pattern}"))
    if not files:
        raise ValueError(f"{folder} must hold {what}")
    return files


def _some(tasks: list[EvaluationTask], folder: Path, patterns: Sequence[str]) -> list[EvaluationTask]:
    if not tasks:
        raise ValueError(f"{folder} has no task that matches {', '.join(map(repr, patterns))}")
    return tasks
