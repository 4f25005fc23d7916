"""Grouped matrix products on a GPU, for any number of rows per expert, without the host knowing how many.

Both kernels are persistent: their programs walk the tiles that exist. `expert_ffn/triton_impl.py` builds on the same
parts (triton_tiles.py).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# what Triton compiles has no Python types: its arguments are pointers, numbers and constants

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, num_programs, power_of_2
from .triton_tiles import (
    DOUBLE_TILES,
    HALF_TILES,
    SINGLE_TILES,
    Schedule,
    Tile,
    add_product,
    choose_tile,
    dot_arguments,
    load_rows,
    make_schedule,
    multiply,
    place_of,
    rows_of,
    schedule_arguments,
    tile_arguments,
    unit_stride,
)


def product(
    rows: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    *,
    second: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    tile: Tile | None = None,
    schedule: Schedule | None = None,
) -> Tensor:
    """rows of e @ weight[e]ᵀ (+ second rows of e @ second weight[e]ᵀ) (+ bias[e]). (R, K), (E, N, K) -> (R, N).

    Weights may have any strides: the gradient of the rows is the same product with `weight.transpose(1, 2)`.
    """
    num_experts, columns, inner = weight.shape
    num_rows = rows.shape[0]
    tile = choose_tile(num_rows, num_experts, columns, inner, rows.dtype) if tile is None else tile
    schedule = make_schedule(expert_offsets, num_rows, tile.rows) if schedule is None else schedule
    rows = unit_stride(rows)
    more_rows, more_weight = (None, None) if second is None else (unit_stride(second[0]), second[1])
    if more_weight is not None and more_weight.stride() != weight.stride():
        weight, more_weight = weight.contiguous(), more_weight.contiguous()
    out = torch.empty(num_rows, columns, dtype=rows.dtype, device=rows.device)
    launch(
        _product_kernel,
        (0 if num_rows == 0 else num_programs(rows.device, tile.per_processor),),
        a=rows,
        b=weight,
        more_a=more_rows,
        more_b=more_weight,
        bias=None if bias is None else bias.contiguous(),
        out=out,
        expert_offsets=expert_offsets,
        **schedule_arguments(schedule),
        N=columns,
        K=inner,
        stride_a=rows.stride(0),
        stride_more_a=0 if more_rows is None else more_rows.stride(0),
        stride_be=weight.stride(0),
        stride_bn=weight.stride(1),
        stride_bk=weight.stride(2),
        **tile_arguments(tile, columns, inner, rows.dtype, _product_kernel),
        PROGRAMS=num_programs(rows.device, tile.per_processor),
    )
    return out


def outer(
    left: Tensor,
    right: Tensor,
    expert_offsets: Tensor,
    *,
    left_tokens: Tensor | None = None,
    right_tokens: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """left of eᵀ @ right of e, the gradient of a weight. (R, N), (R, K) -> (E, N, K), zero without rows.

    With `left_tokens` or `right_tokens` (R,) that side holds tokens, and row r is its token tokens[r].
    """
    num_experts, columns, inner = expert_offsets.numel() - 1, left.shape[1], right.shape[1]
    left, right = unit_stride(left), unit_stride(right)
    out = torch.empty(num_experts, columns, inner, dtype=left.dtype, device=left.device)
    if tile is None:  # here the tile covers (N, K) of the result, and its `inner` runs over rows
        full = choose_tile(1 << 20, 1, inner, 1 << 20, left.dtype)
        tile = full._replace(rows=power_of_2(columns, lowest=16, highest=full.rows))
    launch(
        _outer_kernel,
        (0 if out.numel() == 0 else num_programs(out.device, tile.per_processor),),
        left=left,
        right=right,
        left_tokens=left_tokens,
        right_tokens=right_tokens,
        out=out,
        expert_offsets=expert_offsets,
        num_experts=num_experts,
        N=columns,
        K=inner,
        stride_left=left.stride(0),
        stride_right=right.stride(0),
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_R=tile.inner,
        **dot_arguments(left.dtype, _outer_kernel),
        PROGRAMS=num_programs(out.device, tile.per_processor),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=tile.max_registers,
    )
    return out


def forward(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """(R, K), (E, N, K) -> (R, N)."""
    return product(rows, weight, expert_offsets)


def backward(grad: Tensor, rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `rows` (R, K) and `weight` (E, N, K)."""
    return product(grad, weight.transpose(1, 2), expert_offsets), outer(grad, rows, expert_offsets)


