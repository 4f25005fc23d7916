"""Grouped matrix products on a GPU, for any number of rows per expert, without the host knowing how many.

Both kernels are persistent: their programs loop over the tiles that exist. `expert_ffn/triton_impl.py` builds on the
same parts (triton_tiles.py). From sm_90 on they read whole blocks by tensor descriptor where `choose_loads` finds that
possible; sums run in the same order either way, so results are the same bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# what Triton compiles has no Python types: its arguments are pointers, numbers and constants

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launch import capability_of, launch, num_programs, power_of_2
from ..tuning import Problem
from .triton_tiles import (
    DOUBLE_TILES,
    HALF_TILES,
    SINGLE_TILES,
    Schedule,
    Tile,
    add_described_product,
    add_product,
    can_describe,
    choose_loads,
    choose_tile,
    describe_weights,
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
    if tile is None:
        tile = tile_of(Problem("product", rows.dtype, num_rows, num_experts, columns, inner), rows.device)
    schedule = make_schedule(expert_offsets, num_rows, tile.rows) if schedule is None else schedule
    rows = unit_stride(rows)
    more_rows, more_weight = (None, None) if second is None else (unit_stride(second[0]), second[1])
    if more_weight is not None and more_weight.stride() != weight.stride():
        weight, more_weight = weight.contiguous(), more_weight.contiguous()
    out = torch.empty(num_rows, columns, dtype=rows.dtype, device=rows.device)
    weights, all_rows = [weight], [rows]
    if more_weight is not None and more_rows is not None:
        weights, all_rows = [weight, more_weight], [rows, more_rows]
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
        num_rows=num_rows,
        num_experts=num_experts,
        N=columns,
        K=inner,
        stride_a=rows.stride(0),
        stride_more_a=0 if more_rows is None else more_rows.stride(0),
        stride_be=weight.stride(0),
        stride_bn=weight.stride(1),
        stride_bk=weight.stride(2),
        LOADS=choose_loads(capability_of(rows.device), tile, all_rows, weights),
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
    """(left of e)ᵀ @ right of e, the gradient of a weight. (R, N), (R, K) -> (E, N, K), zero without rows.

    With `left_tokens` or `right_tokens` (R,), that side holds tokens, and its row r is token tokens[r].
    """
    num_experts, columns, inner = expert_offsets.numel() - 1, left.shape[1], right.shape[1]
    left, right = unit_stride(left), unit_stride(right)
    out = torch.empty(num_experts, columns, inner, dtype=left.dtype, device=left.device)
    num_rows = right.shape[0] if right_tokens is None else right_tokens.numel()
    if tile is None:
        tile = tile_of(Problem("outer", left.dtype, num_rows, num_experts, columns, inner), left.device)
    described = [side for side, tokens in ((left, left_tokens), (right, right_tokens)) if tokens is None]
    launch(
        _outer_kernel,
        (0 if out.numel() == 0 else num_programs(out.device, tile.per_processor),),
        left=left,
        right=right,
        left_tokens=left_tokens,
        right_tokens=right_tokens,
        out=out,
        expert_offsets=expert_offsets,
        num_rows=num_rows,
        num_experts=num_experts,
        N=columns,
        K=inner,
        stride_left=left.stride(0),
        stride_right=right.stride(0),
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_R=tile.inner,
        DESCRIBED=can_describe(capability_of(left.device), tile, described),
        **dot_arguments(left.dtype, _outer_kernel),
        PROGRAMS=num_programs(out.device, tile.per_processor),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=tile.max_registers,
    )
    return out


def tile_of(problem: Problem, device: torch.device) -> Tile:
    """The tile that `tune` found fastest for the problem, else the table's."""
    return tuning.winner(problem, device) or table_tile(problem)


def table_tile(problem: Problem) -> Tile:
    """The table's tile. For an outer product it covers (N, K) of the result, and its `inner` runs over rows."""
    if problem.kernel == "product":
        return choose_tile(problem.rows, problem.groups, problem.columns, problem.inner, problem.dtype)
    full = choose_tile(1 << 20, 1, problem.inner, 1 << 20, problem.dtype)
    return full._replace(rows=power_of_2(problem.columns, lowest=16, highest=full.rows))


