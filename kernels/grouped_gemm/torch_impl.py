"""The portable path: one matrix product per expert that has rows, into one result.

`expert_ffn/torch_impl.py` has the tuned form of the same products; this one serves stand-alone products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(rows: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:
    """(R, K), (E, N, K) -> (R, N). `bounds` are the E+1 row offsets."""
    return _products(rows, weight.transpose(1, 2), bounds)


def backward(
    grad: Tensor, rows: Tensor, weight: Tensor, bounds: list[int], needs: Sequence[bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `rows` (R, K) and `weight` (E, N, K), zero for experts without rows; None where not needed."""
    grad = grad.contiguous()  # an upstream .sum() gives stride 0
    of_rows = _products(grad, weight, bounds) if needs[0] else None
    if not needs[1]:
        return of_rows, None
    of_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    for e, out in enumerate(of_weight.unbind(0)):
        span = slice(bounds[e], bounds[e + 1])
        if span.start < span.stop:
            torch.mm(grad[span].T, rows[span], out=out)
    return of_rows, of_weight


def _products(rows: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:
    """rows of e @ weight[e]: (R, K), (E, K, N) -> (R, N)."""
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for e, matrix in enumerate(weight.unbind(0)):  # unbind once: indexing weight[e] would cost E times
        span = slice(bounds[e], bounds[e + 1])
        if span.start < span.stop:
            torch.mm(rows[span], matrix, out=out[span])
    return out
