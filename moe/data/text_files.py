"""The user's own text: files, folders and globs of .txt(.gz), .tsv(.gz), .jsonl(.gz, .zst) and .parquet, streamed."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from glob import glob, has_magic
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, NamedTuple

from moe.data.documents import Document

SUFFIXES = (".txt", ".txt.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

DOMAIN = "@domain"  # in a path: a wildcard within a name; the text that it matches is the domain
_WHOLE_VALUES = (".json", ".json.gz", ".json.zst")  # a single JSON value of unknown structure: no reader here takes it
_OTHER_NAMES = re.compile(
    r"\.(ndjson|jsonlines|jsonl|tsv|parquet)(\.gz|\.zst)?", re.IGNORECASE
)  # spellings of formats that are not plain text
_ZSTD_CHUNK_BYTES = 16 * 1024  # compressed bytes read at a time
_LONGEST_PIECE_BYTES = 1024 * 1024  # text without an empty line is cut after this many bytes


class TextFile(NamedTuple):
    """A file to read and the domain of its text."""

    path: Path
    domain: str


class Reading(NamedTuple):
    """How files become documents.

    A plain text file is cut at the first empty line after `piece_bytes`, or, if every line is a paragraph, at the first
    line end after them. So a file of any size can be streamed, and a single file can be split into training and
    held-out text. In a .tsv file the last column of every row is a paragraph, as in verse files: book, chapter and
    verse, text.
    """

    text_field: str = "text"
    piece_bytes: int = 32 * 1024  # about four contexts of 2048 tokens
    lines_are_paragraphs: bool = False


def find_files(paths: list[str], sources: Mapping[str, list[str]] | None = None) -> list[TextFile]:
    """Find the files of `paths`. Each path is a file of any name, a folder (searched for SUFFIXES) or a glob.

    The domain of a file is the text matched by @domain in its path; without @domain it is the name of the file (up to
    its first dot) or of the folder, and for a glob the name of the last folder before the first wildcard. sources: maps
    domains to paths, and overrides these names. Raises ValueError for a path that does not exist, for a folder or glob
    without files, and for .json and other names under which records would be read as plain text.
    """
    files = _find(paths)
    for domain, its_paths in ({} if sources is None else sources).items():
        if not its_paths:
            raise ValueError(f"data.sources.{domain} must name at least one file, folder or glob")
        files += [file._replace(domain=domain) for file in _find(its_paths)]
    for file in files:
        if file.path.name.lower().endswith(_WHOLE_VALUES):
            raise ValueError(
                f"{file.path} is a .json file, which is not read as text: convert it to .jsonl, with one JSON object "
                f"per line and its text in data.text_field (if it has that form, rename it), or to .txt or .parquet"
            )
        ending = "".join(file.path.suffixes[-2:])
        if _OTHER_NAMES.search(ending) and not file.path.name.endswith(SUFFIXES):
            raise ValueError(
                f"{file.path} would be read as plain text, although its name looks like another format: give it a name "
                f"that ends in one of {', '.join(SUFFIXES)}, in lower case"
            )
    return files


def _find(paths: list[str]) -> list[TextFile]:
    files: list[TextFile] = []
    for item in paths:
        path = Path(item).expanduser()
        if DOMAIN in item:
            files += _find_domains(str(path), item)
        elif path.is_file():
            files.append(TextFile(path, _stem(path)))
        elif path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
            if not found:
                raise ValueError(f"data.path {item} holds no file that ends in one of: {', '.join(SUFFIXES)}")
            files += [TextFile(file, path.resolve().name) for file in found]
        elif has_magic(item):
            found = sorted(file for name in glob(str(path), recursive=True) if (file := Path(name)).is_file())
            if not found:
                raise ValueError(f"data.path {item} matches no file")
            fixed = takewhile(lambda part: not has_magic(part), path.parts)
            domain = Path(*fixed).resolve().name
            files += [TextFile(file, domain) for file in found]
        else:
            raise ValueError(f"data.path {item} does not exist")
    return files


def _find_domains(pattern: str, item: str) -> list[TextFile]:
    """Find the files that match a pattern with @domain. If @domain occurs twice, it matches the same text twice."""
    first, *others = pattern.split(DOMAIN)
    expression = _glob_expression(first) + "(?P<domain>[^/]+?)" + "(?P=domain)".join(map(_glob_expression, others))
    found = []
    for name in sorted(glob(pattern.replace(DOMAIN, "*"), recursive=True)):
        match = re.fullmatch(expression, name)
        if match is not None and Path(name).is_file():
            found.append(TextFile(Path(name), match["domain"]))
    if not found:
        raise ValueError(f"data.path {item} matches no file")
    return found


def _glob_expression(part: str) -> str:
    """Translate part of a glob into a regular expression."""
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", part)
    return "".join(
        wildcards.get(piece, piece.replace("[!", "[^") if number % 2 else re.escape(piece))
        for number, piece in enumerate(pieces)
    )


def fingerprint(files: list[TextFile], how: Reading) -> str:
    """Identify the text by names, sizes and modification times, which show a change without reading the files."""
    stats = [(str(file.path.resolve()), file.domain, *_size_and_time(file.path)) for file in files]
    return json.dumps([how, stats])


def read(files: list[TextFile], how: Reading) -> Iterator[Document]:
    """Yield all documents in the order of `files`, with only a few in memory at a time.

    Equal texts fall into the same split. Raises ValueError, with the file and the position in it, for bytes that are
    not UTF-8, a line that is not JSON or lacks the text field, a lone surrogate, a .tsv row without a tab, a table
    without the text column, a file that cannot be read, and damaged compressed content.
    """
    for file in files:
        try:
            for text in _texts(file.path, how):
                if text if not how.lines_are_paragraphs else text.strip():
                    group = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
                    yield Document(file.domain, group, text)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file.path} cannot be read: {error}") from error


def _texts(path: Path, how: Reading) -> Iterator[str]:
    text_field = how.text_field
    if path.name.endswith(".parquet"):
        yield from _from_parquet(path, text_field)
    elif path.name.endswith(".jsonl.gz"):
        with gzip.open(path) as stream:
            yield from _from_jsonl(path, stream, text_field)
    elif path.name.endswith((".tsv", ".tsv.gz")):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield from _pieces(path, _last_column(path, stream), how._replace(lines_are_paragraphs=True))
    elif path.name.endswith(".gz"):
        with gzip.open(path) as stream:
            yield from _pieces(path, stream, how)
    elif path.name.endswith(".jsonl.zst"):
        with _open_zstd(path) as stream:
            yield from _from_jsonl(path, stream, text_field)
    else:
        with path.open("rb") as stream:
            yield from _from_jsonl(path, stream, text_field) if path.suffix == ".jsonl" else _pieces(path, stream, how)


def _pieces(path: Path, stream: Iterable[bytes], how: Reading) -> Iterator[str]:
    lines: list[bytes] = []
    size = offset = 0
    for line in stream:
        lines.append(line)
        size += len(line)
        is_end = how.lines_are_paragraphs or not line.strip()
        if (size >= how.piece_bytes and is_end) or size >= _LONGEST_PIECE_BYTES:
            yield _decode(b"".join(lines), path, offset)
            offset += size
            lines, size = [], 0
    yield _decode(b"".join(lines), path, offset)


def _last_column(path: Path, stream: Iterable[bytes]) -> Iterator[bytes]:
    offset = 0
    for number, row in enumerate(stream, start=1):
        _decode(row, path, offset)  # checked here, where the offset in the file is known
        offset += len(row)
        _, tab, text = row.rpartition(b"\t")
        if tab:
            yield text
        elif row.strip():
            raise ValueError(f"{path} line {number} has no tab: a row of a .tsv file must be a name, a tab and a text")


def _from_jsonl(path: Path, stream: Iterable[bytes], text_field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(stream, start=1):  # bytes are split at \n only, not at U+2028
        text = _decode(line, path, offset)
        offset += len(line)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"{path} line {number} has no text in the field {text_field!r} (it has: {fields}); set data.text_field"
            )
        if "\\u" in text:
            _require_whole_characters(record[text_field], path, number)
        yield record[text_field]


def _require_whole_characters(text: str, path: Path, number: int) -> None:
    """Raise ValueError for a lone surrogate, which JSON escapes can express but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path} line {number} has half a surrogate pair, {text[error.start]!r} at character {error.start} of its "
            f"text, which UTF-8 cannot hold: write both halves or remove it"
        ) from error


