"""The output projection and the cross-entropy in one: checks, choice of backend and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import second_order
from ..autocast import autocast_dtype, without_autocast
from ..backend import choose_backend
from ..launch import is_recording
from . import reference, torch_impl


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, token_mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Cross-entropy in nats of each token under softmax(hidden weightᵀ). -> (T,), float32 or float64.

    hidden: (T, D). weight: (V, D), in the dtype of hidden, or cast to autocast's with it. targets: (T,) int64 in
    [0, V). token_mask: (T,) bool, True for the tokens whose losses will count; None is all. It changes no result, only
    speed: on a CPU the torch backend computes gradients in the forward, fastest if the upstream gradient is one number
    at the tokens that count and 0 elsewhere; any other costs weight's gradient two more GEMMs.

    Kept for the backward: hidden, weight, targets and the mask, (T,) float32 or float64 and, on a CPU with the torch
    backend but not in float16, hidden's gradient (T, D) in its dtype and weight's (V, D) in float32 or float64, which
    the backward copies and scales. Neither is computed or kept for an input that needs no gradient.

    Raises ValueError for mismatched shapes and dtypes and for targets outside the vocabulary; the Triton kernels on a
    GPU give such a target the loss NaN instead, since the host would have to wait for the check.
    """
    _check(hidden, weight, targets, token_mask)
    backend = choose_backend("linear_cross_entropy", backend, hidden.device.type, has_triton=True)
    dtype = autocast_dtype(hidden)
    if dtype is not None:
        hidden = hidden.to(dtype)
        if backend != "torch":  # which converts it inside, so that its gradient has its own dtype
            weight = weight.to(hidden.dtype)
    elif hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden ({hidden.dtype}) and weight ({weight.dtype}) must have the same dtype; convert one of them"
        )
    with without_autocast(hidden.device.type):
        if backend == "reference":
            _check_targets(targets, weight)
            return reference.linear_cross_entropy(hidden, weight, targets)
        early = backend == "torch" and torch.is_grad_enabled() and torch_impl.makes_gradients(hidden)
        wanted = [early and tensor.requires_grad for tensor in (hidden, weight)]
        apply = _linear_cross_entropy if torch.compiler.is_compiling() else _LinearCrossEntropy.apply
        return apply(hidden.contiguous(), weight, targets, backend, token_mask, *wanted)[0]


@torch.library.custom_op(
    "moe::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, str backend, Tensor? token_mask=None, "
    "bool for_hidden=False, bool for_weight=False) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    backend: str,
    token_mask: Tensor | None = None,
    for_hidden: bool = False,
    for_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(hidden, weight, targets, backend, token_mask, for_hidden, for_weight)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    backend: str,
    token_mask: Tensor | None,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, log-sum-exp of the logits, and the requested gradients for an upstream gradient of 1, else empty."""
    if backend == "triton":
        from . import triton_impl  # Triton is loaded by the first op that runs on it

        if targets.device.type == "cpu" and not is_recording():  # a recording's tensors hold no data
            _check_targets(targets, weight)
        return *triton_impl.forward(hidden, weight, targets), hidden.new_empty(0), hidden.new_empty(0)
    _check_targets(targets, weight)
    return torch_impl.forward(hidden, weight, targets, token_mask, for_hidden=for_hidden, for_weight=for_weight)


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    backend: str,
    token_mask: Tensor | None = None,
    for_hidden: bool = False,
    for_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape if for_hidden else 0),
        weight.new_empty(weight.shape if for_weight else 0, dtype=hidden.dtype if backend == "triton" else wide),
    )


@torch.library.custom_op(
    "moe::linear_cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, Tensor? token_mask, Tensor log_sums, "
    "Tensor unit_hidden, Tensor unit_weight, str backend, bool for_hidden, bool for_weight) -> (Tensor, Tensor)",
)
def _linear_cross_entropy_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_mask: Tensor | None,
    log_sums: Tensor,
    unit_hidden: Tensor,
    unit_weight: Tensor,
    backend: str,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from . import triton_impl

        return triton_impl.backward(grad, hidden, weight, targets, log_sums)
    units = (unit_hidden, unit_weight)
    return torch_impl.backward(
        grad, hidden, weight, targets, token_mask, units, for_hidden=for_hidden, for_weight=for_weight
    )


@_linear_cross_entropy_backward.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, backend, for_hidden, for_weight = rest
    always = backend == "triton"  # Triton makes both
    return (
        hidden.new_empty(hidden.shape if always or for_hidden else 0),
        weight.new_empty(weight.shape if always or for_weight else 0),
    )


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, ctx.backend, token_mask, _, _ = inputs
    ctx.save_for_backward(hidden, weight, targets, token_mask, *output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, nothing = grads[0], (None,) * 5  # `nothing` goes to all inputs but hidden and weight
    if grad is None:
        return None, None, *nothing
    wanted = ctx.needs_input_grad[:2]
    made = _linear_cross_entropy_backward(grad, *ctx.saved_tensors, ctx.backend, *wanted)
    return *(each if wants else None for each, wants in zip(made, wanted, strict=True)), *nothing


_linear_cross_entropy.register_autograd(_gradient, setup_context=_context)


class _LinearCrossEntropy(torch.autograd.Function):
    """The same without a compiler, differentiable more than once, by way of the full logits."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        backend: str,
        token_mask: Tensor | None,
        for_hidden: bool,
        for_weight: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(hidden, weight, targets, backend, token_mask, for_hidden, for_weight)

    setup_context = staticmethod(_context)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if grads[0] is None or not second_order.wanted():
            return _gradient(ctx, *grads)
        hidden, weight, targets, *_ = ctx.saved_tensors

        def specification(hidden: Tensor, weight: Tensor) -> Tensor:
            return reference.linear_cross_entropy(hidden, weight.to(hidden.dtype), targets)

        found = second_order.gradients(specification, (hidden, weight), ctx.needs_input_grad[:2], grads[0])
        return *found, *(None,) * 5


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, token_mask: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} must be (T, D) and weight {tuple(weight.shape)} (V, D)")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be (T,) with the T of hidden {tuple(hidden.shape)}")
    if token_mask is not None and (token_mask.shape != targets.shape or token_mask.dtype != torch.bool):
        raise ValueError(
            f"token_mask, {token_mask.dtype} {tuple(token_mask.shape)}, must be bool and (T,) "
            f"as targets {tuple(targets.shape)}"
        )


def _check_targets(targets: Tensor, weight: Tensor) -> None:
    if targets.device.type == "meta":  # shapes without numbers
        return
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < weight.shape[0]:
        raise ValueError(
            f"targets run from {int(targets.min())} to {int(targets.max())}, "
            f"outside the vocabulary of {weight.shape[0]}: every target must be one of its ids, masked ones too "
            f"(targets.masked_fill(targets < 0, 0))"
        )
