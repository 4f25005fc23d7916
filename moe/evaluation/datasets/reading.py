"""Find a split's file below the data folder by Hub id, subset and split, and read its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moe.evaluation.datasets.files import Record, Row, existing, json_lines, parquet
from moe.evaluation.datasets.table import ANY_SUBSET, TABLE, DataSet


class SplitNotFoundError(ValueError):
    """A listed data set's file is not in the data folder."""


class Source(NamedTuple):
    """Where a split was found."""

    path: Path
    rows: Callable[[], Iterator[Row]]
    note: str | None  # what a mirror's file lacks, or how its rows differ from the Hub's


def read(hub_id: str, subset: str | None, split: str, data_dir: Path | str) -> list[Row]:
    """Return the rows of a split, with the Hub's columns.

    Raises ValueError for an unlisted set (listing what there is), SplitNotFoundError for a missing file (listing the
    places searched), and ValueError for a line with a missing field or a wrong value (giving file and line).
    """
    source = find(hub_id, subset, split, data_dir)
    rows = list(source.rows())
    if not rows:
        raise ValueError(f"{source.path} holds no rows of {_name(hub_id, subset)}, split {split!r}: replace the file")
    return rows


def find(hub_id: str, subset: str | None, split: str, data_dir: Path | str) -> Source:
    """Which file holds a split: the Hub's form first, then the published one, then a mirror's. Errors as in `read`."""
    data_set, root = _lookup(hub_id, subset), Path(data_dir)
    if split not in data_set.splits:
        raise ValueError(f"{_name(hub_id, subset)} has no split {split!r}; it has: {', '.join(data_set.splits)}")
    if not root.is_dir():
        raise ValueError(
            f"the data folder {root} does not exist or is not a folder: set --data-dir to the folder of the data sets"
        )
    source = _hub_files(root, hub_id, subset, split, data_set.columns)
    if source is not None:
        return source
    for file in data_set.splits[split]:
        path = existing(root / file.path.format(subset=subset))
        if path is not None:
            return Source(path, partial(file.read, path, subset or ""), file.note)
    tried = [f"{hub_id}/{'' if subset is None else f'{subset}/'}{split}.jsonl or {split}-*.parquet (the Hub's own)"]
    tried += [file.path.format(subset=subset) for file in data_set.splits[split]]
    raise SplitNotFoundError(
        f"no file with split {split!r} of {_name(hub_id, subset)} is in {root}; looked for {'; '.join(tried)}, each "
        f"also with .gz"
    )


def splits_of(hub_id: str, subset: str | None) -> tuple[str, ...]:
    """The splits of a listed data set, whether or not their files exist."""
    return tuple(_lookup(hub_id, subset).splits)


def listed_ids() -> list[str]:
    """Every readable data set, as `id` or `id (subset, ...)`."""
    subsets: dict[str, list[str]] = {}
    for hub_id, subset in TABLE:
        subsets.setdefault(hub_id, []).extend([] if subset is None else [subset])
    return [f"{hub_id} ({', '.join(names)})" if names else hub_id for hub_id, names in subsets.items()]


def _lookup(hub_id: str, subset: str | None) -> DataSet:
    for key in ((hub_id, subset), (hub_id, ANY_SUBSET)):
        if key in TABLE:
            return TABLE[key]
    subsets = [str(name) for listed, name in TABLE if listed == hub_id]
    if subsets:
        raise ValueError(f"{hub_id} has no subset {subset!r} that can be read; it has: {', '.join(subsets)}")
    raise ValueError(
        f"the data set {hub_id!r} cannot be read from files, and with --data-dir nothing is downloaded; these can: "
        f"{'; '.join(listed_ids())}"
    )


def _hub_files(root: Path, hub_id: str, subset: str | None, split: str, columns: tuple[str, ...]) -> Source | None:
    """A split as stored on the Hub or exported by `datasets`."""

    def rows(read: Callable[[Any], Iterator[Record]], where: Any) -> Iterator[Row]:
        for record in read(where):
            yield {**{name: record.get(name) for name in columns}, **record.fields}

    for folder in (subset,) if subset not in (None, "default") else ("", "default", "data", "plain_text"):
        path = existing(root / hub_id / str(folder) / f"{split}.jsonl")
        if path is not None:
            return Source(path, partial(rows, json_lines, path), None)
        parts = sorted((root / hub_id / str(folder)).glob(f"{split}-*.parquet"))
        if parts:
            return Source(parts[0], partial(rows, parquet, parts), None)
    return None


def _name(hub_id: str, subset: str | None) -> str:
    return hub_id if subset is None else f"{hub_id} ({subset})"
