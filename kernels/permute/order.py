"""The order of rows that both directions share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowOrder(NamedTuple):
    """Where the kept (token, choice) slots go. A slot is the flat index t·K + k; rows are sorted by expert.

    R is the number of kept slots, or any larger number up to T·K: a GPU path uses T·K, which the host knows without
    waiting, and so does the meta device, which knows no other. Rows from expert_offsets[E] on then belong to dropped
    slots: no expert computes them, nothing reads them, and they may hold anything.
    """

    token_of_row: Tensor  # (R,) int64
    slot_of_row: Tensor  # (R,) int64
    slots: Tensor  # (R,) int64, the kept slots in ascending order, then the dropped ones
    row_of_slot: Tensor  # (R,) int64, the row of each of `slots`
    token_starts: Tensor  # (T+1,) int64, where each token's kept slots begin in `slots`, and where the last token's end
    expert_offsets: Tensor  # (E+1,) int64, rows offsets[e] to offsets[e+1] belong to expert e
