"""What kernels over grouped rows share: tile sizes, the schedule of row tiles, and the inner loop of a product.

The schedule says which expert and which rows each row tile covers. One small kernel makes it on the device, so the
host need not know how many rows an expert has, and an expert without rows costs nothing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# what Triton compiles has no Python types: its arguments are pointers, numbers and constants

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import is_interpreted, is_recording, launch, power_of_2
from ..tiles import DOUBLE_TILES, HALF_TILES, SINGLE_TILES, Tile

GROUP_M = 8  # row tiles that go through all columns together: their rows and those columns stay in the L2 cache
SCHEDULE_TILES = 16  # row tiles that one program of the schedule finds


class Schedule(NamedTuple):
    """The row tiles of all experts, in row order. Entries past `num_tiles` are never read."""

    tile_experts: Tensor  # (greatest possible number of tiles,) int32
    tile_rows: Tensor  # (greatest possible number of tiles,) int32, the first row of each tile
    num_tiles: Tensor  # (1,) int32
    block_rows: int


def choose_tile(rows: int, groups: int, columns: int, inner: int, dtype: torch.dtype) -> Tile:
    """The tile for `rows` rows spread over `groups` experts: the tallest that their mean load fills at least half.

    Narrower for narrow matrices, and smaller where a size is not a multiple of 16: Triton then loads and stores one
    number at a time, and large tiles would spill the registers that this takes.
    """
    tiles = {4: SINGLE_TILES, 8: DOUBLE_TILES}.get(dtype.itemsize, HALF_TILES)
    if columns % 16 or inner % 16:
        tiles = DOUBLE_TILES if dtype.itemsize == 8 else SINGLE_TILES[:2]
    mean = rows // max(1, min(groups, rows))
    tile = max((tile for tile in tiles if tile.rows <= 2 * mean), default=tiles[0])
    return tile._replace(
        descriptors=dtype.itemsize == 2,
        columns=power_of_2(columns, lowest=16, highest=tile.columns),
        inner=power_of_2(inner, lowest=16, highest=tile.inner),
    )


def make_schedule(expert_offsets: Tensor, num_rows: int, block_rows: int) -> Schedule:
    """Cut each expert's rows into tiles of `block_rows`, the last one shorter. One launch; the host reads nothing."""
    num_experts = expert_offsets.numel() - 1
    most = num_rows // block_rows + min(num_experts, num_rows)
    experts = torch.empty(most, dtype=torch.int32, device=expert_offsets.device)
    rows = torch.empty_like(experts)
    num_tiles = torch.empty(1, dtype=torch.int32, device=expert_offsets.device)
    launch(
        _schedule_kernel,
        (max(1, triton.cdiv(most, SCHEDULE_TILES)),),
        expert_offsets=expert_offsets,
        tile_experts=experts,
        tile_rows=rows,
        num_tiles=num_tiles,
        num_experts=num_experts,
        most=most,
        BLOCK_ROWS=block_rows,
        BLOCK_E=power_of_2(num_experts, lowest=16, highest=1 << 20),
        TILES=SCHEDULE_TILES,
    )
    return Schedule(experts, rows, num_tiles, block_rows)


def choose_loads(capability: int, tile: Tile, rows: Sequence[Tensor], weights: Sequence[Tensor]) -> str:
    """How a product reads its operands: by "pointers", or by descriptors of weights laid out as "nk" or "kn".

    rows: (R, K) each, those that are not gathered. weights: (E, N, K) each, all of the same layout.
    """
    if can_describe(capability, tile, (*rows, *weights)):
        return "nk"
    return "kn" if can_describe(capability, tile, (*rows, *(w.transpose(1, 2) for w in weights))) else "pointers"


