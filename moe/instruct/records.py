"""The common record format of all benchmarks, and its jsonl form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# how a benchmark words its tasks: one definition per task, a template around every instance, or a bare input introduced
# by one hand-written sentence (Iyer et al. 2022)
STYLES = ("task", "instance", "keyword")


class Record(NamedTuple):
    """One prompted example.

    `task` is a dataset and `data_source` the raw data behind it, which several tasks may share. With style "instance",
    the template's whole prompt is in `instruction` and `input` is empty, because the two are interwoven; with "task"
    and "keyword", `instruction` is the same for every record of the task. `targets` are alternative references, of
    which the first is trained on. `candidates` are the answers to rank, empty for free-text answers. `example`
    identifies the raw example: prompted versions of one example share it, and all examples whose names agree up to a
    slash (turns of one dialogue) stay in one split.
    """

    task: str
    benchmark: str
    category: str
    data_source: str
    style: str
    instruction: str
    input: str
    targets: tuple[str, ...]
    candidates: tuple[str, ...] = ()
    template: str = ""
    example: str = ""

    @property
    def body(self) -> str:
        """The text specific to this example rather than to the task."""
        return self.instruction if self.style == "instance" else self.input


_TEXTS = tuple(name for name in Record._fields if name not in ("targets", "candidates"))


def fault(record: Record) -> str | None:
    """Why a record is unusable for training and evaluation, or None."""
    if record.style not in STYLES:
        return f"style {record.style!r} is not one of: {', '.join(STYLES)}"
    if not record.targets:
        return "it has no target"
    if any(not target.strip() for target in record.targets):
        return "it has an empty target"
    if record.candidates and record.targets[0] not in record.candidates:
        return f"its target {record.targets[0]!r} is not among its candidates {list(record.candidates)!r}"
    return None


def to_json(record: Record) -> str:
    """One line of ASCII JSON, so that no reader can take U+2028 for the end of a line."""
    return json.dumps(record._asdict())


def from_json(line: str | bytes, where: str) -> Record:
    """Parse the record of one line. Raises ValueError, starting with `where`, for anything else."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict) or value.keys() != set(Record._fields):
        found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{where} is not a record: it has {found}; a record has {', '.join(Record._fields)}")
    for name in _TEXTS:
        if not isinstance(value[name], str):
            raise ValueError(f"{where}: {name} ({value[name]!r}) must be text")
    for name in ("targets", "candidates"):
        value[name] = _texts(value[name], f"{where}: {name}")
    record = Record(**value)
    problem = fault(record)
    if problem is not None:
        raise ValueError(f"{where} is not a usable record: {problem}")
    return record


def read_records(path: Path) -> Iterator[Record]:
    """Stream the records of a jsonl file. Raises ValueError naming the file and the line."""
    with path.open("rb") as file:  # bytes are split at \\n only
        for number, line in enumerate(file, start=1):
            yield from_json(line, f"{path} line {number}")


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write a jsonl file and return the number of records."""
    count = 0
    with path.open("w", encoding="ascii", newline="\n") as file:
        for record in records:
            file.write(to_json(record) + "\n")
            count += 1
    return count


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
        raise ValueError(f"{where} ({value!r}) must be a list of texts")
    return tuple(value)
