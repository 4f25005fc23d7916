"""The expert networks on a GPU: gather, product and activation in one kernel, and a backward that keeps little.

Only the input, the pre-activations and the order of the rows are kept for the backward, never anything of size R·D: the
gather is repeated inside the products, the activation is recomputed in the epilogue of the first backward product, and
the gradient of a routing weight falls out there too, since d(w · W_out a)/dw = grad · W_out a = (W_outᵀ grad) · a.
Rows may be given (`tokens` is None) or gathered from tokens; row weights scale a row's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..grouped_gemm.triton_impl import outer, product, tile_of
from ..grouped_gemm.triton_tiles import (
    DOUBLE_TILES,
    HALF_TILES,
    SINGLE_TILES,
    Schedule,
    Tile,
    choose_loads,
    choose_tile,
    dot_arguments,
    make_schedule,
    schedule_arguments,
    tile_arguments,
    unit_stride,
)
from ..launch import capability_of, launch, num_programs
from ..permute.order import RowOrder
from ..permute.triton_impl import sum_rows
from ..tuning import Problem
from .triton_kernels import activation_backward_kernel, first_kernel, grouped_sum_kernel

SUM_ROWS, SUM_COLUMNS = 32, 64  # the block for summing bias gradients


class Hidden(NamedTuple):
    """The results of the first products."""

    hidden: Tensor  # (R, F) rows @ w_inᵀ + b_in
    gate: Tensor | None  # (R, F) rows @ w_gateᵀ
    inner: Tensor  # (R, F) the activation, input of the second product


class Gradients(NamedTuple):
    """Gradients in the order of the arguments; None if there is no such argument or its gradient is not needed."""

    rows: Tensor | None  # (R, D), also if rows were gathered
    w_in: Tensor | None
    w_gate: Tensor | None
    w_out: Tensor | None
    b_in: Tensor | None
    b_out: Tensor | None
    row_weights: Tensor | None  # (R,) float32 or float64


def forward(
    x: Tensor,
    tokens: Tensor | None,
    expert_offsets: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> tuple[Tensor, Hidden]:
    """Output rows (R, D), unweighted, and what the backward needs. x: (R, D), or (T, D) with tokens (R,)."""
    num_rows = x.shape[0] if tokens is None else tokens.numel()
    num_experts, d_ff, d_model = w_in.shape
    tile = choose_tile(num_rows, num_experts, d_ff, d_model, x.dtype)
    schedule = make_schedule(expert_offsets, num_rows, tile.rows)
    hidden = first_products(x, tokens, num_rows, expert_offsets, w_in, w_gate, b_in, activation, tile, schedule)
    tile = tile_of(Problem("product", x.dtype, num_rows, num_experts, d_model, d_ff), x.device)
    again = schedule if tile.rows == schedule.block_rows else None
    return product(hidden.inner, w_out, expert_offsets, bias=b_out, tile=tile, schedule=again), hidden


def routed_forward(
    x: Tensor,
    weights: Tensor,
    order: RowOrder,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> tuple[Tensor, Hidden]:
    """Tokens through their experts and back, summed in slot order. (T, D), (T, K) -> (T, D)."""
    rows, hidden = forward(x, order.token_of_row, order.expert_offsets, w_in, w_gate, w_out, b_in, b_out, activation)
    return sum_rows(rows, weights, order), hidden


def routed_backward(
    grad: Tensor,
    hidden: Tensor,
    gate: Tensor | None,
    x: Tensor,
    weights: Tensor,
    order: RowOrder,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    has_b_in: bool,
    activation: str,
    needs: Sequence[bool] = (True,) * 6,
) -> tuple[Gradients, Tensor | None, Tensor]:
    """Gradients of the experts' parameters, of x (T, D) and of the weights (T, K), zero for dropped slots.

    needs: in the order of Gradients, the first for x.
    """
    row_weights = weights.flatten().index_select(0, order.slot_of_row)  # (R,)
    gradients = backward(
        grad,
        hidden,
        gate,
        x,
        order.token_of_row,
        row_weights,
        order.expert_offsets,
        w_in,
        w_gate,
        w_out,
        b_out,
        has_b_in,
        activation,
        needs,
    )
    assert gradients.row_weights is not None
    of_weights = torch.zeros(weights.shape, dtype=weights.dtype, device=weights.device)
    of_weights.view(-1)[order.slot_of_row] = gradients.row_weights.to(weights.dtype)
    of_x = None if gradients.rows is None else sum_rows(gradients.rows, None, order)
    return gradients, of_x, of_weights


def first_products(
    x: Tensor,
    tokens: Tensor | None,
    num_rows: int,
    expert_offsets: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    activation: str,
    tile: Tile,
    schedule: Schedule,
) -> Hidden:
    """Gather, both products over the same rows, bias and activation in one kernel."""
    _, d_ff, d_model = w_in.shape
    x = unit_stride(x)
    if activation == "gelu":
        tile = tile._replace(max_registers=None)  # erf needs more registers
    if w_gate is not None:
        tile = _half_as_wide(tile)  # two accumulators
        if w_gate.stride() != w_in.stride():
            w_in, w_gate = w_in.contiguous(), w_gate.contiguous()
    hidden, inner = (torch.empty(num_rows, d_ff, dtype=x.dtype, device=x.device) for _ in range(2))
    gate = None if w_gate is None else torch.empty_like(hidden)
    launch(
        first_kernel,
        (0 if num_rows == 0 else num_programs(x.device, tile.per_processor),),
        x=x,
        tokens=tokens,
        w_in=w_in,
        w_gate=w_gate,
        b_in=None if b_in is None else b_in.contiguous(),
        hidden=hidden,
        gate=gate,
        inner=inner,
        expert_offsets=expert_offsets,
        **schedule_arguments(schedule),
        num_experts=w_in.shape[0],
        N=d_ff,
        K=d_model,
        stride_x=x.stride(0),
        stride_be=w_in.stride(0),
        stride_bn=w_in.stride(1),
        stride_bk=w_in.stride(2),
        LOADS=choose_loads(capability_of(x.device), tile, (), (w_in,) if w_gate is None else (w_in, w_gate)),
        ACTIVATION=activation,
        **tile_arguments(tile, d_ff, d_model, x.dtype, first_kernel),
        PROGRAMS=num_programs(x.device, tile.per_processor),
    )
    return Hidden(hidden, gate, inner)


def backward(
    grad: Tensor,
    hidden: Tensor,
    gate: Tensor | None,
    x: Tensor,
    tokens: Tensor | None,
    row_weights: Tensor | None,
    expert_offsets: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    has_b_in: bool,
    activation: str,
    needs: Sequence[bool] = (True,) * 6,
) -> Gradients:
    """The gradients that are needed (in the order of Gradients), and always that of row_weights (R,).

    grad: (R, D), or (T, D) with tokens. b_out is read only for the gradient of row_weights.
    """
    num_experts, d_ff, d_model = w_in.shape
    grad, x = unit_stride(grad), unit_stride(x)
    tile = _backward_tile(choose_tile(hidden.shape[0], num_experts, d_ff, d_model, x.dtype), gate is not None)
    schedule = make_schedule(expert_offsets, hidden.shape[0], tile.rows)
    grad_hidden, grad_gate, inner, of_weights = activation_gradients(
        grad, tokens, row_weights, hidden, gate, expert_offsets, w_out, b_out, activation, tile, schedule
    )
    of_w_out = outer(grad, inner, expert_offsets, left_tokens=tokens) if needs[3] else None
    del inner
    of_rows = None
    if needs[0]:
        second = None if grad_gate is None or w_gate is None else (grad_gate, w_gate.transpose(1, 2))
        into_rows = tile_of(Problem("product", x.dtype, hidden.shape[0], num_experts, d_model, d_ff), x.device)
        of_rows = product(
            grad_hidden,
            w_in.transpose(1, 2),
            expert_offsets,
            second=second,
            tile=into_rows,
            schedule=schedule if into_rows.rows == schedule.block_rows else None,
        )
    of_w_in = outer(grad_hidden, x, expert_offsets, right_tokens=tokens) if needs[1] else None
    of_w_gate = None
    if grad_gate is not None and needs[2]:
        of_w_gate = outer(grad_gate, x, expert_offsets, right_tokens=tokens)
    return Gradients(
        rows=of_rows,
        w_in=of_w_in,
        w_gate=of_w_gate,
        w_out=of_w_out,
        b_in=grouped_sum(grad_hidden, None, None, expert_offsets) if has_b_in and needs[4] else None,
        b_out=None if b_out is None or not needs[5] else grouped_sum(grad, tokens, row_weights, expert_offsets),
        row_weights=of_weights,
    )


def activation_gradients(
    grad: Tensor,
    tokens: Tensor | None,
    row_weights: Tensor | None,
    hidden: Tensor,
    gate: Tensor | None,
    expert_offsets: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    tile: Tile,
    schedule: Schedule,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of `hidden` and `gate` (R, F), the weighted activation (R, F), and the gradient of row_weights."""
    num_rows, d_ff = hidden.shape
    d_model = w_out.shape[1]
    grad_hidden, inner = torch.empty_like(hidden), torch.empty_like(hidden)
    grad_gate = None if gate is None else torch.empty_like(gate)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # one number per row and column tile, summed afterwards: no atomics
    parts = None
    if row_weights is not None:
        # zeros: nothing is written for rows of dropped slots, whose weights have no gradient
        parts = torch.zeros(triton.cdiv(d_ff, tile.columns), num_rows, dtype=wide, device=grad.device)
    launch(
        activation_backward_kernel,
        (0 if num_rows == 0 else num_programs(grad.device, tile.per_processor),),
        grad=grad,
        tokens=tokens,
        row_weights=None if row_weights is None else row_weights.contiguous(),
        w_out=w_out,
        b_out=None if b_out is None or row_weights is None else b_out.contiguous(),
        hidden=hidden,
        gate=gate,
        grad_hidden=grad_hidden,
        grad_gate=grad_gate,
        inner=inner,
        parts=parts,
        expert_offsets=expert_offsets,
        **schedule_arguments(schedule),
        num_rows=num_rows,
        num_experts=w_out.shape[0],
        N=d_ff,
        K=d_model,
        stride_grad=grad.stride(0),
        stride_be=w_out.stride(0),
        stride_bn=w_out.stride(2),
        stride_bk=w_out.stride(1),
        LOADS=choose_loads(capability_of(grad.device), tile, (), (w_out.transpose(1, 2),)),
        ACTIVATION=activation,
        **tile_arguments(tile, d_ff, d_model, hidden.dtype, activation_backward_kernel),
        PROGRAMS=num_programs(grad.device, tile.per_processor),
    )
    return grad_hidden, grad_gate, inner, None if parts is None else parts.sum(dim=0)


