"""From record scores to metrics of tasks, categories and levels, with intervals and chance levels.

Every mean weights its parts equally: sub-tasks of a task in one benchmark, the same task in several benchmarks, tasks
of a category, categories of a level, numbers of demonstrations. Intervals are percentile bootstraps over
raw examples; the set of tasks is fixed. How often a draw contains an example is a Poisson(1) variate that depends only
on the seed, the task name shared by copies, and the example (the Poisson bootstrap). So copies of an example in several
benchmarks are drawn together whatever else each benchmark has, and draws of two models on the same records are paired,
so that their difference has an interval too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.evaluation.results import CONFIDENCE, RESAMPLES, Estimate
from moe.instruct.splits import LEVELS
from moe.instruct.yaml_files import read_yaml

KINDS = ("task", "category", "level")
NO_LEVEL = "no level"  # for tasks outside our benchmarks, such as MMLU's files
# tasks with several names or parts; otherwise a task's name is what follows its benchmark's
SAME_TASK: dict[str, tuple[str, ...]] = {
    "MMLU": ("mmlu/*", "*_mmlu_*"),
    "BIG-Bench Hard": ("bbh/*",),
    "WinoBias": ("*/*wino_bias*", "*/*winobias*"),
    "ARC challenge": ("*/arc_challenge", "*/ai2_arc/arc-challenge", "*/ai2_arc/ARC-Challenge"),
    "ARC easy": ("*/arc_easy", "*/ai2_arc/arc-easy", "*/ai2_arc/ARC-Easy"),
    "MNLI": ("*/mnli", "*/glue/mnli", "*/mnli_matched", "*/mnli_mismatched"),
    "Winogrande": ("*/winogrande", "*/winogrande/*"),
    "OpenBookQA": ("*/openbookqa", "*/openbookqa/*"),
    "COPA": ("*/copa", "*/super_glue/copa", "*_copa_*"),
    "BoolQ": ("*/bool_q", "*/boolq", "*/super_glue/boolq"),
    "RACE": ("*/race/*", "*/race", "*_race_*"),
    "StrategyQA": ("*/strategyqa", "*/strategy_qa", "*_strategyqa_*"),
}
_Z = 1.959964  # 97.5 % quantile of the standard normal distribution
_KEPT = 4096  # examples whose draws are cached for the next metric, shot or copy: 32 MB with RESAMPLES draws


class Series(NamedTuple):
    """A metric on one sub-task, per raw example: its value is sum(sums) / sum(counts)."""

    sums: Sequence[float]
    counts: Sequence[float]  # records, or target tokens for the loss
    examples: Sequence[str]  # names of the raw examples, the same in every benchmark that has them


class Leaf(NamedTuple):
    """A sub-task with one number of demonstrations."""

    task: str  # benchmark/name
    benchmark: str
    category: str
    level: int | None
    num_shots: int
    primary: str  # the metric used as its score
    series: dict[str, Series]
    chance: dict[str, float | None]  # by metric, of an answer that ignores the question; None if undefined
    constant: dict[str, float | None]  # by metric, of the best single answer to all


class Drawn(NamedTuple):
    """A value and its bootstrap draws (R,)."""

    value: float
    draws: np.ndarray
    num_samples: int  # raw examples behind it
    chance: float | None
    constant: float | None
    chance_variance: float  # of the value if answers were at chance; 0 if chance is undefined

    def estimate(self, confidence: float = CONFIDENCE) -> Estimate:
        tail = (1.0 - confidence) / 2
        low, high = np.quantile(self.draws, [tail, 1.0 - tail])
        return Estimate(self.value, float(low), float(high), self.num_samples)


class Group(NamedTuple):
    """A task, category or level with some number of demonstrations; None is the mean over those numbers."""

    kind: str  # one of KINDS
    level: int | None
    name: str  # of the task or category; from LEVELS
    category: str  # of a task; its own name for a category; empty for a level
    num_shots: int | None
    figures: dict[str, Drawn]  # by metric; "score" is each task's primary metric

    @property
    def key(self) -> tuple[str, int | None, str, str, int | None]:
        """Identifies the group across evaluations."""
        return self.kind, self.level, self.category, self.name, self.num_shots


class SameTask:
    """The name shared by the sub-tasks and copies of a task."""

    def __init__(self, patterns: Mapping[str, Iterable[str]] = SAME_TASK) -> None:
        """patterns: name -> shell patterns over benchmark/name."""
        self._patterns = {name: tuple(values) for name, values in patterns.items()}

    @classmethod
    def load(cls, path: Path) -> SameTask:
        """Read a YAML file, name to list of patterns; its entries take precedence over SAME_TASK."""
        table = read_yaml(path)
        if not isinstance(table, dict) or not all(
            isinstance(name, str) and isinstance(value, list) and all(isinstance(item, str) for item in value)
            for name, value in table.items()
        ):
            raise ValueError(f"{path} must map names of tasks to lists of patterns over benchmark/task")
        return cls({**table, **{name: value for name, value in SAME_TASK.items() if name not in table}})

    def of(self, task: str) -> str:
        for name, patterns in self._patterns.items():
            if any(fnmatchcase(task, pattern) for pattern in patterns):
                return name
        return task.partition("/")[2] or task


def draw(leaf: Leaf, metric: str, name: str, *, seed: int = 0, resamples: int = RESAMPLES) -> Drawn:
    """The value of one sub-task, resampled over its raw examples.

    name: as `SameTask.of`, shared with copies in other benchmarks. Raises ValueError if nothing was scored.
    """
    series = leaf.series[metric]
    total = sum(series.counts)
    if not total:
        raise ValueError(f"task {leaf.task} has no scored example for {metric}")
    sums, counts = np.zeros(resamples), np.zeros(resamples)
    for value, count, example in zip(series.sums, series.counts, series.examples, strict=True):
        times = _times(name, example, seed, resamples)
        sums += value * times
        counts += count * times
    value = math.fsum(series.sums) / total
    draws = np.full(resamples, value)  # a draw without examples (one in e^n) counts as holding all
    np.divide(sums, counts, out=draws, where=counts > 0)
    chance = leaf.chance.get(metric)
    # of all scores in [0, 1] with this mean, right-or-wrong has the largest variance
    variance = 0.0 if chance is None else chance * (1.0 - chance) / len(series.sums)
    return Drawn(value, draws, len(series.sums), chance, leaf.constant.get(metric), variance)


@lru_cache(maxsize=_KEPT)
def _times(name: str, example: str, seed: int, resamples: int) -> np.ndarray:
    """How often each draw (R,) contains a raw example of a task."""
    digest = hashlib.blake2b(f"{name}\0{example}".encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "big")]).poisson(1.0, resamples)


def mean_of(parts: Sequence[Drawn], *, same_examples: bool = False) -> Drawn:
    """Mean of the parts, draw by draw, and of their chance and constant values if all parts have them.

    same_examples: the parts share one set of raw examples, so the mean has no more of them, and the same chance
    variance as one part.
    """
    variance = float(np.mean([part.chance_variance for part in parts]))
    counts = [part.num_samples for part in parts]
    return Drawn(
        value=float(np.mean([part.value for part in parts])),
        draws=np.mean([part.draws for part in parts], axis=0),
        num_samples=max(counts) if same_examples else sum(counts),
        chance=_mean_or_none([part.chance for part in parts]),
        constant=_mean_or_none([part.constant for part in parts]),
        chance_variance=variance if same_examples else variance / len(parts),
    )


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def aggregate(
    leaves: Sequence[Leaf], task_name: Callable[[str], str], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[Group]:
    """Tasks, then categories, then levels, for each number of demonstrations and, if several, for their mean.

    task_name: benchmark/name -> the name that sub-tasks and copies share, as `SameTask.of`. Tasks of one category at
    different levels are kept apart.
    """
    figures: list[tuple[tuple[Any, ...], dict[str, Drawn]]] = []
    for leaf in leaves:
        name = task_name(leaf.task)
        drawn = {metric: draw(leaf, metric, name, seed=seed, resamples=resamples) for metric in leaf.series}
        drawn["score"] = drawn[leaf.primary]
        path = (leaf.num_shots, leaf.level, leaf.category, name, leaf.benchmark)
        figures.append((path, drawn))
    in_benchmarks = _means(figures, lambda path: path)
    tasks = _means(in_benchmarks, lambda path: path[:4], same_examples=True)
    categories = _means(tasks, lambda path: path[:3])
    levels = _means(categories, lambda path: path[:2])
    groups = []
    for kind, found in zip(KINDS, (tasks, categories, levels), strict=True):
        if len({path[0] for path, _ in found}) > 1:
            # a task that lacks some number of demonstrations has no mean over them
            numbers = {path[0] for path, _ in found}
            mean = _means(found, lambda path: (None, *path[1:]), same_examples=True)
            counts = {path: sum(other[1:] == path[1:] for other, _ in found) for path, _ in mean}
            found = found + [(path, figure) for path, figure in mean if counts[path] == len(numbers)]
        groups += [_group(kind, path, figure) for path, figure in found]
    return groups


def _means(
    figures: list[tuple[tuple[Any, ...], dict[str, Drawn]]],
    key: Callable[[tuple[Any, ...]], tuple[Any, ...]],
    *,
    same_examples: bool = False,
) -> list[tuple[tuple[Any, ...], dict[str, Drawn]]]:
    """The mean over equal keys, metric by metric, over the parts that have the metric."""
    members: dict[tuple[Any, ...], dict[str, list[Drawn]]] = {}
    for path, found in figures:
        for metric, drawn in found.items():
            members.setdefault(key(path), {}).setdefault(metric, []).append(drawn)
    return [
        (path, {metric: mean_of(parts, same_examples=same_examples) for metric, parts in by.items()})
        for path, by in members.items()
    ]


def _group(kind: str, path: tuple[Any, ...], figures: dict[str, Drawn]) -> Group:
    num_shots, level, *rest = path
    name = rest[-1] if rest else level_name(level)
    return Group(kind, level, name, rest[0] if rest else "", num_shots, figures)


def level_name(level: int | None) -> str:
    return NO_LEVEL if level is None else LEVELS[level]


def verdict(drawn: Drawn) -> str:
    """Whether a value is "above" or "below" chance, or "not above"; "" if chance is undefined.

    Its interval must exclude chance, and so must an interval around chance: a few examples that are all right or all
    wrong have a zero-width bootstrap interval, and may be luck.
    """
    if drawn.chance is None:
        return ""
    estimate, distance = drawn.estimate(), drawn.value - drawn.chance
    margin = _Z * drawn.chance_variance**0.5 + 0.5 / drawn.num_samples  # normal, with continuity correction
    if estimate.low > drawn.chance and distance > margin:
        return "above"
    return "below" if estimate.high < drawn.chance and distance < -margin else "not above"
