"""Moving tokens to their experts' rows and back on a GPU: a counting sort, gathers, and sums in slot order.

The keys are few, so the sort counts instead of comparing: a histogram per block of slots, one running sum over (expert,
block); each slot's row is then its block's start plus the number of equal slots before it in the block. This is stable
by construction and, like the sums back, uses no atomics.

The host never learns how many slots are kept: there is a row for each slot, and those of dropped slots come last, where
every kernel stops (`RowOrder`).
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

from ..launch import launch, power_of_2
from .order import RowOrder

BLOCK_SLOTS = 512  # per program: the table of counts has E numbers for each block
CHUNK_SLOTS = 16  # slots of a block that are compared with all of it at a time
MOST_COLUMNS = 2048  # of a row that one program holds: 16 numbers per thread of 4 warps


def sort_by_expert(expert_indices: Tensor, kept: Tensor, num_experts: int) -> RowOrder:
    """Rows in the order (expert, token, choice), then those of dropped slots. The host reads nothing.

    A kept index that is no expert stops the device with a message, as torch's own gathers do.
    """
    starts, positions = count(expert_indices, kept, num_experts)
    # the first total counts kept slots with a valid expert, the second all kept slots
    torch._assert_async(starts[-1] == positions[-1], f"kept expert_indices outside the experts 0 to {num_experts - 1}")
    return place(expert_indices, kept, num_experts, starts, positions)


def count(expert_indices: Tensor, kept: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Where each block of slots begins among the rows of each expert, and among the kept slots.

    -> (E·blocks + 1,) int64, expert by expert, and (blocks + 1,) int64. Each ends with its total; kept indices that are
    no expert count only in the second.
    """
    num_slots = expert_indices.numel()
    num_blocks = triton.cdiv(num_slots, BLOCK_SLOTS)
    counts = torch.empty(num_experts, num_blocks, dtype=torch.int64, device=kept.device)
    block_totals = torch.empty(num_blocks, dtype=torch.int64, device=kept.device)
    launch(
        _count_kernel,
        (num_blocks,),
        expert_indices=expert_indices.contiguous(),
        kept=kept.contiguous(),
        counts=counts,
        block_totals=block_totals,
        num_slots=num_slots,
        num_blocks=num_blocks,
        num_experts=num_experts,
        BLOCK=BLOCK_SLOTS,
        BINS=power_of_2(num_experts + 1, lowest=16, highest=1 << 16),
    )
    return _starts(counts.view(-1)), _starts(block_totals)


def place(expert_indices: Tensor, kept: Tensor, num_experts: int, starts: Tensor, positions: Tensor) -> RowOrder:
    """Write the row of each slot into the tensors of a RowOrder."""
    num_tokens, top_k = expert_indices.shape
    num_blocks = positions.numel() - 1
    token_of_row, slot_of_row, slots, row_of_slot = (
        torch.empty(expert_indices.numel(), dtype=torch.int64, device=kept.device) for _ in range(4)
    )
    token_starts = torch.empty(num_tokens + 1, dtype=torch.int64, device=kept.device)
    launch(
        _place_kernel,
        (num_blocks,),
        expert_indices=expert_indices.contiguous(),
        kept=kept.contiguous(),
        starts=starts,
        positions=positions,
        token_of_row=token_of_row,
        slot_of_row=slot_of_row,
        slots=slots,
        row_of_slot=row_of_slot,
        token_starts=token_starts,
        num_slots=expert_indices.numel(),
        num_blocks=num_blocks,
        num_experts=num_experts,
        top_k=top_k,
        BLOCK=BLOCK_SLOTS,
        CHUNK=CHUNK_SLOTS,
        num_warps=8,
    )
    if num_blocks == 0:
        expert_offsets = torch.zeros(num_experts + 1, dtype=torch.int64, device=kept.device)
        token_starts.zero_()
    else:
        expert_offsets = starts[::num_blocks].contiguous()
    return RowOrder(token_of_row, slot_of_row, slots, row_of_slot, token_starts, expert_offsets)


def permute(x: Tensor, order: RowOrder) -> Tensor:
    """(T, D) -> (R, D)."""
    return gather(x, order)


def permute_backward(grad: Tensor, order: RowOrder) -> Tensor:
    """Each token's gradient is the sum over its rows. (R, D) -> (T, D)."""
    return sum_rows(grad, None, order)


def unpermute(rows: Tensor, weights: Tensor, order: RowOrder) -> Tensor:
    """(R, D), (T, K) -> (T, D)."""
    return sum_rows(rows, weights, order)


