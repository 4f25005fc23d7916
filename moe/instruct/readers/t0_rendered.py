"""T0's mixture with its templates already applied: jsonl files of {prompt, completion} rows, one file per template
(`<dataset>_<subset>_<template>.jsonl`) or one per data set with `dataset` and `template` in each row.

The option `templates` names PromptSource's templates, which say what a row's template asks for: inverted ones are
dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moe.instruct.raw_files import read_rows
from moe.instruct.readers.promptsource import TemplateGroups
from moe.instruct.readers.tasks import Context, Example, Skipped, TaskInfo, TaskReader, identity

END_OF_TEXT = "<|endoftext|>"


class _Origin(NamedTuple):
    """The origin of a rendered row."""

    group: str
    template: str
    original_task: bool


def read(context: Context) -> Iterator[TaskReader]:
    """Each task of the source is a PromptSource group, such as `adversarial_qa/dbert`; files are found by name.

    Raises ValueError for rows whose template is not in PromptSource, since it cannot be known whether they are
    inverted.
    """
    folder = context.path(context.source.path)
    groups = TemplateGroups(context.path(context.source.options.get("templates")))
    files = sorted(path for path in folder.iterdir() if path.name.endswith((".jsonl", ".jsonl.gz")))
    if not files:
        raise ValueError(f"{context.where}: {folder} has no .jsonl files")
    for name, settings in context.source.tasks.items():
        group = settings.template or name
        origins = {
            _plain(f"{group}_{text.name}"): _Origin(group, text.name, text.original_task)
            for text in groups.group(group)
        }
        if not any(origin.original_task for origin in origins.values()):
            raise ValueError(f"{context.where}: no template of {group} asks for the original task; leave {name} out")
        mine = [path for path in files if _belongs(path, group, origins)]
        if not mine:
            raise ValueError(f"{context.where}: {folder} has no file for task {name} (group {group})")
        context.inputs.update(mine)
        dropped = tuple(origin.template for origin in origins.values() if not origin.original_task)
        info = context.info(name, settings, "instance", ("all",), examples_known=False, dropped_templates=dropped)
        yield TaskReader(info, partial(_examples, info, mine, group, origins))


def _belongs(path: Path, group: str, origins: dict[str, _Origin]) -> bool:
    """A per-template file is named after its template; a per-data-set file's name is a prefix of the group's."""
    stem = path.name.split(".jsonl")[0]
    plain = _plain(group)
    return stem in origins or plain == stem or plain.startswith(stem + "_")


def _examples(
    info: TaskInfo, files: list[Path], group: str, origins: dict[str, _Origin]
) -> Iterator[Example | Skipped]:
    for path in files:
        for row in read_rows(path):
            fields = row.fields
            for key in ("prompt", "completion"):
                if not isinstance(fields.get(key), str):
                    raise ValueError(f"{row.where}: key {key!r} ({fields.get(key)!r}) must be a text")
            stem = path.name.split(".jsonl")[0]
            key = f"{fields['dataset']}_{fields['template']}" if "template" in fields else stem
            origin = origins.get(_plain(key))
            if origin is None:
                if key.startswith(_plain(group) + "_"):
                    raise ValueError(f"{row.where}: PromptSource has no template {key!r} in {group}")
                continue  # another subset in the same file
            if origin.original_task:
                target = fields["completion"].removesuffix(END_OF_TEXT).strip()
                prompt = fields["prompt"].strip()
                record = info.record(
                    prompt, "", (target,), template=origin.template, example=identity([prompt, target])
                )
                yield Example(record, "all")


def _plain(name: str) -> str:
    """The spelling of names in T0's files: anything but letters, digits, dots and underscores becomes an underscore."""
    return re.sub(r"[^\w.]+", "_", name)
