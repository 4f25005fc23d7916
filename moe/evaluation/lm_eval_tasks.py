"""lm-eval's task definitions on files: what stands in for `datasets.load_dataset`, and loading by name."""

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
    """A split whose file is not there: no demonstrations for the zero-shot, an error for whoever needs its rows."""

    def __init__(self, error: SplitNotFoundError) -> None:
        self._error = error

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def _refuse(self, *_: object) -> NoReturn:
        raise self._error

    __getitem__ = __getattr__ = _refuse


class FileSplits:
    """What `load_dataset(hub_id, subset)` returns, read from files when a split is asked for."""

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
        """Names of the splits, whether or not their files are there."""
        return splits_of(self._hub_id, self._subset)


@contextlib.contextmanager
def data_from_files(data_dir: Path | None) -> Iterator[dict[str, dict[str, Any]]]:
    """Inside, `datasets.load_dataset` reads listed sets from `data_dir` and refuses all others; None changes nothing.

    The dict that comes fills with the files that were read: path, SHA-256, number of rows and a note on what a
    mirror's form lacks.
    """
    read_so_far: dict[str, dict[str, Any]] = {}
    if data_dir is None:
        yield read_so_far
        return
    folder, original = data_dir, datasets.load_dataset

    def load(path: str, name: str | None = None, **_: Any) -> FileSplits:
        splits_of(path, name)  # an unlisted one fails here, with the list
        return FileSplits(path, name, folder, read_so_far)

    datasets.load_dataset = load
    try:
        yield read_so_far
    finally:
        datasets.load_dataset = original


def load_tasks(names: list[str], num_fewshot: int | None, fewshot_seed: int, manager: TaskManager | None = None) -> Any:
    """The tasks and groups that `names` (with * and ?) match, lm-eval's and this project's, as `evaluate` takes them.

    num_fewshot: for every task that does not fix 0; None keeps each task's own. Raises ValueError for a name that
    matches nothing, and for demonstrations from a split whose file is not there.
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
    """An index of lm-eval's tasks and this project's; it takes seconds to build, and a process builds it once."""
    return TaskManager(include_path=str(OWN_TASKS))


def _refuse_shots(name: str, task: Any, shots: int, available: int) -> NoReturn:
    docs = task.fewshot_docs()
    if isinstance(docs, AbsentSplit):
        docs[0]  # says which file
    raise ValueError(f"{name} cannot have {shots} demonstrations: there are {available} to choose from")