def can_describe(capability: int, tile: Tile, tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors are read by descriptor (TMA): if the tile requests it, on an NVIDIA GPU from sm_90 on.

    The copy engine needs a contiguous last dimension, addresses and other strides that are multiples of 16 bytes,
    strides no smaller than what they step over, and no empty tensor.
    """
    return capability >= 90 and tile.descriptors and all(map(_is_describable, tensors))


def _is_describable(tensor: Tensor) -> bool:
    size, strides = tensor.element_size(), tensor.stride()
    has_address = not (tensor.is_meta or is_recording())  # else as if its memory began aligned
    steps = [tensor.shape[i + 1] * strides[i + 1] for i in range(tensor.dim() - 1)]
    return (
        tensor.numel() > 0
        and strides[-1] == 1
        and all(stride * size % 16 == 0 and stride >= step for stride, step in zip(strides, steps, strict=False))
        and (tensor.data_ptr() if has_address else tensor.storage_offset() * size) % 16 == 0
    )


def unit_stride(rows: Tensor) -> Tensor:
    """`rows` if neighbours in a row are neighbours in memory, else a copy: an upstream .sum() gives stride 0."""
    return rows if rows.stride(1) == 1 or rows.numel() == 0 else rows.contiguous()


def schedule_arguments(schedule: Schedule) -> dict[str, Any]:
    """The schedule as kernel arguments."""
    return {
        "tile_experts": schedule.tile_experts,
        "tile_rows": schedule.tile_rows,
        "num_tiles": schedule.num_tiles,
    }


def tile_arguments(tile: Tile, columns: int, inner: int, dtype: torch.dtype, kernel: Any) -> dict[str, Any]:
    """The tile as arguments of kernels over a schedule. If sizes divide evenly, the inner loop needs no masks."""
    return {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.inner,
        "EVEN_N": columns % tile.columns == 0,
        "EVEN_K": inner % tile.inner == 0,
        "GROUP_M": GROUP_M,
        **dot_arguments(dtype, kernel),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "max_registers": tile.max_registers,
    }


def dot_arguments(dtype: torch.dtype, kernel: Any) -> dict[str, Any]:
    """How tiles are multiplied: float32 as torch's own switch says, narrower dtypes accumulated in float32."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return {
        "ACCUMULATOR": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 else "ieee",
        # the interpreter keeps bfloat16 as integers and multiplies those
        "UPCAST": dtype == torch.bfloat16 and is_interpreted(kernel),
    }


