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
    [0, V). Raises ValueError for shapes that do not fit and targets outside the vocabulary; the Triton kernels on a GPU
    give such a target the loss NaN instead, for the answer would have to be waited for.
    """
    _check(hidden, weight, targets)
    backend = choose_backend("linear_cross_entropy", backend, hidden.device.type, has_triton=True)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if backend == "reference":
            _check_targets(targets, weight)
            return reference.linear_cross_entropy(hidden, weight, targets)
        apply = _linear_cross_entropy if torch.compiler.is_compiling() else _LinearCrossEntropy.apply
        return apply(hidden.contiguous(), weight, targets, backend)[0]


@torch.library.custom_op(
    "moe::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, str backend) -> (Tensor, Tensor)",
)
def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _forward(hidden, weight, targets, backend)


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from . import triton_impl  # Triton is loaded by the first op that runs on it

        if targets.device.type == "cpu":
            _check_targets(targets, weight)
        if hidden.dtype != weight.dtype:
            raise ValueError(f"hidden ({hidden.dtype}) and weight ({weight.dtype}) must have one dtype; convert one")
        return triton_impl.forward(hidden, weight, targets)
    _check_targets(targets, weight)
    return torch_impl.forward(hidden, weight, targets)


@_linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(hidden.shape[0], dtype=wide), hidden.new_empty(hidden.shape[0], dtype=wide)


@torch.library.custom_op(
    "moe::linear_cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, Tensor log_sums, str backend) -> "
    "(Tensor, Tensor)",
)
def _linear_cross_entropy_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, log_sums: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from . import triton_impl

        return triton_impl.backward(grad, hidden, weight, targets, log_sums)
    return torch_impl.backward(grad, hidden, weight, targets, log_sums)


@_linear_cross_entropy_backward.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad = grads[0]  # of the losses
    if grad is None:
        return None, None, None, None
    return *_linear_cross_entropy_backward(grad, *ctx.saved_tensors, ctx.backend), None, None


_linear_cross_entropy.register_autograd(_gradient, setup_context=_context)


class _LinearCrossEntropy(torch.autograd.Function):
    """The same without a compiler: torch.func can transform it."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return _forward(hidden, weight, targets, backend)

    setup_context = staticmethod(_context)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, *grads)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} must be (T, D) and weight {tuple(weight.shape)} (V, D)")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be (T,) with the T of hidden {tuple(hidden.shape)}")


def _check_targets(targets: Tensor, weight: Tensor) -> None:
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < weight.shape[0]:
        raise ValueError(
            f"targets run from {int(targets.min())} to {int(targets.max())}, "
            f"outside the vocabulary of {weight.shape[0]}"
        )
