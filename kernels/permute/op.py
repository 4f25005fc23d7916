"""Moving tokens to their experts' rows and back: checks, choice of backend and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import choose_backend
from . import reference, torch_impl
from .order import RowOrder


@torch.no_grad()
def sort_by_expert(expert_indices: Tensor, kept: Tensor, num_experts: int, *, backend: str = "auto") -> RowOrder:
    """The order (expert, token, choice) of the kept slots. expert_indices: (T, K) int64. kept: (T, K) bool.

    Raises ValueError when the shapes differ or an index is no expert.
    """
    if expert_indices.shape != kept.shape:
        raise ValueError(f"expert_indices {tuple(expert_indices.shape)} and kept {tuple(kept.shape)} must agree")
    if expert_indices.numel() and not 0 <= int(expert_indices.min()) <= int(expert_indices.max()) < num_experts:
        raise ValueError(
            f"expert_indices run from {int(expert_indices.min())} to {int(expert_indices.max())}, "
            f"but there are experts 0 to {num_experts - 1}"
        )
    if choose_backend("sort_by_expert", backend, kept.device.type) == "reference":
        return reference.sort_by_expert(expert_indices, kept, num_experts)
    return torch_impl.sort_by_expert(expert_indices, kept, num_experts)


def permute(x: Tensor, order: RowOrder, *, backend: str = "auto") -> Tensor:
    """Copy each token to its rows. (T, D) -> (R, D). Raises ValueError when x has other tokens than the order."""
    if x.dim() != 2 or x.shape[0] != order.token_starts.numel():
        raise ValueError(f"x {tuple(x.shape)} must be (T, D) with the T of the order ({order.token_starts.numel()})")
    if choose_backend("permute", backend, x.device.type) == "reference":
        return reference.permute(x, order)
    return _Permute.apply(x, *order)


def unpermute(rows: Tensor, weights: Tensor, order: RowOrder, *, backend: str = "auto") -> Tensor:
    """Add up each token's rows times the weights of their slots, in slot order. (R, D), (T, K) -> (T, D).

    A token without kept slots gets zeros. The weights of dropped slots are not read. Raises ValueError for shapes
    that do not fit the order.
    """
    if rows.dim() != 2 or rows.shape[0] != order.slots.numel():
        raise ValueError(f"rows {tuple(rows.shape)} must be (R, D) with the R of the order ({order.slots.numel()})")
    if weights.dim() != 2 or weights.shape[0] != order.token_starts.numel():
        raise ValueError(f"weights {tuple(weights.shape)} must be (T, K) with T = {order.token_starts.numel()}")
    if choose_backend("unpermute", backend, rows.device.type) == "reference":
        return reference.unpermute(rows, weights, order)
    return _Unpermute.apply(rows, weights, *order)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *order: Tensor) -> Tensor:
        ctx.save_for_backward(*order)
        return torch_impl.permute(x, RowOrder(*order))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        order = RowOrder(*ctx.saved_tensors)
        return torch_impl.permute_backward(grad, order), *(None for _ in order)


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, *order: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, *order)
        return torch_impl.unpermute(rows, weights, RowOrder(*order))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, *fields = ctx.saved_tensors
        order = RowOrder(*fields)
        return *torch_impl.unpermute_backward(grad, rows, weights, order), *(None for _ in order)
