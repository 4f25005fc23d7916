"""The specification of moving tokens to their experts' rows and back, slot by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from .order import RowOrder


def sort_by_expert(expert_indices: Tensor, kept: Tensor, num_experts: int) -> RowOrder:
    """Rows in the order (expert, token, choice)."""
    num_tokens, top_k = expert_indices.shape
    slots = [(t, k) for t in range(num_tokens) for k in range(top_k) if kept[t, k]]
    rows = sorted(range(len(slots)), key=lambda i: (int(expert_indices[slots[i]]), i))
    counts = [sum(int(expert_indices[slot]) == e for slot in slots) for e in range(num_experts)]
    per_token = [sum(t == token for t, _ in slots) for token in range(num_tokens)]
    return RowOrder(
        token_of_row=_integers([slots[i][0] for i in rows], kept),
        slot_of_row=_integers([slots[i][0] * top_k + slots[i][1] for i in rows], kept),
        slots=_integers([t * top_k + k for t, k in slots], kept),
        row_of_slot=_integers([rows.index(i) for i in range(len(slots))], kept),
        token_starts=_integers([sum(per_token[:t]) for t in range(num_tokens + 1)], kept),
        expert_offsets=_integers([sum(counts[:e]) for e in range(num_experts + 1)], kept),
    )


def permute(x: Tensor, order: RowOrder) -> Tensor:
    """The token of each row. (T, D) -> (R, D)."""
    return x[order.token_of_row]


def unpermute(rows: Tensor, weights: Tensor, order: RowOrder) -> Tensor:
    """The weighted sum of each token's rows. (R, D), (T, K) -> (T, D)."""
    flat = weights.flatten()
    sums = [rows.new_zeros(rows.shape[1]) for _ in range(weights.shape[0])]
    kept = int(order.expert_offsets[-1])  # the rows after these were dropped
    for slot, row in zip(order.slots[:kept].tolist(), order.row_of_slot[:kept].tolist(), strict=True):
        token = slot // weights.shape[1]
        sums[token] = sums[token] + flat[slot].to(rows.dtype) * rows[row]
    total = torch.stack(sums) if sums else rows.new_zeros(0, rows.shape[1])
    return total + (rows[:0].sum() + weights[:0].sum()).to(rows.dtype)  # zero: gives a graph even if nothing is summed


def _integers(values: list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)
