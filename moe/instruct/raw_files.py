"""Rows of raw data sets as published: .jsonl, .json, .tsv, .csv and .parquet, the first four also gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

_ROW_KEYS = ("examples", "data", "rows", "Instances")  # where a .json file with a single object keeps its rows


class Row(NamedTuple):
    """One raw example and its location, for error messages."""

    where: str
    fields: dict[str, Any]


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Stream the rows of a file; .json files are read whole.

    `columns` names the fields of a .tsv without a header. Raises ValueError naming the file and the line, row or key
    that is wrong.
    """
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from _parquet(path)
    elif name.endswith(".jsonl"):
        with open_bytes(path) as file:
            yield from _jsonl(path, file)
    elif name.endswith(".json"):
        yield from _json(path)
    elif name.endswith(".tsv"):
        yield from _tsv(path, columns)
    elif name.endswith(".csv"):
        yield from _csv(path)
    else:
        raise ValueError(f"{path}: rows are read from .jsonl, .json, .tsv, .csv (each also .gz) and .parquet")


def read_json(path: Path) -> Any:
    """The value of a .json or .json.gz file. Raises ValueError naming the file."""
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_text(path: Path) -> str:
    """The text of a file that may be gzipped. Raises ValueError naming the file."""
    try:
        with open_bytes(path) as file:
            return file.read().decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file that may be gzipped."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is not a file")
    return cast(IO[bytes], gzip.open(path)) if path.name.endswith(".gz") else path.open("rb")


def _json(path: Path) -> Iterator[Row]:
    with open_bytes(path) as file:
        first = file.readline()
        if _is_object(first) and file.readline().strip():  # published .json files often hold one object per line
            file.seek(0)
            yield from _jsonl(path, file)
            return
    value = read_json(path)
    if isinstance(value, dict):
        key = next((key for key in _ROW_KEYS if isinstance(value.get(key), list)), None)
        value = [value] if key is None else value[key]
    if not isinstance(value, list):
        raise ValueError(f"{path} holds a value of type {type(value).__name__}, not a list of rows")
    for number, fields in enumerate(value):
        yield Row(f"{path} row {number}", _fields(fields, f"{path} row {number}"))


def _jsonl(path: Path, file: IO[bytes]) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        yield Row(where, _fields(value, where))


def _tsv(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            try:
                values = line.decode("utf-8").rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8: {error}") from error
            if columns is None:
                columns = values
            elif values != [""]:
                if len(values) != len(columns):
                    raise ValueError(f"{where} has {len(values)} columns, not {len(columns)}: {', '.join(columns)}")
                yield Row(where, dict(zip(columns, values, strict=True)))


def _csv(path: Path) -> Iterator[Row]:
    with open_bytes(path) as file:
        rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        for row in rows:
            where = f"{path} line {rows.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where} does not have {len(rows.fieldnames or ())} columns")
            yield Row(where, dict(row))


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet  # 40 MB, needed only for this format
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow: pip install -c constraints.txt '.[data]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    yield Row(f"{path} row {number}", fields)
                    number += 1
    except (pyarrow.ArrowInvalid, FileNotFoundError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _fields(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is of type {type(value).__name__}, not an object")
    return value