def grouped_sum(rows: Tensor, tokens: Tensor | None, row_weights: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """The sum of each expert's rows, weighted by row_weights if given. (R, N), or (T, N) with tokens -> (E, N)."""
    num_experts, width = expert_offsets.numel() - 1, rows.shape[1]
    out = torch.empty(num_experts, width, dtype=rows.dtype, device=rows.device)
    launch(
        grouped_sum_kernel,
        (num_experts, triton.cdiv(width, SUM_COLUMNS)),
        rows=unit_stride(rows),
        tokens=tokens,
        row_weights=None if row_weights is None else row_weights.contiguous(),
        out=out,
        expert_offsets=expert_offsets,
        N=width,
        stride_rows=unit_stride(rows).stride(0),
        ACCUMULATOR=dot_arguments(rows.dtype, grouped_sum_kernel)["ACCUMULATOR"],
        BLOCK_R=SUM_ROWS,
        BLOCK_N=SUM_COLUMNS,
    )
    return out


def rehearsals() -> dict[str, Callable[[], None]]:
    """Calls that start every kernel here in every configuration, for the ahead-of-time compiler to record."""
    cases: dict[str, Callable[[], None]] = {}
    for gated, activation in ((False, "gelu"), (True, "silu"), (False, "relu"), (False, "gelu_tanh")):
        for tile in HALF_TILES[::-1]:
            name = f"bfloat16 {activation} {tile.size}"
            cases[name] = partial(_rehearse, torch.bfloat16, tile, gated, activation)
            cases[f"{name} pointers"] = partial(
                _rehearse, torch.bfloat16, tile._replace(descriptors=False), gated, activation
            )
    uneven = choose_tile(8192, 8, 4072, 1000, torch.bfloat16)
    cases["bfloat16 silu uneven"] = partial(_rehearse, torch.bfloat16, uneven, True, "silu", 1000, 4072)
    cases["bfloat16 gelu uneven"] = partial(_rehearse, torch.bfloat16, uneven, False, "gelu", 1000, 4072)
    cases["float16 silu"] = partial(_rehearse, torch.float16, HALF_TILES[-1], True, "silu")
    cases["float32 gelu"] = partial(_rehearse, torch.float32, SINGLE_TILES[-1], False, "gelu")
    cases["float64 silu"] = partial(_rehearse, torch.float64, DOUBLE_TILES[-1], True, "silu")
    cases["float64 gelu"] = partial(_rehearse, torch.float64, DOUBLE_TILES[-1], False, "gelu")
    cases["float32 silu"] = partial(_rehearse, torch.float32, SINGLE_TILES[-1], True, "silu")
    return cases


def _rehearse(
    dtype: torch.dtype, tile: Tile, gated: bool, activation: str, d_model: int = 1024, d_ff: int = 4096
) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, tokens, offsets = empty(4096, d_model), empty(8192, dtype=torch.int64), empty(9, dtype=torch.int64)
    w_in, w_out = empty(8, d_ff, d_model), empty(8, d_model, d_ff)
    w_gate = empty(8, d_ff, d_model) if gated else None
    row_weights = empty(8192, dtype=torch.float32)
    schedule = make_schedule(offsets, 8192, tile.rows)
    first = first_products(x, tokens, 8192, offsets, w_in, w_gate, None, activation, tile, schedule)
    back = _backward_tile(tile, gated)
    activation_gradients(
        x, tokens, row_weights, first.hidden, first.gate, offsets, w_out, None, activation, back, schedule
    )
    by_pointer = None if tile.descriptors else tile  # else `outer` chooses its own
    outer(x, first.inner, offsets, left_tokens=tokens, tile=by_pointer)
    outer(first.inner, x, offsets, right_tokens=tokens, tile=by_pointer)
    grouped_sum(x, tokens, row_weights, offsets)


def _backward_tile(tile: Tile, gated: bool) -> Tile:
    """The tile for `activation_gradients`, whose epilogue holds three blocks, or five with a gate."""
    tile = _half_as_wide(tile)._replace(max_registers=None)
    return tile._replace(rows=min(tile.rows, 64), num_warps=8) if gated and tile.rows >= 64 else tile


def _half_as_wide(tile: Tile) -> Tile:
    return tile._replace(columns=max(16, tile.columns // 2))
