"""How often and in which order each source is read: shares, the epochs they imply, and the schedule.

A source is anything drawn by index: the windows of a language, the examples of a task.

    share_l ~ (multiplier_l * min(size_l, cap)) ** alpha      (Lin et al. 2021; the cap is that of T5 and FLAN mixtures)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moe.config.data import MixtureConfig


class SourcePlan(NamedTuple):
    """What a run will read of one source."""

    name: str
    size: int  # tokens available
    proportional: float  # share of all tokens
    share: float  # share of the tokens read
    drawn: float  # tokens to be read
    epochs: float  # drawn / size
    seen: float  # expected fraction of the source that is read at least once


def shares(
    sizes: Mapping[str, float],
    *,
    alpha: float = 1.0,
    multipliers: Mapping[str, float] | None = None,
    cap: float | None = None,
) -> dict[str, float]:
    """Sampling shares that sum to 1. alpha 1 is proportional to `sizes`, 0 is uniform.

    multipliers: XGLM's tiers, 1 for unlisted sources. cap: upper limit on the size a source counts with. Raises
    ValueError for a size that is not above 0 and for a multiplier of an unknown source.
    """
    multipliers = {} if multipliers is None else multipliers
    _require_known("data.mixture.multipliers", multipliers, sizes)
    empty = [name for name, size in sizes.items() if size <= 0]
    if empty or not sizes:
        raise ValueError(f"{empty[0] if empty else 'the mixture'} has no text to draw from; leave it out or give text")
    counted = {
        name: multipliers.get(name, 1.0) * (size if cap is None else min(size, cap)) for name, size in sizes.items()
    }
    largest = max(counted.values())  # powers of ratios, which cannot overflow
    powers = {name: (value / largest) ** alpha for name, value in counted.items()}
    total = math.fsum(powers.values())
    return {name: power / total for name, power in powers.items()}


def limit_epochs(
    given: Mapping[str, float], sizes: Mapping[str, float], total: float, max_epochs: float
) -> dict[str, float]:
    """Adjust shares so that no source is read more than `max_epochs` times in `total` draws.

    What a capped source loses goes to the others in proportion to their shares. Raises ValueError if all sources
    together do not hold enough.
    """
    limits = {name: max_epochs * sizes[name] / total for name in given}
    room = math.fsum(limits.values())
    if room < 1.0:
        raise ValueError(
            f"data.mixture.max_epochs ({max_epochs:g}) allows {room * total:,.0f} tokens, but the run reads "
            f"{total:,.0f}; raise it to {max_epochs / room:.3g} or more, train shorter, or give more text"
        )
    full: set[str] = set()
    while True:
        rest = 1.0 - math.fsum(limits[name] for name in full)
        weight = math.fsum(share for name, share in given.items() if name not in full)
        limited = {
            name: limits[name] if name in full else share / weight * max(rest, 0.0) for name, share in given.items()
        }
        over = {name for name, share in limited.items() if name not in full and share > limits[name]}
        if not over:
            return limited
        full |= over


def plan(config: MixtureConfig, sizes: Mapping[str, int], total_tokens: int) -> list[SourcePlan]:
    """What a run of `total_tokens` reads of each source, given the sources' token counts. Requires config.alpha.

    Raises ValueError for a source that data.mixture.tokens or multipliers name and the corpus lacks, for one that a
    non-empty data.mixture.tokens omits, and for a max_epochs that is too low.
    """
    assert config.alpha is not None
    counted: Mapping[str, float] = sizes
    if config.tokens:
        _require_known("data.mixture.tokens", config.tokens, sizes)
        _require_known("the corpus", sizes, config.tokens, "data.mixture.tokens")
        counted = {name: config.tokens[name] for name in sizes}
    wanted = shares(counted, alpha=config.alpha, multipliers=config.multipliers, cap=config.cap)
    if config.max_epochs is not None:
        wanted = limit_epochs(wanted, sizes, total_tokens, config.max_epochs)
    everything = sum(sizes.values())
    plans = []
    for name, share in wanted.items():
        drawn = share * total_tokens
        epochs = drawn / sizes[name]
        seen = -math.expm1(-epochs) if config.replacement else min(epochs, 1.0)
        plans.append(SourcePlan(name, sizes[name], sizes[name] / everything, share, drawn, epochs, seen))
    return plans


def table(plans: list[SourcePlan]) -> str:
    """The plans as lines of text, most-read source first."""
    width = max(len("source"), *(len(row.name) for row in plans))
    lines = [
        f"{'source':{width}}  {'tokens':>15}  {'of all':>7}  {'share':>7}  {'read':>15}  {'epochs':>8}  {'seen':>6}"
    ]
    for row in sorted(plans, key=lambda row: (-row.share, row.name)):
        lines.append(
            f"{row.name:{width}}  {row.size:15,}  {row.proportional:7.2%}  {row.share:7.2%}  {row.drawn:15,.0f}  "
            f"{row.epochs:8.3g}  {row.seen:6.1%}"
        )
    return "\n".join(lines)


def _require_known(what: str, names: Mapping[str, object], known: Mapping[str, object], where: str = "") -> None:
    unknown = sorted(names.keys() - known.keys())
    if unknown:
        shown = ", ".join(sorted(known))
        raise ValueError(f"{what} names {', '.join(unknown)}, which {where or 'the corpus'} lacks; there are: {shown}")


class Schedule:
    """Which source each draw comes from, as a function of (seed, place) alone.

    Draw j of source l falls at time (j + u_l) / share_l, with a random phase u_l in [0, 1), and all draws are ordered
    by time. So any range of places holds nearly its share of every source ("balanced"): places 0 to n hold each source
    within 1 + L * share of n * share (L sources), and nothing needs to be counted or saved.
    """

    def __init__(self, given: list[float], seed: int) -> None:
        self._shares = np.asarray(given, dtype=np.float64)  # (L,)
        self._phases = np.random.default_rng([seed, _PHASES]).random(len(given))  # (L,)

    def draws(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of the draws at places `first` to `first` + `count`, and their index within it; (count,) each.

        Over all places, a source's indices count up from 0 without gaps.
        """
        slack = len(self._shares) + 1  # between T - L and T + L draws fall before time T
        begin, end = max(0.0, first - slack), float(first + count + slack)
        start, stop = self._before(begin), self._before(end)
        sources = np.repeat(np.arange(len(self._shares)), stop - start)
        offsets = np.repeat(np.cumsum(stop - start) - (stop - start), stop - start)
        numbers = np.arange(len(sources)) - offsets + start[sources]
        order = np.lexsort((sources, self._time(numbers, sources)))
        skip = first - int(start.sum())
        chosen = order[skip : skip + count]
        assert len(chosen) == count
        return sources[chosen], numbers[chosen]

    def _time(self, numbers: np.ndarray, sources: np.ndarray) -> np.ndarray:
        return (numbers + self._phases[sources]) / self._shares[sources]

    def _before(self, time: float) -> np.ndarray:
        """Number of draws of each source before `time`; (L,)."""
        sources = np.arange(len(self._shares))
        numbers = np.maximum(np.ceil(time * self._shares - self._phases).astype(np.int64), 0)
        # the product may round to the other side of `time`, which _time computes as a quotient
        numbers += self._time(numbers, sources) < time
        numbers -= (numbers > 0) & (self._time(np.maximum(numbers - 1, 0), sources) >= time)
        return numbers


_PHASES = 0x70686173  # keeps this use of the seed apart from others
