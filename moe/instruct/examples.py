"""Encoded examples on disk: concatenated tokens in a memory-mapped file, and the start of each example.

tokens.bin    uint16 or uint32, little-endian
examples.npy  (N, 4) int64: first token, index in it of the first counted token, task, UTF-8 bytes of the counted text
meta.json     dtype, tasks, counts, sha256 of both files; written last
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.data.shards import file_sha256, token_dtype
from moe.instruct.encoding import EncodedExample

FORMAT = 1


class TaskInfo(NamedTuple):
    """What is known about a task besides its examples."""

    name: str
    benchmark: str
    category: str
    level: str  # how it is held out; "" in training


class ExampleWriter:
    """Appends examples, task by task; `finish` makes them readable."""

    def __init__(self, folder: Path, *, vocab_size: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._dtype = token_dtype(vocab_size)
        self._file = (folder / "tokens.bin").open("wb")
        self._rows: list[tuple[int, int, int, int]] = []
        self._tasks: list[TaskInfo] = []
        self._num_tokens = 0

    def start_task(self, task: TaskInfo) -> None:
        """Examples added from here on belong to `task`."""
        self._tasks.append(task)

    def add(self, example: EncodedExample, counted_bytes: int) -> None:
        """Append an example. counted_bytes: UTF-8 bytes of the text whose loss counts."""
        self._rows.append((self._num_tokens, example.first_counted, len(self._tasks) - 1, counted_bytes))
        self._file.write(np.asarray(example.tokens, dtype=np.dtype(self._dtype).newbyteorder("<")).tobytes())
        self._num_tokens += len(example.tokens)

    def finish(self) -> None:
        """Write the index and the checksums."""
        self._file.close()
        np.save(self._folder / "examples.npy", np.array(self._rows, dtype=np.int64).reshape(-1, 4), allow_pickle=False)
        meta = {
            "format": FORMAT,
            "dtype": self._dtype,
            "num_tokens": self._num_tokens,
            "tasks": [list(task) for task in self._tasks],
            "sha256": {name: file_sha256(self._folder / name) for name in ("tokens.bin", "examples.npy")},
        }
        (self._folder / "meta.json").write_text(json.dumps(meta, indent=1))


class ExampleStore:
    """Finished examples, verified when opened. Raises ValueError naming a file that is missing or changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "meta.json").is_file():
            raise ValueError(f"{folder} holds no encoded examples: it has no meta.json")
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        for name, expected in meta["sha256"].items():
            found = file_sha256(folder / name) if (folder / name).is_file() else "no such file"
            if found != expected:
                raise ValueError(
                    f"{folder / name} is damaged: sha256 {found}, expected {expected}; delete {folder.parent} and run "
                    f"the same command again to encode the examples again"
                )
        self.sha256: str = hashlib.sha256(json.dumps(meta["sha256"], sort_keys=True).encode()).hexdigest()
        self.tasks = [TaskInfo(*task) for task in meta["tasks"]]
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        path = folder / "tokens.bin"
        self._tokens = np.memmap(path, dtype=dtype, mode="r") if meta["num_tokens"] else np.empty(0, dtype)
        rows = np.load(folder / "examples.npy", allow_pickle=False)
        self._starts: np.ndarray = rows[:, 0]
        self.first_counted: np.ndarray = rows[:, 1]  # (N,)
        self.task_of: np.ndarray = rows[:, 2]  # (N,) index into `tasks`
        self.counted_bytes: np.ndarray = rows[:, 3]  # (N,) UTF-8 bytes of the text whose loss counts
        self.lengths = np.diff(self._starts, append=meta["num_tokens"])  # (N,) tokens
        self.positions = self.lengths - 1  # (N,) positions it takes in a sequence
        self.num_counted = self.lengths - np.maximum(self.first_counted, 1)  # (N,)
        # (number of tasks + 1,): examples are in task order, those of task i from bounds[i] to bounds[i + 1]
        self.bounds = np.searchsorted(self.task_of, np.arange(len(self.tasks) + 1))

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def sizes(self) -> np.ndarray:
        """Number of examples per task; (number of tasks,)."""
        return np.diff(self.bounds)

    def tokens(self, index: int) -> np.ndarray:
        """The tokens of one example, int64."""
        start = self._starts[index]
        return self._tokens[start : start + self.lengths[index]].astype(np.int64)


def write_examples(
    folder: Path, vocab_size: int, tasks: Sequence[tuple[TaskInfo, Sequence[tuple[EncodedExample, int]]]]
) -> ExampleStore:
    """Write a store of examples that are already in memory."""
    writer = ExampleWriter(folder, vocab_size=vocab_size)
    for task, examples in tasks:
        writer.start_task(task)
        for example, counted_bytes in examples:
            writer.add(example, counted_bytes)
    writer.finish()
    return ExampleStore(folder)
