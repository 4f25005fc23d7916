"""Checks shared by all configurations: one clear error with the key, the value and the rule."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any


def require_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError naming the key, the value and the choices unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{key} ({value!r}) must be one of: {', '.join(choices)}")


def require_positive(owner: str, fields: dict[str, Any]) -> None:
    """Raise ValueError for the first field that is not finite and above zero. `None` (off) passes."""
    for name, value in fields.items():
        if value is None:
            continue
        if value <= 0:
            raise ValueError(f"{owner}.{name} ({value}) must be above 0")
        _require_finite(f"{owner}.{name}", value)


def require_not_negative(owner: str, fields: dict[str, Any], zero: str = "") -> None:
    """Raise ValueError for the first field that is not finite and at least zero. `None` (off) passes.

    zero: what 0 means, for the message.
    """
    for name, value in fields.items():
        if value is None:
            continue
        if value < 0:
            raise ValueError(f"{owner}.{name} ({value}) must not be negative{f'; {zero}' if zero else ''}")
        _require_finite(f"{owner}.{name}", value)


def require_fraction(owner: str, fields: dict[str, float]) -> None:
    """Raise ValueError for the first field outside [0, 1)."""
    for name, value in fields.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{owner}.{name} ({value}) must be at least 0 and below 1")


def _require_finite(key: str, value: float) -> None:
    if not value < math.inf:  # also true of NaN, for which every comparison is false
        raise ValueError(f"{key} ({value}) must be a finite number")


def exact_fraction(factor: float) -> Fraction:
    """A factor as the decimal that was written: binary floating point would turn ceil(1.1 · 10) into 12.

    A long decimal becomes the nearest fraction with a denominator up to a million: 1.3333333333333333 is 4/3.
    """
    return Fraction(str(factor)).limit_denominator(10**6)
