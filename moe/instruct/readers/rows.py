"""Raw rows under one hand-written instruction, for data sets that come without any: the definition's `fields` say what
`input`, `target` and, for multiple choice, `candidates` are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from moe.instruct.readers.tasks import (
    Context,
    Example,
    FieldMapper,
    Skipped,
    TaskInfo,
    TaskReader,
    as_targets,
    identity,
    mapped_rows,
)


def read(context: Context) -> Iterator[TaskReader]:
    """Each task of the source."""
    for name, settings in context.source.tasks.items():
        missing = {"input", "target"} - settings.fields.keys()
        if missing:
            raise ValueError(f"{context.where}: tasks.{name}.fields.{max(missing)} must be given")
        files = context.files(name, settings)
        info = context.info(name, settings, "task", tuple(files))
        mapper = context.field_mapper(name, settings)
        yield TaskReader(info, partial(_examples, info, files, context.instruction(name, settings), mapper))


def _examples(
    info: TaskInfo, files: dict[str, Path], instruction: str, mapper: FieldMapper
) -> Iterator[Example | Skipped]:
    for item in mapped_rows(files, mapper):
        if isinstance(item, Skipped):
            yield item
            continue
        split, row, fields = item
        record = info.record(
            instruction,
            str(fields["input"]).strip(),
            as_targets(fields["target"]),
            candidates=as_targets(fields.get("candidates") or ()),
            example=identity(row.fields),
        )
        yield Example(record, split)
