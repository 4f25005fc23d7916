"""Power laws of loss in compute, with intervals over seeds.

    L(C) = a * (C / C0)^-b + c,   C0 the geometric mean of the costs, c the irreducible loss (or 0)

For a given c the law is a straight line in log space. The line's squared error, in log L, is minimised over c by nested
grids, so the result depends on no starting point and no solver.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FEWEST = {False: 3, True: 5}  # points of distinct cost: one more than the parameters, two with an offset
_GRID = 129  # offsets per grid; the grid is refined eight times around the best
_REFINEMENTS = 8


class PowerLaw(NamedTuple):
    """A fitted power law."""

    amplitude: float  # a, in units of the loss
    exponent: float  # b
    offset: float  # c
    scale: float  # C0, in units of the cost
    residual: float  # root mean squared error in log loss

    def __call__(self, cost: float) -> float:
        """The predicted loss at a cost."""
        return float(self.amplitude * (cost / self.scale) ** -self.exponent + self.offset)


class FitInterval(NamedTuple):
    """A law fitted to the means over seeds, with percentile intervals over resampled seeds."""

    law: PowerLaw
    exponent: tuple[float, float]
    offset: tuple[float, float]
    resamples: int
    fewest_seeds: int  # smallest number of any point: intervals from one or two seeds say little


def fit_power_law(costs: Sequence[float], losses: Sequence[float], *, with_offset: bool = False) -> PowerLaw:
    """Least squares in log loss. Raises ValueError for too few points, and for values not finite and above 0."""
    cost, loss = np.asarray(costs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if cost.shape != loss.shape or cost.ndim != 1:
        raise ValueError(f"costs {cost.shape} and losses {loss.shape} must be two lists of one length")
    distinct = len(set(costs))
    if distinct < FEWEST[with_offset]:
        kind = "with an offset" if with_offset else "without an offset"
        raise ValueError(f"a power law {kind} needs {FEWEST[with_offset]} different costs, not {distinct}")
    if not (np.isfinite(loss).all() and np.isfinite(cost).all() and (cost > 0).all() and (loss > 0).all()):
        bad = next(pair for pair in zip(costs, losses, strict=True) if not all(0.0 < x < math.inf for x in pair))
        raise ValueError(
            f"costs and losses must be finite and above 0, not {bad[0]} and {bad[1]}: leave this point out"
        )
    scale = math.exp(np.log(cost).mean())
    x, smallest = np.log(cost / scale), float(loss.min())
    offset = 0.0
    if with_offset:
        low, high = 0.0, smallest * (1 - 1e-9)
        for _ in range(_REFINEMENTS):
            grid = np.linspace(low, high, _GRID)
            best = int(np.argmin(_lines(x, loss, grid)[2]))
            low, high = grid[max(0, best - 1)], grid[min(_GRID - 1, best + 1)]
        offset = float(grid[best])
    intercept, slope, error = (float(each[0]) for each in _lines(x, loss, np.array([offset])))
    return PowerLaw(math.exp(intercept), -slope, offset, scale, math.sqrt(error))


def fit_with_intervals(
    costs: Sequence[float],
    losses: Sequence[Sequence[float]],
    *,
    with_offset: bool = False,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> FitInterval:
    """Fit the means over seeds, with percentile intervals over seeds resampled for every cost.

    losses: for each cost, one per seed.
    """
    if len(costs) != len(losses) or not all(losses):
        raise ValueError("every cost needs at least one loss")
    law = fit_power_law(costs, [float(np.mean(each)) for each in losses], with_offset=with_offset)
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        means = [float(np.mean(generator.choice(np.asarray(each), len(each)))) for each in losses]
        drawn = fit_power_law(costs, means, with_offset=with_offset)
        draws.append((drawn.exponent, drawn.offset))
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(np.array(draws), [tail, 1.0 - tail], axis=0)
    return FitInterval(
        law,
        (float(low[0]), float(high[0])),
        (float(low[1]), float(high[1])),
        resamples,
        min(len(each) for each in losses),
    )


def _lines(x: np.ndarray, loss: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit log(L - c) = intercept + slope x for each offset c; also return the mean squared error in log L.

    x, loss: (N,); offsets and the results: (M,).
    """
    y = np.log(loss - offsets[:, None])  # (M, N)
    centred = x - x.mean()
    slope = (y * centred).sum(axis=1) / (centred**2).sum()
    intercept = y.mean(axis=1) - slope * x.mean()
    predicted = np.exp(intercept[:, None] + slope[:, None] * x) + offsets[:, None]
    return intercept, slope, ((np.log(predicted) - np.log(loss)) ** 2).mean(axis=1)
