"""A benchmark on disk: frozen splits, verified when opened, streamed task by task.

<folder>/manifest.json                     what it was built from: sources, licences, input hashes, removed tasks, and
                                           the hashes of the three split manifests
         {train,validation,test}/manifest.json     the tasks of a split with counts and hashes
         {train,validation,test}/<benchmark>/<task>.jsonl
         overlaps.json  catalogue.html
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe.instruct.records import Record, read_records
from moe.instruct.splits import LEVELS

FORMAT = 1
SPLITS = ("train", "validation", "test")
_READ_BYTES = 1 << 20


class TaskEntry(NamedTuple):
    """One task in one split."""

    task: str
    benchmark: str
    category: str
    data_source: str
    style: str
    licence: str
    level: int | None  # a key of moe.instruct.splits.LEVELS in evaluation; None in training
    file: str  # relative to the benchmark's folder
    records: int
    examples: int  # raw examples; prompted versions of one count once
    seen: int  # records the cap drew from
    sha256: str
    skipped: dict[str, int]  # reason -> number of examples that gave no record

    @property
    def level_name(self) -> str:
        return "" if self.level is None else LEVELS[self.level]


class Benchmark:
    """The splits of a benchmark."""

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        """Open a folder written by `moe instruct build`; `verify` reads every file and checks its hash.

        Raises ValueError, naming the file, for a manifest that does not match its data.
        """
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = _read_manifest(self.folder / "manifest.json")
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"{self.folder} has format {self.manifest.get('format')!r}, not {FORMAT}: build it again")
        self._entries: dict[str, dict[str, TaskEntry]] = {}
        for split in SPLITS:
            path = self.folder / split / "manifest.json"
            _require_hash(path, self.manifest["splits"][split]["sha256"])
            tasks = _read_manifest(path)["tasks"]
            self._entries[split] = {item["task"]: TaskEntry(**item) for item in tasks}
        if verify:
            self.verify()

    def verify(self) -> None:
        """Check the hash of every file of every split. Raises ValueError naming the first that differs."""
        for entries in self._entries.values():
            for entry in entries.values():
                _require_hash(self.folder / entry.file, entry.sha256)

    def tasks(self, split: str) -> list[TaskEntry]:
        """The tasks of a split, sorted by name."""
        if split not in self._entries:
            raise ValueError(f"split {split!r} must be one of: {', '.join(SPLITS)}")
        return list(self._entries[split].values())

    def entry(self, split: str, task: str) -> TaskEntry:
        """One task of a split. Raises ValueError suggesting similar names."""
        entries = {entry.task: entry for entry in self.tasks(split)}
        if task not in entries:
            near = difflib.get_close_matches(task, entries, n=3)
            hint = f"; near are: {', '.join(near)}" if near else ""
            raise ValueError(f"split {split} has no task {task!r}{hint}")
        return entries[task]

    def records(self, split: str, task: str | None = None) -> Iterator[Record]:
        """Stream the records of one task, or of all tasks of a split in turn."""
        for entry in self.tasks(split) if task is None else [self.entry(split, task)]:
            yield from read_records(self.folder / entry.file)


def changed_inputs(benchmark: Benchmark, data: Path) -> list[str]:
    """The input files that have changed since the benchmark was built, or are missing."""
    changed = []
    for name, expected in benchmark.manifest["inputs"].items():
        path = data / name
        if not path.is_file() or file_sha256(path) != expected:
            changed.append(name)
    return changed


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(path: Path, content: dict[str, Any]) -> str:
    """Write a human-readable manifest and return its SHA-256."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return file_sha256(path)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {path.parent} is not a benchmark; `moe instruct build` makes one")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a manifest: it holds a value of type {type(content).__name__}, not an object")
    return content


def _require_hash(path: Path, expected: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing, but the manifest names it: build the benchmark again")
    found = file_sha256(path)
    if found != expected:
        raise ValueError(
            f"{path} does not match the manifest (sha256 {found[:12]}..., not {expected[:12]}...): it was changed "
            f"after the build; build the benchmark again"
        )