def _from_parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow.parquet  # 40 MB that only this format needs
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow: pip install -c constraints.txt '.[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if text_field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise ValueError(f"{path} has no column {text_field!r} (it has: {names}); set data.text_field")
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    if not isinstance(value, str):
                        raise ValueError(f"{path} row {row} has no text in {text_field!r}: {value!r}")
                    row += 1
                    yield value
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error


def _open_zstd(path: Path) -> IO[bytes]:
    try:
        import zstandard  # only this format needs it
    except ImportError as error:
        raise ValueError(f"{path} needs zstandard: pip install -c constraints.txt '.[data]'") from error
    return io.BufferedReader(_ZstdFrames(path, zstandard))


class _ZstdFrames(io.RawIOBase):
    """The content of all frames of a file. `zstandard`'s own reader stops silently at a truncated frame."""

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._path = path
        self._zstandard = zstandard
        self._file = path.open("rb")
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and (chunk := self._file.read(_ZSTD_CHUNK_BYTES)):
            self._ready = memoryview(self._decompress(chunk))
        if not self._ready and self._frame is not None and not self._frame.eof:
            raise ValueError(f"{self._path} cannot be read: it ends within its compressed content; copy it again")
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompress(self, chunk: bytes) -> bytes:
        content = []
        try:
            while chunk:
                if self._frame is None or self._frame.eof:
                    self._frame = self._zstandard.ZstdDecompressor().decompressobj()
                content.append(self._frame.decompress(chunk))
                chunk = self._frame.unused_data
        except self._zstandard.ZstdError as error:
            raise ValueError(f"{self._path} cannot be read: {error}") from error
        return b"".join(content)


def _decode(content: bytes, path: Path, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise ValueError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {place}"
            f"{' of its uncompressed content' if path.suffix in ('.gz', '.zst') else ''}; convert the file first"
        ) from error


def _stem(path: Path) -> str:
    return path.name.split(".")[0] or path.name


def _size_and_time(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