def trial_of(problem: Problem, device: torch.device) -> Callable[[Tile], None]:
    """A function that starts the problem's kernel with a given tile, for `tune`: random operands, even load."""
    rows = torch.randn(problem.rows, problem.inner, dtype=problem.dtype, device=device)
    shape = (problem.groups, problem.columns, problem.inner)
    weight = torch.randn(shape, dtype=problem.dtype, device=device)
    left = torch.randn(problem.rows, problem.columns, dtype=problem.dtype, device=device)
    bounds = [e * problem.rows // problem.groups for e in range(problem.groups + 1)]
    offsets = torch.tensor(bounds, device=device)
    schedules: dict[int, Schedule] = {}

    def start(tile: Tile) -> None:
        if problem.kernel == "outer":
            outer(left, rows, offsets, tile=tile)
            return
        if tile.rows not in schedules:  # one schedule serves several products, so it is not part of what is measured
            schedules[tile.rows] = make_schedule(offsets, problem.rows, tile.rows)
        product(rows, weight, offsets, tile=tile, schedule=schedules[tile.rows])

    return start


def forward(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """(R, K), (E, N, K) -> (R, N)."""
    return product(rows, weight, expert_offsets)


def backward(
    grad: Tensor, rows: Tensor, weight: Tensor, expert_offsets: Tensor, needs: Sequence[bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `rows` (R, K) and `weight` (E, N, K); None where not needed."""
    of_rows = product(grad, weight.transpose(1, 2), expert_offsets) if needs[0] else None
    return of_rows, outer(grad, rows, expert_offsets) if needs[1] else None


def rehearsals() -> dict[str, Callable[[], None]]:
    """Calls that start every kernel here in every configuration, for the ahead-of-time compiler to record.

    Tensors hold no data. Every tile with bfloat16, by descriptor and by pointer where there are both, and every
    candidate of `tune`; the tallest tile of the other dtypes. Sizes divide evenly, as real ones do, except once.
    """
    cases: dict[str, Callable[[], None]] = {}
    for dtype, tiles in (
        (torch.bfloat16, HALF_TILES[::-1]),
        (torch.float32, SINGLE_TILES[-1:]),
        (torch.float64, DOUBLE_TILES[-1:]),
    ):
        for tile in tiles:
            name = f"{str(dtype).removeprefix('torch.')} {tile.size}"
            cases[name] = partial(_rehearse, dtype, tile, 1024, 4096)
    cases["float16"] = partial(_rehearse, torch.float16, HALF_TILES[-1], 1024, 4096)
    uneven = choose_tile(4096, 8, 4072, 1000, torch.bfloat16)
    cases["bfloat16 uneven"] = partial(_rehearse, torch.bfloat16, uneven, 1000, 4072)
    device = torch.device("meta")
    for kernel, trial in (("product", _rehearse_products), ("outer", _rehearse_outer)):
        problem = Problem(kernel, torch.bfloat16, 4096, 8, 4096, 1024)
        for default in HALF_TILES[::-1]:
            for tile in tuning.candidates(problem, default, capability_of(device))[1:]:
                cases[f"bfloat16 {kernel} {tile}"] = partial(trial, torch.bfloat16, tile, 1024, 4096)
    return cases


def _rehearse(dtype: torch.dtype, tile: Tile, inner: int, columns: int) -> None:
    _rehearse_products(dtype, tile, inner, columns)
    _rehearse_outer(dtype, tile, inner, columns)


def _rehearse_products(dtype: torch.dtype, tile: Tile, inner: int, columns: int) -> None:
    rows = torch.empty(4096, inner, dtype=dtype, device="meta")
    weight = torch.empty(8, columns, inner, dtype=dtype, device="meta")
    offsets = torch.empty(9, dtype=torch.int64, device="meta")
    y = product(rows, weight, offsets, tile=tile)
    product(y, weight.transpose(1, 2), offsets, tile=tile)
    product(y, weight.transpose(1, 2), offsets, tile=tile, second=(y, weight.transpose(1, 2)))
    product(rows, weight, offsets, tile=tile, bias=torch.empty(8, columns, dtype=dtype, device="meta"))


def _rehearse_outer(dtype: torch.dtype, tile: Tile, inner: int, columns: int) -> None:
    left = torch.empty(4096, columns, dtype=dtype, device="meta")
    right = torch.empty(4096, inner, dtype=dtype, device="meta")
    outer(left, right, torch.empty(9, dtype=torch.int64, device="meta"), tile=tile)


@triton.jit(do_not_specialize=["num_rows"])  # it differs from step to step
def _product_kernel(
    a, b, more_a, more_b, bias, out, expert_offsets, tile_experts, tile_rows, num_tiles,
    num_rows, num_experts, N, K, stride_a, stride_more_a, stride_be, stride_bn, stride_bk,
    LOADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, GROUP_M: tl.constexpr, ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    num_m = tl.load(num_tiles)
    num_n = tl.cdiv(N, BLOCK_N)
    if LOADS != "pointers":  # once for all tiles of the program
        a_blocks = tl.make_tensor_descriptor(a, [num_rows, K], [stride_a, 1], [BLOCK_M, BLOCK_K])
        b_blocks = describe_weights(b, num_experts, N, K, stride_be, stride_bn, stride_bk, BLOCK_N, BLOCK_K, LOADS)
        if more_a is not None:
            more_a_blocks = tl.make_tensor_descriptor(more_a, [num_rows, K], [stride_more_a, 1], [BLOCK_M, BLOCK_K])
            more_b_blocks = describe_weights(
                more_b, num_experts, N, K, stride_be, stride_bn, stride_bk, BLOCK_N, BLOCK_K, LOADS
            )  # fmt: skip
    for tile in range(tl.program_id(0), num_m * num_n, PROGRAMS):
        m_tile, n_tile = place_of(tile, num_m, num_n, GROUP_M)
        expert, first, rows, inside = rows_of(m_tile, tile_experts, tile_rows, expert_offsets, BLOCK_M)
        n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
        if LOADS != "pointers":
            at = first.to(tl.int32), expert.to(tl.int32), n_tile * BLOCK_N
            acc = add_described_product(
                acc, a_blocks, b_blocks, at, K, BLOCK_N, BLOCK_K, LOADS, PRECISION, UPCAST
            )  # fmt: skip
            if more_a is not None:
                acc = add_described_product(
                    acc, more_a_blocks, more_b_blocks, at, K, BLOCK_N, BLOCK_K, LOADS, PRECISION, UPCAST
                )  # fmt: skip
        else:
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
def add_rows(
    acc, left, right, left_tokens, right_tokens, rows, end, n, k, N, K, stride_left, stride_right,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + (columns `n` of left rows)ᵀ @ columns `k` of right rows; rows from `end` on count as zero."""
    left_block = load_rows(left, left_tokens, rows, rows < end, n, N, stride_left)
    right_block = load_rows(right, right_tokens, rows, rows < end, k, K, stride_right)
    return multiply(tl.trans(left_block), right_block, acc, PRECISION, UPCAST)


@triton.jit(do_not_specialize=["num_rows"])  # it differs from step to step
def _outer_kernel(
    left, right, left_tokens, right_tokens, out, expert_offsets,
    num_rows, num_experts, N, K, stride_left, stride_right,
    DESCRIBED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    num_k = tl.cdiv(K, BLOCK_K)
    if DESCRIBED and left_tokens is None:
        left_blocks = tl.make_tensor_descriptor(left, [num_rows, N], [stride_left, 1], [BLOCK_R, BLOCK_N])
    if DESCRIBED and right_tokens is None:
        right_blocks = tl.make_tensor_descriptor(right, [num_rows, K], [stride_right, 1], [BLOCK_R, BLOCK_K])
    per_expert = tl.cdiv(N, BLOCK_N) * num_k
    for tile in range(tl.program_id(0), num_experts * per_expert, PROGRAMS):
        expert = tile // per_expert  # tiles of one expert are neighbours: its rows stay in the L2 cache
        n = tile % per_expert // num_k * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tile % num_k * BLOCK_K + tl.arange(0, BLOCK_K)
        start = tl.load(expert_offsets + expert).to(tl.int32)
        end = tl.load(expert_offsets + expert + 1).to(tl.int32)
        acc = tl.zeros((BLOCK_N, BLOCK_K), ACCUMULATOR)
        if DESCRIBED:  # full blocks; the remainder may share its block with the next expert, so it is masked
            whole = start + (end - start) // BLOCK_R * BLOCK_R
            for first in range(start, whole, BLOCK_R):
                rows = first + tl.arange(0, BLOCK_R)
                if left_tokens is None:
                    left_block = left_blocks.load([first, tile % per_expert // num_k * BLOCK_N])
                else:
                    left_block = load_rows(left, left_tokens, rows, rows < end, n, N, stride_left)
                if right_tokens is None:
                    right_block = right_blocks.load([first, tile % num_k * BLOCK_K])
                else:
                    right_block = load_rows(right, right_tokens, rows, rows < end, k, K, stride_right)
                acc = multiply(tl.trans(left_block), right_block, acc, PRECISION, UPCAST)
            if whole < end:
                acc = add_rows(
                    acc, left, right, left_tokens, right_tokens, whole + tl.arange(0, BLOCK_R), end, n, k, N, K,
                    stride_left, stride_right, PRECISION, UPCAST,
                )  # fmt: skip
        else:
            for first in range(start, end, BLOCK_R):
                acc = add_rows(
                    acc, left, right, left_tokens, right_tokens, first + tl.arange(0, BLOCK_R), end, n, k, N, K,
                    stride_left, stride_right, PRECISION, UPCAST,
                )  # fmt: skip
        place = expert.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
