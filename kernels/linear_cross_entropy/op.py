"""The output projection and the cross-entropy in one: checks, choice of backend and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import choose_backend
from . import reference, torch_impl


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: str = "auto") -> Tensor:
    """Cross-entropy in nats of each token under softmax(hidden weightᵀ). -> (T,), float32 or float64.

    hidden: (T, D). weight: (V, D), in the dtype of hidden, or cast to autocast's with it. targets: (T,) int64 in
    [0, V). Raises ValueError for shapes that do not fit and targets outside the vocabulary.
    """
    _check(hidden, weight, targets)
    backend = choose_backend("linear_cross_entropy", backend, hidden.device.type)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if backend == "reference":
            return reference.linear_cross_entropy(hidden, weight, targets)
        return _LinearCrossEntropy.apply(hidden, weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        losses, log_sums = torch_impl.forward(hidden, weight, targets)
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *torch_impl.backward(grad, *ctx.saved_tensors), None


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} must be (T, D) and weight {tuple(weight.shape)} (V, D)")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be (T,) with the T of hidden {tuple(hidden.shape)}")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < weight.shape[0]:
        raise ValueError(
            f"targets run from {int(targets.min())} to {int(targets.max())}, "
            f"outside the vocabulary of {weight.shape[0]}"
        )
