"""The expert networks of the GPU path as one differentiable op, for rows as they are and for tokens with an order.

One op serves a compiler and eager mode alike: on a GPU its overhead is negligible beside the kernels. An op cannot
return None: a tensor without elements stands for what does not exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..permute.order import RowOrder


def run(
    x: Tensor,
    weights: Tensor | None,
    order: RowOrder | None,
    expert_offsets: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> Tensor:
    """Rows (R, D) through their experts, or tokens (T, D) with weights (T, K) and their order, summed per token.

    Raises ValueError unless x and the experts have the same dtype and, for rows on a CPU, unless the offsets begin at 0
    and end at R or before.
    """
    for weight in (w_in, w_gate, w_out):
        if weight is not None and weight.dtype != x.dtype:
            raise ValueError(
                f"rows ({x.dtype}) and weights ({weight.dtype}) must have the same dtype; convert one of them"
            )
    slots = [] if order is None else list(order)
    y: Tensor = _forward(x, weights, slots, expert_offsets, w_in, w_gate, w_out, b_in, b_out, activation)[0]
    return y


@torch.library.custom_op(
    "moe::expert_ffn_triton",
    mutates_args=(),
    schema="(Tensor x, Tensor? weights, Tensor[] order, Tensor expert_offsets, Tensor w_in, Tensor? w_gate, "
    "Tensor w_out, Tensor? b_in, Tensor? b_out, str activation) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    x: Tensor, weights: Tensor | None, order: list[Tensor], expert_offsets: Tensor, *experts: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_impl  # Triton is loaded by the first op that runs on it

    if weights is None:
        if x.device.type == "cpu":
            _check_offsets(x, expert_offsets)
        y, first = triton_impl.forward(x, None, expert_offsets, *experts)
    else:
        y, first = triton_impl.routed_forward(x, weights, RowOrder(*order), *experts)
    return y, first.hidden, x.new_empty(0) if first.gate is None else first.gate


@_forward.register_fake
def _(
    x: Tensor,
    weights: Tensor | None,
    order: list[Tensor],
    expert_offsets: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = x.shape[0] if weights is None else RowOrder(*order).token_of_row.shape[0]
    hidden = x.new_empty(num_rows, w_in.shape[1])
    return x.new_empty(x.shape), hidden, x.new_empty(0) if w_gate is None else torch.empty_like(hidden)


@torch.library.custom_op(
    "moe::expert_ffn_triton_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor gate, Tensor x, Tensor? weights, Tensor[] order, "
    "Tensor expert_offsets, Tensor w_in, Tensor? w_gate, Tensor w_out, Tensor? b_out, bool has_b_in, str activation, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    hidden: Tensor,
    gate: Tensor,
    x: Tensor,
    weights: Tensor | None,
    order: list[Tensor],
    expert_offsets: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    from . import triton_impl

    saved_gate = None if w_gate is None else gate
    of_weights = None
    if weights is None:
        found = triton_impl.backward(grad, hidden, saved_gate, x, None, None, expert_offsets, w_in, w_gate, *rest)
        of_x = found.rows
    else:
        found, of_x, of_weights = triton_impl.routed_backward(
            grad, hidden, saved_gate, x, weights, RowOrder(*order), w_in, w_gate, *rest
        )
    results = (of_x, of_weights, found.w_in, found.w_gate, found.w_out, found.b_in, found.b_out)
    return tuple(x.new_empty(0) if each is None else each for each in results)


@_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    gate: Tensor,
    x: Tensor,
    weights: Tensor | None,
    order: list[Tensor],
    expert_offsets: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    has_b_in: bool,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    shapes = (
        x.shape,
        w_in.shape,
        None if w_gate is None else w_gate.shape,
        w_out.shape,
        w_in.shape[:2] if has_b_in else None,
        None if b_out is None else b_out.shape,
    )
    found = (0 if shape is None or not needed else shape for shape, needed in zip(shapes, needs, strict=True))
    of_x, *of_experts = (x.new_empty(shape) for shape in found)
    of_weights = x.new_empty(0) if weights is None else weights.new_empty(weights.shape)
    return of_x, of_weights, *of_experts


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weights, order, expert_offsets, w_in, w_gate, w_out, b_in, b_out, ctx.activation = inputs
    ctx.save_for_backward(x, weights, expert_offsets, w_in, w_gate, w_out, b_out, *output[1:], *order)
    ctx.has_b_in = b_in is not None
    ctx.set_materialize_grads(False)  # zeros for `hidden` and `gate` would be two fills of (R, F)


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    x, weights, expert_offsets, w_in, w_gate, w_out, b_out, hidden, gate, *order = ctx.saved_tensors
    none_of_order = [None] * len(order)
    if grads[0] is None:
        return None, None, none_of_order, *((None,) * 7)
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:9]]  # of x and the experts
    found = _backward(
        grads[0], hidden, gate, x, weights, order, expert_offsets, w_in, w_gate, w_out, b_out, ctx.has_b_in,
        ctx.activation, needs,
    )  # fmt: skip
    of_x, *of_experts = (each if needed else None for each, needed in zip((found[0], *found[2:]), needs, strict=True))
    return of_x, None if weights is None else found[1], none_of_order, None, *of_experts, None


_forward.register_autograd(_gradient, setup_context=_context)


def _check_offsets(rows: Tensor, expert_offsets: Tensor) -> None:
    first, last = int(expert_offsets[0]), int(expert_offsets[-1])
    if first != 0 or last > rows.shape[0]:
        raise ValueError(
            f"expert_offsets must run from 0 to at most the number of rows ({rows.shape[0]}), "
            f"not from {first} to {last}"
        )
