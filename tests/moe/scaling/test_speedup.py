"""The paper's interpolation on families that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.scaling.speedup import Point, Reached, Unbracketed, cost_to_reach, curve, frontier, interval, speedup

TOLERANCE = 1e-12  # relative, of a few float64 operations
DENSE = [Point(1e9, 30.0, "small"), Point(1e11, 20.0, "large")]


def test_linear_in_the_metric_and_logarithmic_in_cost() -> None:
    found = cost_to_reach(25.0, DENSE)
    assert isinstance(found, Reached)
    assert found.cost == pytest.approx(1e10, rel=TOLERANCE)  # the geometric mean, not 5.05e10
    assert (found.worse, found.better) == ("small", "large")
    assert cost_to_reach(27.5, DENSE).cost == pytest.approx(1e9 * 100**0.25, rel=TOLERANCE)


def test_the_scale_of_the_metric_matters() -> None:
    """Halfway in log-perplexity is not halfway in perplexity."""
    logs = [point._replace(metric=math.log(point.metric)) for point in DENSE]
    middle = math.sqrt(30.0 * 20.0)
    assert cost_to_reach(math.log(middle), logs).cost == pytest.approx(1e10, rel=TOLERANCE)
    assert cost_to_reach(middle, DENSE).cost > 1.02e10


def test_accuracies_rise() -> None:
    dense = [Point(1.0, 40.0, "a"), Point(100.0, 60.0, "b")]
    assert cost_to_reach(50.0, dense, lower_is_better=False).cost == pytest.approx(10.0, rel=TOLERANCE)
    assert isinstance(cost_to_reach(61.0, dense, lower_is_better=False), Unbracketed)
    assert isinstance(cost_to_reach(39.0, dense, lower_is_better=False), Unbracketed)


def test_a_model_brackets_itself() -> None:
    for point in DENSE:
        assert cost_to_reach(point.metric, DENSE) == Reached(point.cost, point.name, point.name)


@pytest.mark.parametrize(
    ("target", "family", "words"),
    [
        (30.1, DENSE, "no model is worse than 30.1"),
        (19.9, DENSE, "no model is better than 19.9"),
        (19.999999, DENSE, "no model is better"),
        (25.0, DENSE[:1], "no model is better"),
        (25.0, [], "the family has no models"),
    ],
)
def test_nothing_is_extrapolated(target: float, family: list[Point], words: str) -> None:
    found = cost_to_reach(target, family)
    assert isinstance(found, Unbracketed)
    assert "not bracketed" in found.reason and words in found.reason


def test_a_family_that_is_not_monotonic_counts_by_its_frontier() -> None:
    """The model that costs more and is worse than a cheaper one is nobody's choice, so it bounds nothing."""
    bumpy = [
        Point(1.0, 30.0, "a"),
        Point(10.0, 35.0, "worse"),
        Point(100.0, 20.0, "c"),
        Point(100.0, 25.0, "twin of c"),
    ]
    assert [point.name for point in frontier(bumpy)] == ["a", "c"]
    assert cost_to_reach(25.0, bumpy) == cost_to_reach(25.0, [bumpy[0], bumpy[2]])
    assert isinstance(cost_to_reach(32.0, bumpy), Unbracketed)


def test_neighbours_are_used_and_not_the_ends() -> None:
    family = [Point(1.0, 40.0, "a"), Point(10.0, 30.0, "b"), Point(1000.0, 28.0, "c")]
    found = cost_to_reach(29.0, list(reversed(family)))
    assert found == Reached(pytest.approx(100.0, rel=TOLERANCE), "b", "c")


def test_speedup_is_the_ratio_of_costs() -> None:
    sparse = [Point(2e9, 25.0, "8e"), Point(4e10, 19.0, "8e large")]
    assert speedup(25.0, DENSE, sparse) == pytest.approx(5.0, rel=TOLERANCE)
    assert speedup(25.0, sparse, DENSE) == pytest.approx(0.2, rel=TOLERANCE)
    missing = speedup(19.5, DENSE, sparse)
    assert isinstance(missing, Unbracketed) and missing.reason.startswith("dense: ")
    missing = speedup(26.0, DENSE, sparse)
    assert isinstance(missing, Unbracketed) and missing.reason.startswith("sparse: ")


def test_the_curve_covers_what_both_enclose() -> None:
    """Sparse models that are everywhere 4 times cheaper: the curve is flat, and ends where a family ends."""
    sparse = [point._replace(cost=point.cost / 4) for point in DENSE]
    found = curve(DENSE, [*sparse, Point(1e12, 10.0, "beyond")], points=5)
    assert found.speedup == pytest.approx([4.0] * len(found.speedup), rel=TOLERANCE)
    assert min(found.target) == 20.0 and max(found.target) == 30.0
    assert max(found.dense_cost) == 1e11
    assert curve(DENSE, [Point(1.0, 5.0), Point(2.0, 4.0)]).speedup == []
    assert curve([], DENSE).speedup == []


@pytest.mark.parametrize("bad", [Point(0.0, 3.0), Point(-1.0, 3.0), Point(1.0, math.nan), Point(math.inf, 3.0)])
def test_points_that_are_none(bad: Point) -> None:
    with pytest.raises(ValueError, match="must have a cost above 0 and a finite metric"):
        cost_to_reach(25.0, [*DENSE, bad])


def test_a_target_that_is_none() -> None:
    with pytest.raises(ValueError, match="target"):
        cost_to_reach(math.nan, DENSE)


def test_resamples_out_of_the_bracket_are_counted() -> None:
    found = interval([1.0, 2.0, 3.0, Unbracketed("not bracketed")])
    assert found.bracketed == 0.75 and found.resamples == 4
    assert found.low == pytest.approx(1.05) and found.high == pytest.approx(2.95)
    few = interval([1.0, *[Unbracketed("not bracketed")] * 2])
    assert (few.low, few.high) == (None, None) and few.bracketed == pytest.approx(1 / 3)
    assert interval([]).bracketed == 0.0


@given(
    costs=st.lists(st.floats(1.0, 1e20), min_size=2, max_size=8, unique=True),
    metrics=st.lists(st.floats(1.0, 100.0), min_size=8, max_size=8),
    share=st.floats(0.0, 1.0),
)
def test_a_cost_lies_between_those_of_its_neighbours(costs: list[float], metrics: list[float], share: float) -> None:
    family = [Point(cost, metric, str(i)) for i, (cost, metric) in enumerate(zip(costs, metrics, strict=False))]
    values = [point.metric for point in frontier(family)]
    target = min(values) + share * (max(values) - min(values))
    found = cost_to_reach(min(target, max(values)), family)
    assert isinstance(found, Reached)
    worse, better = family[int(found.worse)], family[int(found.better)]
    assert worse.cost * (1 - TOLERANCE) <= found.cost <= better.cost * (1 + 10 * TOLERANCE)
    assert better.metric <= target + 1e-9 and worse.metric >= target - 1e-9
