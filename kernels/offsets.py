"""The offsets of experts' rows as Python numbers, and what they must be."""

from __future__ import annotations

from torch import Tensor


def read_bounds(expert_offsets: Tensor, num_rows: int) -> list[int]:
    """The offsets (E+1,) as numbers, checked by `require_cover`. The host waits for a GPU.

    On the meta device, where tensors have shapes but no numbers, every expert gets an equal share of the rows: shapes
    and FLOPs do not depend on which expert has which rows.
    """
    if expert_offsets.device.type == "meta":
        num_experts = expert_offsets.numel() - 1
        return [num_rows * e // num_experts for e in range(num_experts + 1)]
    bounds: list[int] = expert_offsets.tolist()
    require_cover(bounds, num_rows)
    return bounds


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