def unpermute_backward(grad: Tensor, rows: Tensor, weights: Tensor, order: RowOrder) -> tuple[Tensor, Tensor]:
    """Gradients of `rows` (R, D) and `weights` (T, K); a dropped slot's weight has gradient zero."""
    grad, rows = _unit_stride(grad), _unit_stride(rows)
    num_rows, d_model = rows.shape
    grad_rows = torch.empty(num_rows, d_model, dtype=rows.dtype, device=rows.device)
    grad_weights = torch.zeros(weights.shape, dtype=weights.dtype, device=weights.device)
    launch(
        _unpermute_backward_kernel,
        (num_rows,),
        grad=grad,
        rows=rows,
        weights=weights.contiguous(),
        token_of_row=order.token_of_row,
        slot_of_row=order.slot_of_row,
        num_rows=order.expert_offsets[-1:],
        grad_rows=grad_rows,
        grad_weights=grad_weights,
        width=d_model,
        stride_grad=grad.stride(0),
        stride_rows=rows.stride(0),
        ACCUMULATOR=_accumulator(rows),
        BLOCK=_block(d_model),
    )
    return grad_rows, grad_weights


def gather(x: Tensor, order: RowOrder) -> Tensor:
    """The token of each row. (T, D) -> (R, D)."""
    x = _unit_stride(x)
    num_rows, width = order.token_of_row.numel(), x.shape[1]
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    block = _block(width)
    launch(
        _gather_kernel,
        (num_rows, triton.cdiv(width, block)),
        x=x,
        tokens=order.token_of_row,
        num_rows=order.expert_offsets[-1:],
        out=out,
        width=width,
        stride_x=x.stride(0),
        BLOCK=block,
    )
    return out


def sum_rows(rows: Tensor, weights: Tensor | None, order: RowOrder) -> Tensor:
    """Each token's rows, times the weights of their slots, added in slot order. (R, D), (T, K) -> (T, D)."""
    rows = _unit_stride(rows)
    num_tokens, width = order.token_starts.numel() - 1, rows.shape[1]
    out = torch.empty(num_tokens, width, dtype=rows.dtype, device=rows.device)
    block = _block(width)
    launch(
        _sum_rows_kernel,
        (num_tokens, triton.cdiv(width, block)),
        rows=rows,
        weights=None if weights is None else weights.contiguous(),
        slots=order.slots,
        row_of_slot=order.row_of_slot,
        token_starts=order.token_starts,
        out=out,
        width=width,
        stride_rows=rows.stride(0),
        ACCUMULATOR=_accumulator(rows),
        BLOCK=block,
    )
    return out


def rehearsals() -> dict[str, Callable[[], None]]:
    """Calls that start every kernel here in every configuration, for the ahead-of-time compiler to record."""
    cases: dict[str, Callable[[], None]] = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
        cases[str(dtype).removeprefix("torch.")] = partial(_rehearse, dtype, 64, 2048)
    cases["512 experts"] = partial(_rehearse, torch.bfloat16, 512, 1024)
    cases["uneven"] = partial(_rehearse, torch.bfloat16, 60, 1000)
    return cases


def _rehearse(dtype: torch.dtype, num_experts: int, width: int) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    indices, kept = empty(4096, 2), empty(4096, 2, dtype=torch.bool)
    order = place(indices, kept, num_experts, *count(indices, kept, num_experts))
    x, weights = empty(4096, width, dtype=dtype), empty(4096, 2, dtype=torch.float32)
    rows = permute(x, order)
    unpermute(rows, weights, order)
    permute_backward(rows, order)
    unpermute_backward(x, rows, weights, order)


def _starts(counts: Tensor) -> Tensor:
    """The running sum before each entry, and the total at the end."""
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=starts[1:])
    return starts


