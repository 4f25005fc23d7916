"""Readers for the file formats of published data sets; each record keeps its file and line for error messages."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

Row = dict[str, Any]
DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)  # what reading a damaged gzip archive raises


class Record(NamedTuple):
    """One line of a data file and its location."""

    fields: Row
    where: str  # "<file> line <n>"

    def get(self, name: str) -> Any:
        """The field `name`. Raises ValueError with the file, the line and the available fields."""
        if name not in self.fields:
            raise ValueError(
                f"{self.where} has no field {name!r}; it has {', '.join(map(repr, self.fields)) or 'none'}"
            )
        return self.fields[name]

    def text(self, name: str) -> str:
        """The field `name`, a string."""
        value = self.get(name)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: the field {name!r} ({value!r}) must be text")
        return value

    def number(self, name: str) -> int:
        """The field `name`, an integer or its digits."""
        value = self.get(name)
        if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{self.where}: the field {name!r} ({value!r}) must be a whole number")
        return value

    def choices(self, name: str) -> list[str]:
        """The field `name`, a list of two or more strings."""
        value = self.get(name)
        if not isinstance(value, list) or len(value) < 2 or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{self.where}: the field {name!r} ({value!r}) must be a list of two or more texts")
        return value

    def choice(self, name: str, count: int) -> int:
        """The field `name`, an index into `count` choices."""
        value = self.number(name)
        if not 0 <= value < count:
            raise ValueError(
                f"{self.where}: the field {name!r} ({value}) must name one of {count} choices, counted from 0"
            )
        return value

    def one_of(self, name: str, values: dict[Any, Any]) -> Any:
        """The value that `values` maps the field `name` to."""
        value = self.get(name)
        if value not in values:
            raise ValueError(
                f"{self.where}: the field {name!r} ({value!r}) must be one of {', '.join(map(repr, values))}"
            )
        return values[value]


def existing(path: Path) -> Path | None:
    """`path`, or `path` with .gz appended, whichever exists."""
    return next((each for each in (path, path.with_name(path.name + ".gz")) if each.is_file()), None)


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file, gzipped or not. Lines end at line feeds only, since texts contain U+2028.

    Raises ValueError naming the file if what is read from it is not UTF-8, or an archive is damaged.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}; convert the file first") from error
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged: {error}; replace the file") from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of every non-blank line. Raises ValueError as `open_text` does."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def json_lines(path: Path) -> Iterator[Record]:
    """JSON objects, one per line."""
    for number, line in lines(path):
        where = f"{path} line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where} holds a {type(fields).__name__}; each line must be an object")
        yield Record(fields, where)


def tab_separated(path: Path, columns: tuple[str, ...] | None = None) -> Iterator[Record]:
    """Rows of a tab-separated file without quoting. columns: their names, for a file without a header."""
    for number, line in lines(path):
        cells = line.split("\t")
        if columns is None:
            columns = tuple(cells)
            continue
        if len(cells) != len(columns):
            raise ValueError(
                f"{path} line {number} has {len(cells)} columns; it must have {len(columns)}: {', '.join(columns)}"
            )
        yield Record(dict(zip(columns, cells, strict=True)), f"{path} line {number}")


def comma_separated(path: Path) -> Iterator[Record]:
    """Rows of a CSV file with a header; quoted cells may contain line breaks."""
    with open_text(path) as file:
        reader = csv.DictReader(file)
        for fields in reader:
            where = f"{path} line {reader.line_num}"
            if None in fields or None in fields.values():
                raise ValueError(f"{where} must have as many cells as the header, {len(reader.fieldnames or ())}")
            yield Record(dict(fields), where)


def parquet(paths: list[Path]) -> Iterator[Record]:
    """Rows of all parts of one split, as the Hub stores them."""
    try:
        import pyarrow.parquet  # the extra `data`: needed only for the Hub's own files
    except ImportError as error:
        raise ValueError(
            f"{paths[0]} is a parquet file, and reading it needs pyarrow: pip install 'moe-lm[data]'"
        ) from error
    for path in paths:
        for number, fields in enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1):
            yield Record(fields, f"{path} row {number}")
