"""UnifiedSKG style: a question with a table, a set of triples or a database schema, written as one line of text.

Rows have `text_in`, `struct_in` and `seq_out`. `struct_in` is already linearised text, or one of
{"header": [...], "rows": [[...]]}, {"triples": [[subject, relation, object]]},
{"db_id": ..., "tables": {name: [columns]}}.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

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

SEPARATOR = " ; structured knowledge: "


def read(context: Context) -> Iterator[TaskReader]:
    """Each task of the source; `fields` may map rows with other names. The option `separator` replaces SEPARATOR."""
    separator = str(context.source.options.get("separator", SEPARATOR))
    for name, settings in context.source.tasks.items():
        files = context.files(name, settings)
        info = context.info(name, settings, "keyword", tuple(files))
        mapper = context.field_mapper(name, settings)
        instruction = context.instruction(name, settings)
        yield TaskReader(info, partial(_examples, info, files, instruction, mapper, separator))


def linearize(structure: Any) -> str:
    """The text of a structure. Raises ValueError for anything but the four forms."""
    if isinstance(structure, str):
        return structure.strip()
    if isinstance(structure, dict):
        if isinstance(structure.get("header"), list) and isinstance(structure.get("rows"), list):
            return _table(structure["header"], structure["rows"])
        if isinstance(structure.get("triples"), list):
            return " | ".join(" : ".join(map(_cell, triple)) for triple in structure["triples"])
        if isinstance(structure.get("tables"), dict):
            tables = [f"{name} : {' , '.join(map(_cell, columns))}" for name, columns in structure["tables"].items()]
            return " | ".join(["", str(structure.get("db_id", "")), *tables]).strip()
    raise ValueError(f"{structure!r} is not a text, table (header, rows), triples or schema (db_id, tables)")


def _table(header: list[Any], rows: list[Any]) -> str:
    parts = ["col : " + " | ".join(map(_cell, header))]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, list) or len(row) != len(header):
            raise ValueError(f"row {number} of a table ({row!r}) must have {len(header)} cells")
        parts.append(f"row {number} : " + " | ".join(map(_cell, row)))
    return " ".join(parts)


def _cell(value: Any) -> str:
    return " ".join(str(value).split())


def _examples(
    info: TaskInfo, files: dict[str, Path], instruction: str, mapper: FieldMapper, separator: str
) -> Iterator[Example | Skipped]:
    for item in mapped_rows(files, mapper):
        if isinstance(item, Skipped):
            yield item
            continue
        split, row, fields = item
        for key in ("text_in", "struct_in", "seq_out"):
            if key not in fields:
                raise ValueError(f"{row.where}: key {key!r} is missing (there are: {', '.join(fields)})")
        try:
            structure = linearize(fields["struct_in"])
        except ValueError as error:
            raise ValueError(f"{row.where}: key 'struct_in': {error}") from error
        text = str(fields["text_in"]).strip()
        joined = f"{text}{separator}{structure}" if structure else text
        record = info.record(instruction, joined, as_targets(fields["seq_out"]), example=identity(row.fields))
        yield Example(record, split)
