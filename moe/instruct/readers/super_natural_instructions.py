"""Super-NaturalInstructions: one JSON object per task, `tasks/task<N>_<source>_<type>.json`, or derived sets with a
folder per task that holds train, dev and test files of the same schema (Iyer et al. 2022). Also gzipped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from moe.instruct.definition import TaskSettings
from moe.instruct.raw_files import read_json, read_text
from moe.instruct.readers.tasks import Context, Example, Skipped, TaskInfo, TaskReader, identity

EVALUATION_INSTANCES = 100  # the first ones are the published, label-balanced test subset
_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_HEADER = ("Definition", "Categories")


def read(context: Context) -> Iterator[TaskReader]:
    """Every task of the folder, or of the option `task_list` (a file of names); `tasks` overrides what files state.

    Raises ValueError naming the file and the key that is missing or wrong.
    """
    folder = context.path(context.source.path)
    tasks = _tasks(folder)
    wanted = _wanted(context, tasks, folder)
    for name in context.source.tasks.keys() - tasks.keys():
        raise ValueError(f"{context.where}: {folder} has no task {name}")
    for name in wanted:
        files = tasks[name]
        context.inputs.update(files.values())
        first = next(iter(files.values()))
        header = _read_header(first)
        settings = context.source.tasks.get(name, TaskSettings())
        categories = header["Categories"]
        settings = replace(
            settings,
            category=settings.category or (categories if isinstance(categories, str) else categories[0]),
            data_source=settings.data_source or _data_source(header, name),
            licence=settings.licence or _licence(header),
        )
        single = "all" in files
        info = context.info(
            name, settings, "task", ("train", "test") if single else tuple(files), first_are_test=single
        )
        yield TaskReader(info, partial(_examples, info, files, settings.instruction))


def _tasks(folder: Path) -> dict[str, dict[str, Path]]:
    """Task name -> its files by split; "all" is the published single-file form."""
    tasks: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("**/*.json*")):
        stem = path.name.split(".json")[0]
        if re.match(r"task\d+", stem):
            tasks[stem] = {"all": path}
        elif stem in _SPLITS and re.match(r"\w", path.parent.name):
            tasks.setdefault(path.parent.name, {})[_SPLITS[stem]] = path
    if not tasks:
        raise ValueError(f"{folder} has no task<N>_*.json and no folders with train.json, dev.json or test.json")
    return tasks


def _wanted(context: Context, tasks: dict[str, Any], folder: Path) -> list[str]:
    if "task_list" not in context.source.options:
        return sorted(tasks)
    path = context.path(context.source.options["task_list"])
    names = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    missing = [name for name in names if name not in tasks]
    if missing:
        raise ValueError(f"{path} names {missing[0]}, which {folder} does not have")
    return names


def _read_header(path: Path) -> dict[str, Any]:
    """All keys before the instances, which are most of the file; reads the whole file if a required key comes later."""
    text = read_text(path)
    decoder = json.JSONDecoder()
    header: dict[str, Any] = {}
    position = text.find("{") + 1
    try:
        while position and (match := re.compile(r'\s*,?\s*"([^"\\]+)"\s*:\s*').match(text, position)):
            if match[1] == "Instances" and header.keys() >= set(_HEADER):
                break
            header[match[1]], position = decoder.raw_decode(text, match.end())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not position:
        raise ValueError(f"{path} is not a JSON object")
    for key in _HEADER:
        value = header.get(key)
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(item, str) and item for item in texts):
            raise ValueError(f"{path}: key {key!r} ({value!r}) must be a text or a list of texts")
    return header


def _data_source(header: dict[str, Any], name: str) -> str:
    source = header.get("Source")
    if isinstance(source, list) and source and isinstance(source[0], str):
        return source[0]
    match = re.match(r"task\d+_([^_]+)", name)  # old files state it only in their name
    return match[1] if match else name


def _licence(header: dict[str, Any]) -> str | None:
    licence = header.get("Instance License")
    return ", ".join(map(str, licence)) if isinstance(licence, list) and licence else None


def _examples(info: TaskInfo, files: dict[str, Path], instruction: str | None) -> Iterator[Example | Skipped]:
    for split, path in files.items():
        task = read_json(path)
        if not isinstance(task, dict) or not isinstance(task.get("Instances"), list):
            raise ValueError(f"{path}: key 'Instances' must be a list")
        definition: Any = task.get("Definition")  # checked with the header; text in old files, a list in new ones
        text = instruction or (definition if isinstance(definition, str) else definition[0])
        labels = _labels(path)
        for number, instance in enumerate(task["Instances"]):
            where = f"{path}: Instances[{number}]"
            if not isinstance(instance, dict) or not isinstance(instance.get("input"), str):
                raise ValueError(f"{where}: key 'input' must be a text")
            output = instance.get("output")
            targets = (output,) if isinstance(output, str) else output
            if not isinstance(targets, (list, tuple)) or not all(isinstance(item, str) for item in targets):
                raise ValueError(f"{where}: key 'output' must be a text or a list of texts")
            candidates = labels if targets and targets[0] in labels else ()
            record = info.record(
                text.strip(),
                instance["input"],
                tuple(targets),
                candidates=candidates,
                example=identity(instance["input"]),
            )
            yield Example(record, split if split != "all" else _subset(number, len(task["Instances"])))


def _subset(number: int, count: int) -> str:
    """The first 100 instances are the test subset; of these, a task with fewer than 200 marks its second half "all".

    A task that is also trained on keeps the latter for training.
    """
    if number >= EVALUATION_INSTANCES:
        return "train"
    return "test" if number < count // 2 else "all"


def _labels(path: Path) -> tuple[str, ...]:
    beside = path.parent / "labels.json"
    if path.name.startswith("task") or not beside.is_file():
        return ()
    labels = read_json(beside)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{beside} must be a list of texts")
    return tuple(labels)