@triton.jit
def _schedule_kernel(
    expert_offsets,
    tile_experts,
    tile_rows,
    num_tiles,
    num_experts,
    most,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILES: tl.constexpr,
):
    experts = tl.arange(0, BLOCK_E)
    exists = experts < num_experts
    start = tl.load(expert_offsets + experts, mask=exists, other=0).to(tl.int32)
    end = tl.load(expert_offsets + experts + 1, mask=exists, other=0).to(tl.int32)
    ends = tl.cumsum((end - start + BLOCK_ROWS - 1) // BLOCK_ROWS, 0)  # tiles up to and including each expert
    tiles = tl.program_id(0) * TILES + tl.arange(0, TILES)
    # experts whose tiles all come before: their number is the tile's expert, the last of their ends its first tile
    before = (ends[None, :] <= tiles[:, None]) & exists[None, :]
    expert = tl.sum(before.to(tl.int32), 1)
    first_tile = tl.max(tl.where(before, ends[None, :], 0), 1)
    first_row = tl.load(expert_offsets + expert, mask=expert < num_experts, other=0).to(tl.int32)
    tl.store(tile_experts + tiles, expert, mask=tiles < most)
    tl.store(tile_rows + tiles, first_row + (tiles - first_tile) * BLOCK_ROWS, mask=tiles < most)
    if tl.program_id(0) == 0:
        tl.store(num_tiles, tl.max(ends, 0))


@triton.jit
def place_of(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Row tile and column tile of the `tile`-th block: GROUP_M row tiles go through all columns together."""
    group = tile // (GROUP_M * num_n)
    within = tile % (GROUP_M * num_n)
    height = tl.minimum(num_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % height, within // height


@triton.jit
def rows_of(m_tile, tile_experts, tile_rows, expert_offsets, BLOCK_M: tl.constexpr):
    """The expert of a row tile, its first row, its rows relative to that, and which of these belong to the expert.

    Rows beyond repeat the expert's last one: they are read without a mask and never written. Relative to the first
    row, offsets in a tile fit in 32 bits, which takes half the registers of full addresses.
    """
    expert = tl.load(tile_experts + m_tile).to(tl.int64)
    first = tl.load(tile_rows + m_tile)
    rows = tl.arange(0, BLOCK_M)
    count = tl.load(expert_offsets + expert + 1).to(tl.int32) - first
    return expert, first.to(tl.int64), tl.minimum(rows, count - 1), rows < count


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def load_a(pointers, k, K, EVEN_K: tl.constexpr):
    """A block of rows (BLOCK_M, BLOCK_K)."""
    if EVEN_K:
        return tl.load(pointers)
    return tl.load(pointers, mask=(k < K)[None, :], other=0.0)


@triton.jit
def load_b(pointers, n, k, N, K, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    """A block of an expert's matrix (BLOCK_K, BLOCK_N)."""
    if EVEN_N and EVEN_K:
        return tl.load(pointers)
    return tl.load(pointers, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def add_product(
    acc,
    a,
    b,
    n,
    N,
    K,
    stride_bn,
    stride_bk,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc + the product of the rows that start at `a` (BLOCK_M,) with columns `n` of the matrix that starts at `b`."""
    k = tl.arange(0, BLOCK_K)
    b_places = n[None, :] * stride_bn + k[:, None] * stride_bk
    for start in range(0, K, BLOCK_K):
        a_block = load_a(a[:, None] + k[None, :], k + start, K, EVEN_K)
        b_block = load_b(b + b_places, n, k + start, N, K, EVEN_N, EVEN_K)
        acc = multiply(a_block, b_block, acc, PRECISION, UPCAST)
        a += BLOCK_K  # advancing row starts takes fewer registers than advancing a block of pointers
        b += BLOCK_K * stride_bk
    return acc


@triton.jit
def describe_weights(
    b,
    num_experts,
    N,
    K,
    stride_be,
    stride_bn,
    stride_bk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOADS: tl.constexpr,
):
    """The matrices of all experts as one 3-D tensor, so that a block ends where its expert's matrix does."""
    if LOADS == "nk":
        return tl.make_tensor_descriptor(b, [num_experts, N, K], [stride_be, stride_bn, 1], [1, BLOCK_N, BLOCK_K])
    else:
        return tl.make_tensor_descriptor(b, [num_experts, K, N], [stride_be, stride_bk, 1], [1, BLOCK_K, BLOCK_N])


@triton.jit
def load_described(b, expert, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LOADS: tl.constexpr):
    """A block of an expert's matrix (BLOCK_K, BLOCK_N) from column n and depth k on, zero outside the matrix."""
    if LOADS == "nk":
        return tl.trans(tl.reshape(b.load([expert, n, k]), (BLOCK_N, BLOCK_K)))
    else:
        return tl.reshape(b.load([expert, k, n]), (BLOCK_K, BLOCK_N))


@triton.jit
def add_described_product(
    acc,
    a,
    b,
    at,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOADS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc + a product read by descriptors. at: the first row, the expert and the first column.

    Rows past the expert's last are the next expert's, or zero past the last of all. They are read but never written.
    """
    first, expert, n = at
    for start in range(0, K, BLOCK_K):
        b_block = load_described(b, expert, n, start, BLOCK_N, BLOCK_K, LOADS)
        acc = multiply(a.load([first, start]), b_block, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def load_rows(pointer, tokens, rows, inside, columns, width, stride):
    """A block (rows, columns) of a matrix of rows, or of the tokens that `tokens` names; zero outside."""
    source = rows.to(tl.int64)
    if tokens is not None:
        source = tl.load(tokens + rows, mask=inside, other=0).to(tl.int64)
    mask = inside[:, None] & (columns < width)[None, :]
    return tl.load(pointer + source[:, None] * stride + columns[None, :], mask=mask, other=0.0)
