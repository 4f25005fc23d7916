"""Compares evaluations of the same records: what tuning changed, in which model it changed more, and how certainly.

The bootstrap draws of `moe.instruct.evaluation.aggregation` hold the same raw examples in every evaluation, so
differences are taken draw by draw. With several seeds of a model, a draw also resamples seeds, the same ones before and
after tuning if there are equally many; few seeds give intervals that are too narrow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.evaluation.results import CONFIDENCE, RESAMPLES, Estimate
from moe.instruct.evaluation.aggregation import Drawn, Group, Leaf, Series, aggregate

LOSS = "loss"  # the only metric of which less is better
Key = tuple[str, int | None, str, str, int | None]  # of a group
_SAME = ("protocol", "rouge", "benchmark", "seed")  # fields of results.json that must agree for values to be comparable
_NOTED = ("precision", "max_seq_len", "leading_separator")


class Source(NamedTuple):
    """One evaluation, with its model and stage."""

    model: str
    stage: str  # "" for a model with a single stage
    path: Path
    results: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{self.model} {self.stage}".strip()


class Arm(NamedTuple):
    """A model at a stage, over its seeds."""

    model: str
    stage: str
    num_seeds: int
    groups: dict[Key, dict[str, Drawn]]
    spread: dict[Key, dict[str, tuple[float, float]]]  # smallest and largest value over seeds

    @property
    def label(self) -> str:
        return f"{self.model} {self.stage}".strip()


class Difference(NamedTuple):
    """How much better `name` is than `than` in a group; above 0 is better for every metric, including the loss."""

    name: str
    than: str
    key: Key
    metric: str
    estimate: Estimate

    @property
    def says(self) -> str:
        """ "more", "less", or "no difference" if the interval contains 0."""
        if self.estimate.low > 0:
            return "more"
        return "less" if self.estimate.high < 0 else "no difference"


class Comparison(NamedTuple):
    """Everything in a report."""

    arms: list[Arm]
    gains: list[Difference]  # for each model with two stages, the later against the earlier
    gain_differences: list[Difference]  # each further model's gain against the first one's
    differences: list[Difference]  # models with one stage against the first of them
    notes: list[str]  # how the evaluations differ although their scores are comparable


def parse_source(text: str) -> Source:
    """`[MODEL[:STAGE]=]PATH`; the model defaults to the folder's name. Raises ValueError if it is no evaluation."""
    name, equals, rest = text.partition("=")
    path = Path(rest if equals else text)
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give folders that `moe instruct eval` wrote, as MODEL:STAGE=FOLDER")
    model, _, stage = (name if equals else file.parent.name).partition(":")
    if not model:
        raise ValueError(f"{text!r} names no model; write MODEL:STAGE=FOLDER, as dense:before=evaluations/dense")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(results, dict) or results.get("kind") != "instruct":
        raise ValueError(f"{file} is not the results.json of `moe instruct eval`")
    unnamed = [
        name for name, task in results["tasks"].items() if not all("examples" in s for s in task["series"].values())
    ]
    if unnamed:
        raise ValueError(
            f"{file} does not name the raw examples of task {unnamed[0]} (field series.*.examples), by which copies "
            f"of a task are drawn together: it is of an earlier version; evaluate again with `moe instruct eval`"
        )
    return Source(model, stage, file, results)


