"""The reordering that both directions share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowOrder(NamedTuple):
    """Where the R kept (token, choice) slots go. A slot is the flat index t·K + k; rows are sorted by expert."""

    token_of_row: Tensor  # (R,) int64
    slot_of_row: Tensor  # (R,) int64
    slots: Tensor  # (R,) int64, the kept slots in ascending order
    row_of_slot: Tensor  # (R,) int64, the row of each of `slots`
    token_starts: Tensor  # (T,) int64, where each token's slots begin in `slots`
    expert_offsets: Tensor  # (E+1,) int64, rows offsets[e] to offsets[e+1] belong to expert e