def _unit_stride(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 or rows.numel() == 0 else rows.contiguous()


def _block(width: int) -> int:
    return power_of_2(width, lowest=16, highest=MOST_COLUMNS)


def _accumulator(rows: Tensor) -> tl.dtype:
    return tl.float64 if rows.dtype == torch.float64 else tl.float32


@triton.jit
def kept_experts(expert_indices, kept, slots, num_slots):
    """The experts of `slots`, and which of them are kept."""
    exists = slots < num_slots
    is_kept = tl.load(kept + slots, mask=exists, other=0).to(tl.int1)
    return tl.load(expert_indices + slots, mask=exists, other=0), is_kept & exists


@triton.jit
def _count_kernel(
    expert_indices,
    kept,
    counts,
    block_totals,
    num_slots,
    num_blocks,
    num_experts,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    block = tl.program_id(0)
    experts, is_kept = kept_experts(expert_indices, kept, block * BLOCK + tl.arange(0, BLOCK), num_slots)
    counted = is_kept & (experts >= 0) & (experts < num_experts)
    # slots that are not counted go to the bin after the experts, which is never read
    histogram = tl.histogram(tl.where(counted, experts, num_experts).to(tl.int32), BINS)
    bins = tl.arange(0, BINS)
    tl.store(counts + bins.to(tl.int64) * num_blocks + block, histogram.to(tl.int64), mask=bins < num_experts)
    tl.store(block_totals + block, tl.sum(is_kept.to(tl.int64), 0))


@triton.jit
def before_in_block(expert_indices, kept, experts, block, num_slots, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """How many kept slots come before each slot of a block: those of the same expert, and all."""
    within = tl.arange(0, BLOCK)
    experts = experts.to(tl.int32)
    equal_before = tl.zeros((BLOCK,), tl.int32)
    kept_before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, BLOCK, CHUNK):
        other = first + tl.arange(0, CHUNK)
        other_experts, other_kept = kept_experts(expert_indices, kept, block * BLOCK + other, num_slots)
        earlier = (other[None, :] < within[:, None]) & other_kept[None, :]
        kept_before += tl.sum(earlier.to(tl.int32), 1)
        equal_before += tl.sum((earlier & (other_experts.to(tl.int32)[None, :] == experts[:, None])).to(tl.int32), 1)
    return equal_before, kept_before


@triton.jit
def _place_kernel(
    expert_indices,
    kept,
    starts,
    positions,
    token_of_row,
    slot_of_row,
    slots,
    row_of_slot,
    token_starts,
    num_slots,
    num_blocks,
    num_experts,
    top_k,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    experts, is_kept = kept_experts(expert_indices, kept, slot, num_slots)
    equal_before, kept_before = before_in_block(expert_indices, kept, experts, block, num_slots, BLOCK, CHUNK)
    exists = slot < num_slots
    num_kept = tl.load(positions + num_blocks)
    position = tl.load(positions + block) + kept_before
    after_the_kept = num_kept + slot - position  # where the slot goes if it is dropped
    known = is_kept & (experts >= 0) & (experts < num_experts)  # others stop the device; here they are not read
    row = tl.load(starts + experts * num_blocks + block, mask=known, other=0) + equal_before
    row = tl.where(is_kept, row, after_the_kept)
    token = slot // top_k
    tl.store(token_of_row + row, token.to(tl.int64), mask=exists)
    tl.store(slot_of_row + row, slot.to(tl.int64), mask=exists)
    place = tl.where(is_kept, position, after_the_kept)
    tl.store(slots + place, slot.to(tl.int64), mask=exists)
    tl.store(row_of_slot + place, row, mask=exists)
    tl.store(token_starts + token, position, mask=exists & (slot % top_k == 0))
    tl.store(token_starts + token + 1, num_kept, mask=slot == num_slots - 1)


@triton.jit
def _gather_kernel(x, tokens, num_rows, out, width, stride_x, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(num_rows):  # of a dropped slot
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row)
    values = tl.load(x + token * stride_x + columns, mask=columns < width)
    tl.store(out + row * width + columns, values, mask=columns < width)


@triton.jit
def _sum_rows_kernel(
    rows,
    weights,
    slots,
    row_of_slot,
    token_starts,
    out,
    width,
    stride_rows,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(token_starts + token)
    end = tl.load(token_starts + token + 1)
    total = tl.zeros((BLOCK,), ACCUMULATOR)
    for i in range(start, end):
        row = tl.load(row_of_slot + i)
        values = tl.load(rows + row * stride_rows + columns, mask=columns < width, other=0.0).to(ACCUMULATOR)
        if weights is not None:
            values *= tl.load(weights + tl.load(slots + i)).to(ACCUMULATOR)
        total += values
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=columns < width)


@triton.jit
def _unpermute_backward_kernel(
    grad,
    rows,
    weights,
    token_of_row,
    slot_of_row,
    num_rows,
    grad_rows,
    grad_weights,
    width,
    stride_grad,
    stride_rows,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(num_rows):  # of a dropped slot
        return
    token = tl.load(token_of_row + row)
    slot = tl.load(slot_of_row + row)
    weight = tl.load(weights + slot).to(ACCUMULATOR)
    products = tl.zeros((BLOCK,), ACCUMULATOR)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        upstream = tl.load(grad + token * stride_grad + columns, mask=columns < width, other=0.0).to(ACCUMULATOR)
        values = tl.load(rows + row * stride_rows + columns, mask=columns < width, other=0.0).to(ACCUMULATOR)
        products += upstream * values
        scaled = (upstream * weight).to(grad_rows.dtype.element_ty)
        tl.store(grad_rows + row * width + columns, scaled, mask=columns < width)
    tl.store(grad_weights + slot, tl.sum(products, 0).to(grad_weights.dtype.element_ty))
