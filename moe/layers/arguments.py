"""Checks of the layers' constructor arguments: one ValueError each, where the mistake is made."""

from __future__ import annotations

import operator
from typing import Any

from moe.config.checks import require_choice
from moe.kernels.backend import BACKENDS


def require_count(name: str, value: Any) -> int:
    """`value` as an int; numpy's are accepted. Raises ValueError unless it is an integer of at least 1."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} ({value!r}) must be an integer of at least 1")
    return count


def require_dropout(value: float) -> None:
    """Raise ValueError unless `value` is a probability below 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"dropout ({value}) must be at least 0 and below 1")


def require_backend(value: object) -> None:
    """Raise ValueError for an unknown backend. Whether a known one can run shows only when it does."""
    require_choice("backend", value, BACKENDS)
