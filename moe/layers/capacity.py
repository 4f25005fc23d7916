"""How many rows an expert accepts, in exact integers: the same for a count on the host and one on a device."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

from moe.config.checks import exact_fraction

MILLION = 10**6


class ExactFactor(NamedTuple):
    """An `exact_fraction` whose product with a token count fits in int64."""

    numerator: int
    denominator: int
    written: float  # the value as given

    @staticmethod
    def of(factor: Any, name: str = "factor", most: int = MILLION, off: str | None = None) -> ExactFactor:
        """Raises ValueError unless factor is between a millionth and `most`; `off` says what None would mean."""
        if isinstance(factor, Real) and not isinstance(factor, bool) and math.isfinite(factor):
            written = float(factor)
            exact = exact_fraction(written)
            if 0 < exact <= most:
                return ExactFactor(exact.numerator, exact.denominator, written)
        otherwise = "" if off is None else f", or None for {off}"
        raise ValueError(f"{name} ({factor}) must be above 0 (at least 0.000001) and at most {most}{otherwise}")

    def ceil_of(self, count: int | Tensor, divisor: int = 1) -> int | Tensor:
        """ceil(factor · count / divisor). A tensor gives a tensor, without reading its value."""
        return -(-(count * self.numerator) // (self.denominator * divisor))


def expert_capacity(num_tokens: int | Tensor, num_experts: int, top_k: int, factor: ExactFactor) -> int | Tensor:
    """Rows one expert accepts: ceil(factor · T · K / E). A factor of 1 is the mean load for any K."""
    return factor.ceil_of(num_tokens * top_k, num_experts)


class CapacityFactor:
    """A router attribute that is checked whenever it is set, and stored as an ExactFactor under `_<name>`.

    Reading it returns the value as given. off: what None means, for the error; without it None is refused.
    """

    def __init__(self, *, off: str | None = None, most: int = MILLION) -> None:
        self.off, self.most = off, most

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, router: Any, owner: type | None = None) -> Any:
        if router is None:
            return self
        exact: ExactFactor | None = router.__dict__[f"_{self.name}"]
        return None if exact is None else exact.written

    def __set__(self, router: Any, value: float | None) -> None:
        absent = value is None and self.off is not None
        router.__dict__[f"_{self.name}"] = None if absent else ExactFactor.of(value, self.name, self.most, self.off)