def rehearsals() -> dict[str, Callable[[], None]]:
    """Calls that start every kernel here in every configuration, for the ahead-of-time compiler to record.

    Tensors without data. Every tile with bfloat16, the first of the others; sizes that divide evenly, as real ones do,
    and once sizes that do not.
    """
    cases: dict[str, Callable[[], None]] = {}
    for dtype, tiles in (
        (torch.bfloat16, HALF_TILES[::-1]),
        (torch.float32, SINGLE_TILES[-1:]),
        (torch.float64, DOUBLE_TILES[-1:]),
    ):
        for tile in tiles:
            name = f"{str(dtype).removeprefix('torch.')} {tile.rows}x{tile.columns}x{tile.inner}"
            cases[name] = partial(_rehearse, dtype, tile, 1024, 4096)
    cases["float16"] = partial(_rehearse, torch.float16, HALF_TILES[-1], 1024, 4096)
    cases["bfloat16 uneven"] = partial(
        _rehearse, torch.bfloat16, choose_tile(4096, 8, 4072, 1000, torch.bfloat16), 1000, 4072
    )
    return cases


def _rehearse(dtype: torch.dtype, tile: Tile, inner: int, columns: int) -> None:
    rows = torch.empty(4096, inner, dtype=dtype, device="meta")
    weight = torch.empty(8, columns, inner, dtype=dtype, device="meta")
    offsets = torch.empty(9, dtype=torch.int64, device="meta")
    y = product(rows, weight, offsets, tile=tile)
    product(y, weight.transpose(1, 2), offsets, tile=tile)
    product(y, weight.transpose(1, 2), offsets, tile=tile, second=(y, weight.transpose(1, 2)))
    product(rows, weight, offsets, tile=tile, bias=torch.empty(8, columns, dtype=dtype, device="meta"))
    outer(y, rows, offsets, tile=tile)


@triton.jit
def _product_kernel(
    a,
    b,
    more_a,
    more_b,
    bias,
    out,
    expert_offsets,
    tile_experts,
    tile_rows,
    num_tiles,
    N,
    K,
    stride_a,
    stride_more_a,
    stride_be,
    stride_bn,
    stride_bk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    num_m = tl.load(num_tiles)
    num_n = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), num_m * num_n, PROGRAMS):
        m_tile, n_tile = place_of(tile, num_m, num_n, GROUP_M)
        expert, first, rows, inside = rows_of(m_tile, tile_experts, tile_rows, expert_offsets, BLOCK_M)
        n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
        acc = add_product(
            acc, a + (first + rows) * stride_a, b + expert * stride_be, n, N, K, stride_bn, stride_bk,
            BLOCK_K, EVEN_N, EVEN_K, PRECISION, UPCAST,
        )  # fmt: skip
        if more_a is not None:
            acc = add_product(
                acc, more_a + (first + rows) * stride_more_a, more_b + expert * stride_be, n, N, K,
                stride_bn, stride_bk,
                BLOCK_K, EVEN_N, EVEN_K, PRECISION, UPCAST,
            )  # fmt: skip
        if bias is not None:
            acc += tl.load(bias + expert * N + n, mask=n < N, other=0.0).to(ACCUMULATOR)[None, :]
        written = inside[:, None] & (n < N)[None, :]
        tl.store(out + first * N + (rows[:, None] * N + n[None, :]), acc.to(out.dtype.element_ty), mask=written)


@triton.jit
def _outer_kernel(
    left,
    right,
    left_tokens,
    right_tokens,
    out,
    expert_offsets,
    num_experts,
    N,
    K,
    stride_left,
    stride_right,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    num_k = tl.cdiv(K, BLOCK_K)
    per_expert = tl.cdiv(N, BLOCK_N) * num_k
    for tile in range(tl.program_id(0), num_experts * per_expert, PROGRAMS):
        expert = tile // per_expert  # tiles of one expert are neighbours: its rows stay in the L2 cache
        n = tile % per_expert // num_k * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tile % num_k * BLOCK_K + tl.arange(0, BLOCK_K)
        start = tl.load(expert_offsets + expert).to(tl.int32)
        end = tl.load(expert_offsets + expert + 1).to(tl.int32)
        acc = tl.zeros((BLOCK_N, BLOCK_K), ACCUMULATOR)
        for first in range(start, end, BLOCK_R):
            rows = first + tl.arange(0, BLOCK_R)
            left_block = load_rows(left, left_tokens, rows, rows < end, n, N, stride_left)
            right_block = load_rows(right, right_tokens, rows, rows < end, k, K, stride_right)
            acc = multiply(tl.trans(left_block), right_block, acc, PRECISION, UPCAST)
        place = expert.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
