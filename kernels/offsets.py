"""What offsets of experts' rows must be."""

from __future__ import annotations


def require_cover(bounds: list[int], num_rows: int) -> None:
    """Raise ValueError unless `bounds`, the E+1 offsets, ascend from 0 to num_rows."""
    if bounds[0] != 0 or bounds[-1] != num_rows:
        raise ValueError(
            f"expert_offsets must run from 0 to the number of rows ({num_rows}), not from {bounds[0]} to {bounds[-1]}"
        )
    if bounds != sorted(bounds):
        e = next(e for e in range(len(bounds) - 1) if bounds[e] > bounds[e + 1])
        raise ValueError(
            f"expert_offsets must not descend, but the rows of expert {e} run from {bounds[e]} to {bounds[e + 1]}"
        )
