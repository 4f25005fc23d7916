"""The portable path: one matrix product per expert that has rows, into one result.

`expert_ffn/torch_impl.py` has the tuned form of the same products; this one is for products on their own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(rows: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:
    """(R, K), (E, N, K) -> (R, N). `bounds` are the E+1 row offsets."""
    return _products(rows, weight.transpose(1, 2), bounds)


def backward(grad: Tensor, rows: Tensor, weight: Tensor, bounds: list[int]) -> tuple[Tensor, Tensor]:
    """Gradients of `rows` (R, K) and `weight` (E, N, K), zero for experts without rows."""
    grad = grad.contiguous()  # an upstream .sum() hands over stride 0
    of_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    for e, out in enumerate(of_weight.unbind(0)):
        span = slice(bounds[e], bounds[e + 1])
        if span.start < span.stop:
            torch.mm(grad[span].T, rows[span], out=out)
    return _products(grad, weight, bounds), of_weight


def _products(rows: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:
    """rows of e @ weight[e]: (R, K), (E, K, N) -> (R, N)."""
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for e, matrix in enumerate(weight.unbind(0)):  # unbind once: weight[e] has a cost of its own, E times
        span = slice(bounds[e], bounds[e + 1])
        if span.start < span.stop:
            torch.mm(rows[span], matrix, out=out[span])
    return out
