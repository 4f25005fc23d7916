"""How often and in which order each task is read (Iyer et al. 2022).

    inside a benchmark   w_i = min(n_i, eta)
    over benchmarks      p_i = share[benchmark of i] * w_i / sum of w in it
    without shares       p_i = w_i / sum of all w

Extra shares (reasoning, dialogue) are shares of all examples, taken from the largest benchmark share, as the paper took
its 1 % of reasoning data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe.data.sampling import Schedule

_EXAMPLE_ORDER = 0x65786D70  # keeps this use of the seed apart from others


class Task(NamedTuple):
    """What mixing needs to know about a task."""

    name: str
    benchmark: str
    category: str
    size: int  # training examples


def task_shares(
    tasks: Sequence[Task],
    *,
    eta: int | None = None,
    benchmark_shares: Mapping[str, float] | None = None,
    extra_shares: Mapping[str, float] | None = None,
) -> list[float]:
    """Each task's share of all examples read; shares sum to 1.

    benchmark_shares: relative, for every benchmark without an extra share; if empty, eta decides. extra_shares: of all
    examples. A benchmark with share 0 is not read. Raises ValueError for a benchmark without a share, a share for an
    unknown benchmark, and extra shares that exceed the share they are taken from.
    """
    counted = [float(task.size if eta is None else min(task.size, eta)) for task in tasks]
    weights: dict[str, float] = {}
    for task, weight in zip(tasks, counted, strict=True):
        weights[task.benchmark] = weights.get(task.benchmark, 0.0) + weight
    wanted = _benchmark_shares(weights, benchmark_shares or {}, extra_shares or {})
    return [
        wanted[task.benchmark] * weight / weights[task.benchmark] for task, weight in zip(tasks, counted, strict=True)
    ]


def _benchmark_shares(
    weights: Mapping[str, float], given: Mapping[str, float], extra: Mapping[str, float]
) -> dict[str, float]:
    _require_benchmarks("tune.extra_shares", extra, weights)
    extra = {name: share for name, share in extra.items() if name in weights}
    main = {name: weight for name, weight in weights.items() if name not in extra}
    if given:
        _require_benchmarks("tune.benchmark_shares", given, main)
        absent = sorted(main.keys() - given.keys())
        if absent:
            raise ValueError(
                f"tune.benchmark_shares has no share for {', '.join(absent)}, which the benchmark has: give one, or 0 "
                f"to leave it out"
            )
        main = {name: given[name] for name in main}
    if not main:
        raise ValueError(f"tune.extra_shares name all benchmarks ({', '.join(sorted(extra))}): leave out at least one")
    total = math.fsum(main.values())
    shares = {name: value / total for name, value in main.items()}
    largest = max(shares, key=lambda name: (shares[name], name))
    taken = math.fsum(extra.values())
    if taken > shares[largest]:
        raise ValueError(
            f"tune.extra_shares add up to {taken:g}, more than the largest share, that of {largest} "
            f"({shares[largest]:.3g}), which they are taken from; lower them"
        )
    shares[largest] -= taken
    return shares | extra


def _require_benchmarks(key: str, named: Mapping[str, float], known: Mapping[str, float]) -> None:
    unknown = sorted(name for name in named.keys() - known.keys() if named[name] > 0)
    if unknown:
        raise ValueError(
            f"{key} names {', '.join(unknown)}, but the training tasks belong to: {', '.join(sorted(known))}; remove "
            f"the name, or build a benchmark that has it"
        )


def choose_tasks(
    tasks: Sequence[Task],
    *,
    num_tasks: int | None = None,
    num_categories: int | None = None,
    always: Sequence[str] = (),
    always_categories: Sequence[str] = (),
    seed: int = 0,
) -> list[str]:
    """The names of an ablation's tasks, in the order of `tasks`. Smaller choices are subsets of larger ones.

    num_tasks: those in `always` first, then others in an order drawn by the seed. num_categories: `always_categories`
    first, then the others by decreasing number of tasks. Raises ValueError for more than exist, or fewer than are
    always included, and for a category that no task has.
    """
    chosen = list(tasks)
    if num_categories is not None:
        counts: dict[str, int] = {}
        for task in tasks:
            counts[task.category] = counts.get(task.category, 0) + 1
        unknown = [name for name in always_categories if name not in counts]
        if unknown:
            raise ValueError(f"tune.always_categories names {unknown[0]!r}; there are: {', '.join(sorted(counts))}")
        first = {name: number for number, name in enumerate(always_categories)}
        order = sorted(counts, key=lambda name: (first.get(name, len(first)), -counts[name], name))
        _require_count("tune.num_categories", num_categories, len(order), len(first), "categories")
        kept = set(order[:num_categories])
        chosen = [task for task in chosen if task.category in kept]
    if num_tasks is not None:
        pinned = {name for name in always if any(task.name == name for task in chosen)}
        names = sorted((task.name for task in chosen), key=lambda name: (name not in pinned, _place(seed, name)))
        _require_count("tune.num_tasks", num_tasks, len(names), len(pinned), "training tasks")
        subset = set(names[:num_tasks])
        chosen = [task for task in chosen if task.name in subset]
    return [task.name for task in chosen]


def _require_count(key: str, count: int, available: int, pinned: int, what: str) -> None:
    if not max(1, pinned) <= count <= available:
        raise ValueError(
            f"{key} ({count}) must be between {max(1, pinned)} (the {what} that are always included) and {available} "
            f"(all {what})"
        )


def _place(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/tasks/{name}".encode()).digest()


class ExampleDraws:
    """An endless list of examples with nearly the given shares in any range, a function of the seed alone.

    Every example of a task is read once before any is read again, each time in a freshly drawn order.
    """

    def __init__(self, bounds: np.ndarray, shares: Sequence[float], seed: int) -> None:
        """bounds: the examples of task i are bounds[i] to bounds[i + 1]; shares: one per task."""
        self._tasks = [i for i, share in enumerate(shares) if share > 0]
        empty = [i for i in self._tasks if bounds[i + 1] == bounds[i]]
        if empty or not self._tasks:
            raise ValueError(
                f"task number {empty[0]} has a share above 0 but no example; set its share to 0"
                if empty
                else "the shares of all tasks are 0; give at least one task a share above 0"
            )
        self._bounds = bounds
        self._schedule = Schedule([shares[i] for i in self._tasks], seed)
        self._seed = seed
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # task -> its epoch and that epoch's order

    def draw(self, first: int, count: int) -> np.ndarray:
        """The examples at places `first` to `first` + `count`; (count,) int64."""
        sources, numbers = self._schedule.draws(first, count)
        examples = np.empty(count, dtype=np.int64)
        by_source = np.argsort(sources, kind="stable")
        ends = np.searchsorted(sources[by_source], np.arange(len(self._tasks)), side="right")
        begin = 0
        for source, end in enumerate(ends.tolist()):
            if end > begin:
                places = by_source[begin:end]
                examples[places] = self._examples(self._tasks[source], numbers[places])
            begin = end
        return examples

    def _examples(self, task: int, numbers: np.ndarray) -> np.ndarray:
        start, stop = int(self._bounds[task]), int(self._bounds[task + 1])
        epochs, indices = np.divmod(numbers, stop - start)
        examples = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            examples[here] = start + self._order(task, int(epoch), stop - start)[indices[here]]
        return examples

    def _order(self, task: int, epoch: int, size: int) -> np.ndarray:
        known = self._orders.get(task)
        if known is None or known[0] != epoch:
            random = np.random.default_rng([self._seed, _EXAMPLE_ORDER, task, epoch])
            known = self._orders[task] = (epoch, random.permutation(size))
        return known[1]


class Sampled(NamedTuple):
    """Intended and actual share of one group of tasks."""

    name: str
    intended: float  # share of all examples
    sampled: float
    examples: int  # read, repetitions included
    positions: float  # its share of the positions read
    targets: float  # its share of the counted tokens


def sampled_shares(
    groups: Sequence[str], shares: Sequence[float], counts: np.ndarray, positions: np.ndarray, targets: np.ndarray
) -> list[Sampled]:
    """Intended and sampled shares of each group of tasks (for example its benchmark), largest first.

    groups, shares: per task. counts, positions, targets: examples, positions and counted tokens read of each task;
    (number of tasks,).
    """
    rows = []
    totals = [max(1.0, float(values.sum())) for values in (counts, positions, targets)]
    for name in sorted(set(groups)):
        own = [i for i, group in enumerate(groups) if group == name]
        read = [float(values[own].sum()) for values in (counts, positions, targets)]
        part = [value / total for value, total in zip(read, totals, strict=True)]
        intended = math.fsum(shares[i] for i in own)
        rows.append(Sampled(name, intended, part[0], int(read[0]), part[1], part[2]))
    return sorted(rows, key=lambda row: (-row.intended, row.name))