def compare(sources: Sequence[Source], *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Values of each model and stage over its seeds, and all differences.

    Raises ValueError if evaluations differ in protocol, benchmark, tasks or records, naming the two files and the
    difference, and for a model with more than two stages.
    """
    if not sources:
        raise ValueError("there is nothing to report: give at least one folder that `moe instruct eval` wrote")
    for source in sources[1:]:
        _require_same(sources[0], source)
    notes = [
        f"{field} differs: {', '.join(sorted({str(source.results.get(field)) for source in sources}))}"
        for field in _NOTED
        if len({source.results.get(field) for source in sources}) > 1
    ]
    one_tokenizer = len({source.results.get("tokenizer_sha256") for source in sources}) == 1
    if not one_tokenizer:
        notes.append("the tokenizers differ, so losses by token do not compare and are left out")
    members: dict[tuple[str, str], list[list[Group]]] = {}
    for source in sources:
        leaves, names = _leaves(source.results, with_loss=one_tokenizer)
        groups = aggregate(leaves, names, seed=seed, resamples=resamples)
        members.setdefault((source.model, source.stage), []).append(groups)
    arms = [_arm(model, stage, seeds, seed) for (model, stage), seeds in members.items()]
    by_model: dict[str, list[Arm]] = {}
    for arm in arms:
        by_model.setdefault(arm.model, []).append(arm)
    many = [f"{model} ({', '.join(arm.stage for arm in own)})" for model, own in by_model.items() if len(own) > 2]
    if many:
        raise ValueError(f"{many[0]} has more than two stages; report on two at a time")
    tuned = {model: _minus(own[1].groups, own[0].groups) for model, own in by_model.items() if len(own) == 2}
    single = {model: own[0].groups for model, own in by_model.items() if len(own) == 1}
    gains = [
        difference
        for model, drawn in tuned.items()
        for difference in _differences(model, by_model[model][1].stage, by_model[model][0].stage, drawn)
    ]
    return Comparison(arms, gains, _against_first(tuned), _against_first(single, oriented=False), notes)


def _against_first(found: dict[str, dict[Key, dict[str, Drawn]]], *, oriented: bool = True) -> list[Difference]:
    """Each model against the first. oriented: more is already better."""
    models = list(found)
    differences = []
    for other in models[1:]:
        drawn = _minus(found[other], found[models[0]], turn_loss=not oriented)
        differences += _differences("", other, models[0], drawn)
    return differences


def _differences(prefix: str, name: str, than: str, drawn: dict[Key, dict[str, Drawn]]) -> list[Difference]:
    front = f"{prefix} " if prefix else ""
    return [
        Difference(f"{front}{name}", f"{front}{than}", key, metric, figure.estimate(CONFIDENCE))
        for key, figures in drawn.items()
        for metric, figure in figures.items()
    ]


def _minus(
    later: dict[Key, dict[str, Drawn]], earlier: dict[Key, dict[str, Drawn]], *, turn_loss: bool = True
) -> dict[Key, dict[str, Drawn]]:
    found: dict[Key, dict[str, Drawn]] = {}
    for key, figures in later.items():
        for metric, one in figures.items():
            other = earlier[key][metric]
            sign = -1.0 if metric == LOSS and turn_loss else 1.0
            value, draws = sign * (one.value - other.value), sign * (one.draws - other.draws)
            # a difference is judged by its interval alone: it has no verdict against chance
            found.setdefault(key, {})[metric] = Drawn(value, draws, one.num_samples, None, None, 0.0)
    return found


def _arm(model: str, stage: str, seeds: list[list[Group]], seed: int) -> Arm:
    """The mean over seeds; a draw takes as many seeds as there are, with replacement."""
    groups: dict[Key, dict[str, Drawn]] = {}
    spread: dict[Key, dict[str, tuple[float, float]]] = {}
    by_key = [{group.key: group.figures for group in found} for found in seeds]
    for key, figures in by_key[0].items():
        for metric, first in figures.items():
            drawn = [found[key][metric] for found in by_key]
            values = [each.value for each in drawn]
            draws = np.stack([each.draws for each in drawn])  # (seeds, R)
            if len(drawn) > 1:
                # the same seeds before and after tuning; another model draws others
                generator = np.random.default_rng([seed, len(drawn), int.from_bytes(model.encode(), "big")])
                chosen = generator.integers(0, len(drawn), draws.shape)
                draws = np.take_along_axis(draws, chosen, axis=0)
            # seeds answer the same questions, so the chance variance is that of one
            combined = first._replace(value=float(np.mean(values)), draws=draws.mean(axis=0))
            groups.setdefault(key, {})[metric] = combined
            spread.setdefault(key, {})[metric] = (min(values), max(values))
    return Arm(model, stage, len(seeds), groups, spread)


def _leaves(results: dict[str, Any], *, with_loss: bool) -> tuple[list[Leaf], Callable[[str], str]]:
    """The sub-tasks of results.json, and the names they were merged under."""
    leaves = [
        Leaf(
            task=entry["task"],
            benchmark=entry["benchmark"],
            category=entry["category"],
            level=entry["level"],
            num_shots=entry["num_fewshot"],
            primary=entry["primary"],
            series={
                metric: Series(**series) for metric, series in entry["series"].items() if with_loss or metric != LOSS
            },
            chance=entry["chance"],
            constant=entry["constant"],
        )
        for entry in results["tasks"].values()
    ]
    names = {entry["task"]: entry["same_task"] for entry in results["tasks"].values()}
    return leaves, names.__getitem__


def _require_same(first: Source, other: Source) -> None:
    pair = f"{first.path} and {other.path}"
    for field in _SAME:
        differing = _differing(field, first.results.get(field), other.results.get(field))
        if differing:
            raise ValueError(f"{pair} cannot be compared: {differing}; evaluate both with the same settings")
    ours, theirs = first.results["tasks"], other.results["tasks"]
    lone = sorted(ours.keys() ^ theirs.keys())
    if lone:
        raise ValueError(f"{pair} cannot be compared: only one of them has {', '.join(lone[:5])}")
    for name in ours:
        for field in ("records_sha256", "level", "same_task"):
            if ours[name][field] != theirs[name][field]:
                what = "was scored on other records" if field == "records_sha256" else f"has another {field}"
                raise ValueError(f"{pair} cannot be compared: task {name} {what}; evaluate both on the same data")


def _differing(field: str, one: Any, other: Any) -> str:
    """The differences in a field, key by key if both are mappings; empty if they are equal."""
    if one == other:
        return ""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return f"{field} is {one!r} and {other!r}"
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return "; ".join(f"{field}.{key} is {one.get(key)!r} and {other.get(key)!r}" for key in keys)
