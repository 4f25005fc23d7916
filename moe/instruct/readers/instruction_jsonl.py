"""Plain instruction files: rows of {"instruction", "input", "output"}, Self-Instruct's {"instruction", "instances"},
or metaseq's {"src", "tgt"}. All rows of a file are one task."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from moe.instruct.readers.tasks import Context, Example, Skipped, TaskInfo, TaskReader, as_targets, identity, split_rows


def read(context: Context) -> Iterator[TaskReader]:
    """Each task of the source; the settings' `instruction` precedes rows that have none of their own."""
    for name, settings in context.source.tasks.items():
        files = context.files(name, settings)
        info = context.info(name, settings, "instance", tuple(files))
        yield TaskReader(info, partial(_examples, info, files, settings.instruction or ""))


def _examples(info: TaskInfo, files: dict[str, Path], instruction: str) -> Iterator[Example | Skipped]:
    for split, row in split_rows(files):
        for number, (text, source, output) in enumerate(_parts(row.fields, row.where)):
            prompt = "\n\n".join(part.strip() for part in (text or instruction, source) if part.strip())
            if not prompt:
                yield Skipped("", row.where, "has neither instruction nor input", True, split)
                continue
            yield Example(
                info.record(prompt, "", as_targets(output), example=f"{identity(row.fields)}/{number}"), split
            )


def _parts(fields: dict[str, Any], where: str) -> Iterator[tuple[str, str, Any]]:
    """(instruction, input, output) of a row. Raises ValueError naming a key that is missing or not text."""
    if "src" in fields:
        yield "", _text(fields, "src", where), _text(fields, "tgt", where)
        return
    instruction = _text(fields, "instruction", where)
    instances = fields.get("instances", [fields])
    if not isinstance(instances, list) or not all(isinstance(item, dict) for item in instances):
        raise ValueError(f"{where}: key 'instances' must be a list of objects")
    for instance in instances:
        output = instance.get("output")
        if not isinstance(output, (str, list)):
            raise ValueError(f"{where}: key 'output' ({output!r}) must be a text or a list of texts")
        yield instruction, _text({"input": "", **instance}, "input", where), output


def _text(fields: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(fields.get(key), str):
        raise ValueError(f"{where}: key {key!r} ({fields.get(key)!r}) must be a text")
    return str(fields[key])
