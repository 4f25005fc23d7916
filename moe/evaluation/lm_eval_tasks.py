"""lm-eval's task definitions on local files: a stand-in for `datasets.load_dataset`, and loading tasks by name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import datasets
from lm_eval.tasks import TaskManager

from moe.evaluation.datasets import SplitNotFoundError, find, read, splits_of
from moe.evaluation.file_record import describe

OWN_TASKS = Path(__file__).with_name("tasks")


class AbsentSplit:
    """A split whose file is missing: empty when iterated (zero-shot), an error when its rows are accessed."""

    def __init__(self, error: SplitNotFoundError) -> None:
        self._error = error

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def _refuse(self, *_: object) -> NoReturn:
        raise self._error

    __getitem__ = __getattr__ = _refuse


class FileSplits:
    """Stands in for `load_dataset(hub_id, subset)`; each split is read from a file on first access."""

    def __init__(self, hub_id: str, subset: str | None, data_dir: Path, read_so_far: dict[str, dict[str, Any]]) -> None:
        self._hub_id, self._subset, self._data_dir = hub_id, subset, data_dir
        self._read_so_far = read_so_far
        self._splits: dict[str, Any] = {}

    def __getitem__(self, split: str) -> Any:
        if split not in self._splits:
            try:
                source = find(self._hub_id, self._subset, split, self._data_dir)
            except SplitNotFoundError as error:
                self._splits[split] = AbsentSplit(error)
            else:
                rows = read(self._hub_id, self._subset, split, self._data_dir)
                self._splits[split] = datasets.Dataset.from_list(rows)
                name = "/".join(filter(None, [self._hub_id, self._subset, split]))
                self._read_so_far[name] = describe(source, len(rows))
        return self._splits[split]

    def keys(self) -> tuple[str, ...]:
        """Names of the splits, whether or not their files exist."""
        return splits_of(self._hub_id, self._subset)


@contextlib.contextmanager
def data_from_files(data_dir: Path | None) -> Iterator[dict[str, dict[str, Any]]]:
    """Make `datasets.load_dataset` read listed sets from `data_dir` and refuse all others; None changes nothing.

    The yielded dict fills with the files read: path, SHA-256, number of rows and a note on what a mirror's form lacks.
    """
    read_so_far: dict[str, dict[str, Any]] = {}
    if data_dir is None:
        yield read_so_far
        return
    folder, original = data_dir, datasets.load_dataset

    def load(path: str, name: str | None = None, **_: Any) -> FileSplits:
        splits_of(path, name)  # raises for an unlisted set, listing what there is
        return FileSplits(path, name, folder, read_so_far)

    datasets.load_dataset = load
    try:
        yield read_so_far
    finally:
        datasets.load_dataset = original


def load_tasks(names: list[str], num_fewshot: int | None, fewshot_seed: int, manager: TaskManager | None = None) -> Any:
    """Load the tasks and groups that `names` (with * and ?) match, lm-eval's and this project's, for `evaluate`.

    num_fewshot: for every task that does not fix it at 0; None keeps each task's own. Raises ValueError for a name that
    matches nothing, for too few demonstrations to choose from, and for ones from a split whose file is missing.
    """
    manager = task_manager() if manager is None else manager
    matched: list[str] = []
    for name in names:
        found = manager.match_tasks([name])
        if not found:
            close = [task for task in manager.all_tasks if task.startswith(name.split("_")[0])][:12]
            hint = f"; beginning alike: {', '.join(close)}" if close else ""
            raise ValueError(f"lm-eval has no task, group or tag {name!r}{hint}")
        matched += [each for each in found if each not in matched]
    loaded = manager.load(matched)
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        shots = (own or 0) if num_fewshot is None or own == 0 else num_fewshot
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=fewshot_seed)
        if shots > 0:
            available = len(task.sampler.df)
            if available < shots:
                _refuse_shots(name, task, shots, available)
    return loaded


@functools.cache
def task_manager() -> TaskManager:
    """An index of lm-eval's and this project's tasks; takes seconds to build, so it is built once per process."""
    return TaskManager(include_path=str(OWN_TASKS))


def _refuse_shots(name: str, task: Any, shots: int, available: int) -> NoReturn:
    docs = task.fewshot_docs()
    if isinstance(docs, AbsentSplit):
        docs[0]  # raises, naming the missing file
    raise ValueError(f"num_fewshot ({shots}) is more than the {available} examples that {name} can show: lower it")
