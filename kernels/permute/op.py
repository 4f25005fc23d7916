"""Moving tokens to their experts' rows and back: checks, choice of backend and gradients.

The number of rows may depend on data, which a compiler cannot trace: it gets `torch.library` ops. Without a compiler
the same functions run as an autograd.Function, which costs less and which torch.func can transform.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import second_order
from ..backend import choose_backend, is_traced
from . import reference, torch_impl
from .order import RowOrder

_ORDER = "Tensor token_of_row, Tensor slot_of_row, Tensor slots, Tensor row_of_slot, Tensor token_starts, "
_ORDER += "Tensor expert_offsets, str backend"


@torch.no_grad()
def sort_by_expert(expert_indices: Tensor, kept: Tensor, num_experts: int, *, backend: str = "auto") -> RowOrder:
    """The order (expert, token, choice) of the kept slots. expert_indices: (T, K) int64. kept: (T, K) bool.

    "triton" gives a row to every slot, dropped ones last, and never makes the host wait (`RowOrder`); the others give
    rows only to kept slots, and on the meta device, where nothing says which are kept, to every slot. Raises
    ValueError if the shapes differ or a kept slot's index is no expert; for the latter "triton" raises only on a CPU,
    while on a GPU the device stops.
    """
    if expert_indices.shape != kept.shape:
        raise ValueError(f"expert_indices {tuple(expert_indices.shape)} and kept {tuple(kept.shape)} must agree")
    backend = choose_backend("sort_by_expert", backend, kept.device.type, has_triton=True)
    if backend == "reference":
        require_experts(expert_indices[kept], num_experts)
        return reference.sort_by_expert(expert_indices, kept, num_experts)
    if backend == "torch" and kept.device.type == "meta":
        return _empty_order(expert_indices, num_experts, kept.numel())
    sort = _sort if backend == "torch" and not is_traced(kept) else _sort_by_expert
    return RowOrder(*sort(expert_indices, kept, num_experts, backend))


def permute(x: Tensor, order: RowOrder, *, backend: str = "auto") -> Tensor:
    """Copy each token to its rows. (T, D) -> (R, D). Raises ValueError if x and the order differ in T."""
    if x.dim() != 2 or x.shape[0] != order.token_starts.numel() - 1:
        num_tokens = order.token_starts.numel() - 1
        raise ValueError(f"x {tuple(x.shape)} must be (T, D) with the T of the order ({num_tokens})")
    backend = choose_backend("permute", backend, x.device.type, has_triton=True)
    if backend == "reference":
        return reference.permute(x, order)
    if torch.compiler.is_compiling():
        return _permute(x, *order, backend)
    return (_Permute.apply if torch.is_grad_enabled() else _Permute.forward)(x, *order, backend)


def unpermute(rows: Tensor, weights: Tensor, order: RowOrder, *, backend: str = "auto") -> Tensor:
    """Sum each token's rows times the weights of their slots, in slot order. (R, D), (T, K) -> (T, D).

    A token without kept slots gets zeros. The weights of dropped slots are not read. Raises ValueError for shapes
    that do not match the order.
    """
    if rows.dim() != 2 or rows.shape[0] != order.slots.numel():
        raise ValueError(f"rows {tuple(rows.shape)} must be (R, D) with the R of the order ({order.slots.numel()})")
    if weights.dim() != 2 or weights.shape[0] != order.token_starts.numel() - 1:
        raise ValueError(f"weights {tuple(weights.shape)} must be (T, K) with T = {order.token_starts.numel() - 1}")
    backend = choose_backend("unpermute", backend, rows.device.type, has_triton=True)
    if backend == "reference":
        return reference.unpermute(rows, weights, order)
    if torch.compiler.is_compiling():
        return _unpermute(rows, weights, *order, backend)
    return (_Unpermute.apply if torch.is_grad_enabled() else _Unpermute.forward)(rows, weights, *order, backend)


def require_experts(expert_indices: Tensor, num_experts: int) -> None:
    """Raise ValueError unless every index is an expert. Reads the data, so the host waits for a GPU."""
    if expert_indices.numel() and not 0 <= int(expert_indices.min()) <= int(expert_indices.max()) < num_experts:
        raise ValueError(
            f"expert_indices run from {int(expert_indices.min())} to {int(expert_indices.max())}, "
            f"but there are experts 0 to {num_experts - 1}"
        )


def look_for_experts(expert_indices: Tensor, kept: Tensor, num_experts: int) -> None:
    """`require_experts` for the kept slots, on a CPU only: on a GPU the host would have to wait."""
    if expert_indices.device.type == "cpu":
        require_experts(expert_indices[kept], num_experts)


def _implementation(backend: str) -> Any:
    if backend == "triton":
        from . import triton_impl  # Triton is loaded by the first op that runs on it

        return triton_impl
    return torch_impl


@torch.library.custom_op(
    "moe::sort_slots_by_expert",
    mutates_args=(),
    schema="(Tensor expert_indices, Tensor kept, int num_experts, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _sort_by_expert(expert_indices: Tensor, kept: Tensor, num_experts: int, backend: str) -> tuple[Tensor, ...]:
    return _sort(expert_indices, kept, num_experts, backend)


def _sort(expert_indices: Tensor, kept: Tensor, num_experts: int, backend: str) -> tuple[Tensor, ...]:
    if backend == "triton":
        look_for_experts(expert_indices, kept, num_experts)
    try:
        return tuple(_implementation(backend).sort_by_expert(expert_indices, kept, num_experts))
    except RuntimeError:  # bincount's, for an index below 0: checking beforehand would slow every call
        require_experts(expert_indices[kept], num_experts)
        raise


@_sort_by_expert.register_fake
def _(expert_indices: Tensor, kept: Tensor, num_experts: int, backend: str) -> tuple[Tensor, ...]:
    num_rows = expert_indices.numel() if backend == "triton" else torch.library.get_ctx().new_dynamic_size()
    return tuple(_empty_order(expert_indices, num_experts, num_rows))


def _empty_order(expert_indices: Tensor, num_experts: int, num_rows: int | torch.SymInt) -> RowOrder:
    """An uninitialised order of `num_rows` rows."""
    sizes = (*(num_rows,) * 4, expert_indices.shape[0] + 1, num_experts + 1)
    return RowOrder(*(expert_indices.new_empty(size) for size in sizes))


@torch.library.custom_op("moe::permute", mutates_args=(), schema=f"(Tensor x, {_ORDER}) -> Tensor")
def _permute(x: Tensor, *order_and_backend: Any) -> Tensor:
    *order, backend = order_and_backend
    result: Tensor = _implementation(backend).permute(x, RowOrder(*order))
    return result


@_permute.register_fake
def _(x: Tensor, *order_and_backend: Any) -> Tensor:
    return x.new_empty(RowOrder(*order_and_backend[:-1]).token_of_row.shape[0], x.shape[1])


@torch.library.custom_op("moe::permute_backward", mutates_args=(), schema=f"(Tensor grad, {_ORDER}) -> Tensor")
def _permute_backward(grad: Tensor, *order_and_backend: Any) -> Tensor:
    *order, backend = order_and_backend
    result: Tensor = _implementation(backend).permute_backward(grad, RowOrder(*order))
    return result


@_permute_backward.register_fake
def _(grad: Tensor, *order_and_backend: Any) -> Tensor:
    return grad.new_empty(RowOrder(*order_and_backend[:-1]).token_starts.shape[0] - 1, grad.shape[1])


@torch.library.custom_op("moe::unpermute", mutates_args=(), schema=f"(Tensor rows, Tensor weights, {_ORDER}) -> Tensor")
def _unpermute(rows: Tensor, weights: Tensor, *order_and_backend: Any) -> Tensor:
    *order, backend = order_and_backend
    result: Tensor = _implementation(backend).unpermute(rows, weights, RowOrder(*order))
    return result


@_unpermute.register_fake
def _(rows: Tensor, weights: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(weights.shape[0], rows.shape[1])


@torch.library.custom_op(
    "moe::unpermute_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor rows, Tensor weights, {_ORDER}) -> (Tensor, Tensor)",
)
def _unpermute_backward(grad: Tensor, rows: Tensor, weights: Tensor, *order_and_backend: Any) -> tuple[Tensor, Tensor]:
    *order, backend = order_and_backend
    result: tuple[Tensor, Tensor] = _implementation(backend).unpermute_backward(grad, rows, weights, RowOrder(*order))
    return result


@_unpermute_backward.register_fake
def _(grad: Tensor, rows: Tensor, weights: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return grad.new_empty(rows.shape), weights.new_empty(weights.shape)


def _permute_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors[1:])


def _permute_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    order = ctx.saved_tensors
    return _permute_backward(*grads, *order, ctx.backend), *(None for _ in order), None


_permute.register_autograd(_permute_gradient, setup_context=_permute_context)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, *order_and_backend: Any) -> Tensor:
        *order, backend = order_and_backend
        result: Tensor = _implementation(backend).permute(x, RowOrder(*order))
        return result

    setup_context = staticmethod(_permute_context)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        order = RowOrder(*ctx.saved_tensors)
        if second_order.wanted():
            return _add_up(grads[0], order), *(None for _ in order), None
        return _implementation(ctx.backend).permute_backward(*grads, order), *(None for _ in order), None


def _unpermute_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _unpermute_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    rows, weights, *order = ctx.saved_tensors
    return *_unpermute_backward(*grads, rows, weights, *order, ctx.backend), *(None for _ in order), None


_unpermute.register_autograd(_unpermute_gradient, setup_context=_unpermute_context)


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, weights: Tensor, *order_and_backend: Any) -> Tensor:
        *order, backend = order_and_backend
        result: Tensor = _implementation(backend).unpermute(rows, weights, RowOrder(*order))
        return result

    setup_context = staticmethod(_unpermute_context)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        rows, weights, *order = ctx.saved_tensors
        if second_order.wanted():
            weighted_sum = partial(_weighted_sum, order=RowOrder(*order))
            found = second_order.gradients(weighted_sum, (rows, weights), ctx.needs_input_grad[:2], *grads)
        else:
            found = _implementation(ctx.backend).unpermute_backward(*grads, rows, weights, RowOrder(*order))
        return *found, *(None for _ in order), None


def _weighted_sum(rows: Tensor, weights: Tensor, order: RowOrder) -> Tensor:
    """`unpermute` in operations that autograd can differentiate any number of times."""
    kept = int(order.expert_offsets[-1])  # the rows after these were dropped and may hold anything
    scale = weights.flatten().index_select(0, order.slot_of_row[:kept]).to(rows.dtype)
    return _add_up(rows[:kept] * scale[:, None], order)


def _add_up(rows: Tensor, order: RowOrder) -> Tensor:
    """Each token's sum over its rows, differentiable likewise. (R, D) -> (T, D)."""
    kept = int(order.expert_offsets[-1])
    sums = rows.new_zeros(order.token_starts.numel() - 1, rows.shape[1])
    return sums.index_add(0, order.token_of_row[:kept], rows[:kept])


for _function in (_Permute, _Unpermute):  # else `apply` inspects it in every call, which costs more than the rest
    _function.forward.__dict__["__signature__"] = inspect.signature(_function.forward)
