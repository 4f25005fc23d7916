"""Power laws that are known, and scipy's least squares as the oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe.scaling.fits import fit_power_law, fit_with_intervals

COSTS = [1e12, 3e12, 1e13, 4e13, 1e14, 6e14]
EXACT = 1e-9  # relative, of a law without noise and without an offset
SEARCHED = 1e-4  # relative, of an offset that is searched on grids


def law(cost: float, exponent: float, offset: float) -> float:
    return 3.0 * (cost / 1e13) ** -exponent + offset


def test_a_known_law_without_offset() -> None:
    fit = fit_power_law(COSTS[:3], [law(cost, 0.1, 0.0) for cost in COSTS[:3]])
    assert fit.exponent == pytest.approx(0.1, rel=EXACT)
    assert fit.offset == 0.0 and fit.residual < EXACT
    assert fit.scale == pytest.approx(math.exp(np.log(COSTS[:3]).mean()), rel=EXACT)
    assert fit.amplitude == pytest.approx(law(fit.scale, 0.1, 0.0), rel=EXACT)
    assert fit(7e13) == pytest.approx(law(7e13, 0.1, 0.0), rel=EXACT)


def test_a_known_law_with_offset() -> None:
    losses = [law(cost, 0.3, 1.7) for cost in COSTS]
    fit = fit_power_law(COSTS, losses, with_offset=True)
    assert fit.exponent == pytest.approx(0.3, rel=SEARCHED)
    assert fit.offset == pytest.approx(1.7, rel=SEARCHED)
    assert fit_power_law(COSTS, losses).residual > 100 * fit.residual


def test_scipy_finds_no_better_law() -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is the oracle of fits")
    noise = np.random.default_rng(1).normal(0, 0.01, len(COSTS))
    losses = np.array([law(cost, 0.3, 1.7) for cost in COSTS]) * np.exp(noise)
    fit = fit_power_law(COSTS, losses.tolist())
    x = np.log(np.array(COSTS) / fit.scale)
    slope, intercept = np.polyfit(x, np.log(losses), 1)
    assert fit.exponent == pytest.approx(-slope, rel=EXACT)
    assert fit.amplitude == pytest.approx(math.exp(intercept), rel=EXACT)

    def line(c: float) -> float:
        coefficients = np.polyfit(x, np.log(losses - c), 1)
        return float(np.mean((np.log(np.exp(np.polyval(coefficients, x)) + c) - np.log(losses)) ** 2))

    best = optimize.minimize_scalar(
        line, bounds=(0.0, losses.min() * (1 - 1e-9)), method="bounded", options={"xatol": 1e-9}
    )
    ours = fit_power_law(COSTS, losses.tolist(), with_offset=True)
    assert ours.residual**2 <= best.fun * (1 + SEARCHED)
    assert ours.offset == pytest.approx(best.x, rel=1e-3)


def test_intervals_hold_the_law_and_narrow_with_agreement() -> None:
    random = np.random.default_rng(0)
    widths = []
    for spread in (0.02, 0.002):
        losses = [[law(cost, 0.2, 0.0) * math.exp(random.normal(0, spread)) for _ in range(5)] for cost in COSTS]
        fit = fit_with_intervals(COSTS, losses, resamples=200)
        low, high = fit.exponent
        assert low < fit.law.exponent < high
        assert low - spread < 0.2 < high + spread
        widths.append(high - low)
        assert fit.fewest_seeds == 5
    assert widths[1] < widths[0] / 3


def test_one_seed_has_no_width() -> None:
    fit = fit_with_intervals(COSTS, [[law(cost, 0.2, 0.0)] for cost in COSTS], resamples=20)
    assert fit.exponent == pytest.approx((0.2, 0.2), rel=EXACT) and fit.fewest_seeds == 1


@pytest.mark.parametrize(
    ("costs", "losses", "with_offset", "words"),
    [
        ([1.0, 2.0], [3.0, 2.0], False, "needs 3 different costs, not 2"),
        ([1.0, 1.0, 2.0], [3.0, 3.1, 2.0], False, "needs 3 different costs, not 2"),
        ([1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 1.5, 1.2], True, "needs 5 different costs, not 4"),
        ([1.0, 2.0, 3.0], [3.0, math.nan, 1.0], False, "finite and above 0"),
        ([0.0, 2.0, 3.0], [3.0, 2.0, 1.0], False, "finite and above 0"),
        ([1.0, 2.0, 3.0], [3.0, 2.0], False, "one length"),
    ],
)
def test_what_cannot_be_fitted(costs: list[float], losses: list[float], with_offset: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_power_law(costs, losses, with_offset=with_offset)


def test_a_cost_without_losses() -> None:
    with pytest.raises(ValueError, match="at least one loss"):
        fit_with_intervals(COSTS[:3], [[1.0], [], [1.0]])
