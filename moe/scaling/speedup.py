"""The paper's speedup factor: what the dense family must spend to reach a metric, over what the sparse family spends.

    c(t): between the two neighbouring models of a family, one worse and one better than t, the metric is linear in
    log cost;                    speedup(t) = c_dense(t) / c_sparse(t)                             (Artetxe et al. 2021)

No extrapolation: without a model on either side c(t) is undefined, and `Unbracketed` says which side is missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """One trained model, or the mean over its seeds."""

    cost: float  # FLOPs, seconds or bytes
    metric: float
    name: str = ""


class Reached(NamedTuple):
    """What a family spends to reach a metric."""

    cost: float
    worse: str  # the neighbours it lies between; equal if a model has exactly that metric
    better: str


class Unbracketed(NamedTuple):
    """A metric outside the family's range."""

    reason: str


def frontier(family: Sequence[Point], *, lower_is_better: bool = True) -> list[Point]:
    """The models that are better than every cheaper one, cheapest first: nobody would train the others.

    On the frontier cost and metric are monotonic, so a metric has one cost. Of equal costs the better model is kept.
    """
    sign = 1.0 if lower_is_better else -1.0
    kept: list[Point] = []
    for point in sorted(family, key=lambda each: (each.cost, sign * each.metric)):
        if not kept or sign * point.metric < sign * kept[-1].metric:
            kept.append(point)
    return kept


def cost_to_reach(target: float, family: Sequence[Point], *, lower_is_better: bool = True) -> Reached | Unbracketed:
    """The cost at which `family`, on its frontier, reaches `target`; linear in the metric, logarithmic in cost.

    Raises ValueError for a cost that is not positive and finite, and for a metric that is not finite.
    """
    for point in family:
        if not (point.cost > 0 and math.isfinite(point.cost) and math.isfinite(point.metric)):
            raise ValueError(f"the point {point} must have a cost above 0 and a finite metric")
    if not math.isfinite(target):
        raise ValueError(f"the target ({target}) must be finite")
    points = frontier(family, lower_is_better=lower_is_better)
    if not points:
        return Unbracketed("not bracketed: the family has no models")
    sign = 1.0 if lower_is_better else -1.0
    goal, values = sign * target, [sign * point.metric for point in points]  # decreasing
    if goal > values[0]:
        return Unbracketed(f"not bracketed: no model is worse than {target:.6g} ({points[0].metric:.6g} is the worst)")
    if goal < values[-1]:
        return Unbracketed(f"not bracketed: no model is better than {target:.6g} ({points[-1].metric:.6g} is the best)")
    for index, point in enumerate(points):
        if values[index] == goal:
            return Reached(point.cost, point.name, point.name)
        if values[index] < goal:
            worse = points[index - 1]
            share = (goal - values[index - 1]) / (values[index] - values[index - 1])
            log_cost = math.log(worse.cost) + share * (math.log(point.cost) - math.log(worse.cost))
            return Reached(math.exp(log_cost), worse.name, point.name)
    raise AssertionError("a bracketed target lies between two points")


def speedup(
    target: float, dense: Sequence[Point], sparse: Sequence[Point], *, lower_is_better: bool = True
) -> float | Unbracketed:
    """c_dense(target) / c_sparse(target); above 1, the sparse family needs less."""
    of_dense = cost_to_reach(target, dense, lower_is_better=lower_is_better)
    of_sparse = cost_to_reach(target, sparse, lower_is_better=lower_is_better)
    if isinstance(of_dense, Unbracketed):
        return Unbracketed(f"dense: {of_dense.reason}")
    if isinstance(of_sparse, Unbracketed):
        return Unbracketed(f"sparse: {of_sparse.reason}")
    return of_dense.cost / of_sparse.cost


class Curve(NamedTuple):
    """Speedup as a function of what the dense family spends: the paper's figure 1."""

    dense_cost: list[float]
    speedup: list[float]
    target: list[float]  # the metric both reach at these costs


def curve(dense: Sequence[Point], sparse: Sequence[Point], *, lower_is_better: bool = True, points: int = 33) -> Curve:
    """Evenly spaced over the metrics that both families bracket, plus those of the models themselves; may be empty."""
    fronts = [frontier(family, lower_is_better=lower_is_better) for family in (dense, sparse)]
    if not all(fronts):
        return Curve([], [], [])
    ranges = [sorted((front[0].metric, front[-1].metric)) for front in fronts]
    low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
    if low > high:
        return Curve([], [], [])
    own = [point.metric for front in fronts for point in front if low <= point.metric <= high]
    found = Curve([], [], [])
    for target in sorted({*np.linspace(low, high, points).tolist(), *own}):
        # rounding at the grid's ends must not move a target outside
        of_dense = cost_to_reach(min(max(target, low), high), dense, lower_is_better=lower_is_better)
        of_sparse = cost_to_reach(min(max(target, low), high), sparse, lower_is_better=lower_is_better)
        assert isinstance(of_dense, Reached) and isinstance(of_sparse, Reached)
        found.dense_cost.append(of_dense.cost)
        found.speedup.append(of_dense.cost / of_sparse.cost)
        found.target.append(target)
    return found


class SpeedupInterval(NamedTuple):
    """A percentile interval over resamples, and the share of them that bracketed the target."""

    low: float | None  # None: fewer than half of the resamples are bracketed, and a quantile of the rest would mislead
    high: float | None
    bracketed: float  # share of the resamples
    resamples: int


def interval(draws: Sequence[float | Unbracketed], confidence: float = 0.95) -> SpeedupInterval:
    """Summarise resampled speedups. Unbracketed ones are counted, not dropped silently."""
    values = [draw for draw in draws if not isinstance(draw, Unbracketed)]
    share = len(values) / len(draws) if draws else 0.0
    if share < 0.5:
        return SpeedupInterval(None, None, share, len(draws))
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return SpeedupInterval(float(low), float(high), share, len(draws))
