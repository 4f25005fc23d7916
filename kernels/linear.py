"""A linear layer's product by whichever library is faster here: choice and gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import onednn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weightᵀ + bias, as `F.linear`: (..., K), (N, K), (N,) -> (..., N).

    oneDNN where `onednn.wins`, for multiples of 64 rows; F.linear itself elsewhere, and where a compiler, a torch.func
    transformation or a Tensor subclass needs to see it. Has derivatives of any order, like F.linear.
    """
    if not _by_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return onednn.product(x, weight, bias)
    # (T, K): for more dimensions oneDNN returns a view, and a view from inside a Function allows no in-place operation
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"):
        return False
    if not all(type(each) in (Tensor, nn.Parameter, type(None)) for each in (x, weight, bias)):
        return False
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return False  # F.linear raises the error
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        return False
    num_rows = x.numel() // max(1, x.shape[-1])
    return (
        num_rows % onednn.STEP == 0
        and x.dtype == weight.dtype
        and onednn.wins(x.dtype, x.device.type, num_rows * weight.numel())
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn.product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grads[0].reshape(-1, weight.shape[0])
        return (
            linear(grads[0], weight.T) if of_x else None,
            rows.T @ x.reshape(-1, weight.shape[1]) if of_weight else None,  # both libraries are equally fast here
            rows.sum(dim=0) if of_bias else None,
        )
