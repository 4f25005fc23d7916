"""Choosing experts on a GPU: scores, choice, weights and load from a single read of the logits.

A program holds the logits of a few tokens for all experts. Each round takes the largest one left, the first among
equals, by comparing rather than sorting: K rounds over E numbers in registers.
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
from ..permute import triton_impl as sorting
from ..permute.triton_impl import before_in_block, kept_experts

BLOCK_BYTES = 8192  # of a program's logits in the precision it computes in: 16 floats per thread of 4 warps


def top_k_experts(scores: Tensor, top_k: int) -> Tensor:
    """The `top_k` best experts of each token, best first, the lower of equals first. (T, E) -> (T, K) int64."""
    scores = scores.contiguous()
    num_tokens, num_experts = scores.shape
    indices = torch.empty(num_tokens, top_k, dtype=torch.int64, device=scores.device)
    block_t, block_e = _blocks(scores)
    launch(
        _top_k_kernel,
        (triton.cdiv(num_tokens, block_t),),
        scores=scores,
        indices=indices,
        num_tokens=num_tokens,
        num_experts=num_experts,
        TOP_K=top_k,
        BLOCK_K=power_of_2(top_k, lowest=1, highest=1 << 16),
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        ACCUMULATOR=_accumulator(scores),
    )
    return indices


def keep_within_capacity(expert_indices: Tensor, valid: Tensor, num_experts: int, capacity: Tensor) -> Tensor:
    """A choice is kept iff fewer than `capacity` valid choices of its expert come before it in (k, t) order."""
    experts, counted = expert_indices.T.contiguous(), valid.T.contiguous()  # (K, T): all first choices come first
    starts, _ = sorting.count(experts, counted, num_experts)
    kept = torch.empty(experts.shape, dtype=torch.bool, device=valid.device)
    num_blocks = triton.cdiv(experts.numel(), sorting.BLOCK_SLOTS)
    launch(
        _keep_kernel,
        (num_blocks,),
        expert_indices=experts,
        valid=counted,
        starts=starts,
        capacity=capacity,
        kept=kept,
        num_slots=experts.numel(),
        num_blocks=num_blocks,
        BLOCK=sorting.BLOCK_SLOTS,
        CHUNK=sorting.CHUNK_SLOTS,
        num_warps=8,
    )
    return kept.T


def route(
    logits: Tensor,
    valid: Tensor | None,
    top_k: int,
    softmax: bool,
    normalize: bool,
    weight_scale: float,
    smallest_sum: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities (T, E), experts (T, K), weights (T, K) and choices per expert (E,) of `op.top_k_routing`."""
    logits = logits.contiguous()
    num_tokens, num_experts = logits.shape
    block_t, block_e = _blocks(logits)
    num_blocks = triton.cdiv(num_tokens, block_t)
    probs = torch.empty_like(logits)
    indices = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, top_k, dtype=logits.dtype, device=logits.device)
    counts = torch.empty(num_blocks, num_experts, dtype=torch.int64, device=logits.device)
    launch(
        _route_kernel,
        (num_blocks,),
        logits=logits,
        valid=None if valid is None else valid.contiguous(),
        probs=probs,
        indices=indices,
        weights=weights,
        counts=counts,
        num_tokens=num_tokens,
        num_experts=num_experts,
        WEIGHT_SCALE=weight_scale,  # a constant, since a launch passes floats in 32 bits
        TOP_K=top_k,
        BLOCK_K=power_of_2(top_k, lowest=1, highest=1 << 16),
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        ACCUMULATOR=_accumulator(logits),
        SOFTMAX=softmax,
        NORMALIZE=normalize,
        SMALLEST=smallest_sum,
    )
    return probs, indices, weights, counts.sum(dim=0)


def route_backward(
    grad_probs: Tensor,
    grad_weights: Tensor,
    probs: Tensor,
    indices: Tensor,
    valid: Tensor | None,
    softmax: bool,
    normalize: bool,
    weight_scale: float,
    smallest_sum: float,
) -> Tensor:
    """The gradient of the logits (T, E) from those of the probabilities (T, E) and the weights (T, K)."""
    num_tokens, num_experts = probs.shape
    block_t, block_e = _blocks(probs)
    grad_logits = torch.empty_like(probs)
    launch(
        _route_backward_kernel,
        (triton.cdiv(num_tokens, block_t),),
        grad_probs=grad_probs.contiguous(),
        grad_weights=grad_weights.contiguous(),
        probs=probs,
        indices=indices,
        valid=None if valid is None else valid.contiguous(),
        grad_logits=grad_logits,
        num_tokens=num_tokens,
        num_experts=num_experts,
        WEIGHT_SCALE=weight_scale,  # a constant, since a launch passes floats in 32 bits
        TOP_K=indices.shape[1],
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        ACCUMULATOR=_accumulator(probs),
        SOFTMAX=softmax,
        NORMALIZE=normalize,
        SMALLEST=smallest_sum,
    )
    return grad_logits


def rehearsals() -> dict[str, Callable[[], None]]:
    """Calls that start every kernel here in every configuration, for the ahead-of-time compiler to record."""
    cases: dict[str, Callable[[], None]] = {}
    for num_experts, top_k in ((8, 2), (512, 2), (128, 8), (1024, 16), (60, 4)):
        cases[f"top {top_k} of {num_experts}"] = partial(_rehearse, torch.float32, num_experts, top_k)
    for dtype in (torch.bfloat16, torch.float64):
        cases[str(dtype).removeprefix("torch.")] = partial(_rehearse, dtype, 64, 2)
    return cases


def _rehearse(dtype: torch.dtype, num_experts: int, top_k: int) -> None:
    logits = torch.empty(4096, num_experts, dtype=dtype, device="meta")
    valid = torch.empty(4096, dtype=torch.bool, device="meta")
    top_k_experts(logits, top_k)
    keep_within_capacity(
        torch.empty(4096, top_k, dtype=torch.int64, device="meta"),
        torch.empty(4096, top_k, dtype=torch.bool, device="meta"),
        num_experts,
        torch.empty((), dtype=torch.int64, device="meta"),
    )
    for softmax in (True, False):
        probs, indices, weights, _ = route(logits, valid, top_k, softmax, True, 2.5, 1e-7)
        route_backward(probs, weights, probs, indices, valid, softmax, True, 2.5, 1e-7)


def _blocks(scores: Tensor) -> tuple[int, int]:
    """Tokens and experts per program."""
    block_e = power_of_2(scores.shape[1], lowest=16, highest=1 << 16)
    return max(1, BLOCK_BYTES // (max(scores.element_size(), 4) * block_e)), block_e


def _accumulator(scores: Tensor) -> tl.dtype:
    return tl.float64 if scores.dtype == torch.float64 else tl.float32


@triton.jit
def choose_best(scores, free, experts, BLOCK_E: tl.constexpr):
    """The free expert with the highest score, the first among equals. Callers replace NaN by infinity."""
    left = tl.where(free, scores, float("-inf"))
    best = tl.max(left, 1)
    return tl.min(tl.where(free & (left == best[:, None]), experts[None, :], BLOCK_E), 1)


@triton.jit
def load_scores(pointer, tokens, experts, num_tokens, num_experts, ACCUMULATOR: tl.constexpr):
    """Scores of `tokens` (BLOCK_T, BLOCK_E), -inf where there is no entry; which entries exist; their offsets."""
    exists = (tokens < num_tokens)[:, None] & (experts < num_experts)[None, :]
    places = tokens[:, None].to(tl.int64) * num_experts + experts[None, :]
    return tl.load(pointer + places, mask=exists, other=float("-inf")).to(ACCUMULATOR), exists, places


@triton.jit
def _top_k_kernel(
    scores,
    indices,
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    choices = tl.arange(0, BLOCK_K)
    values, _, _ = load_scores(scores, tokens, experts, num_tokens, num_experts, ACCUMULATOR)
    values = tl.where(values != values, float("inf"), values)
    free = (tokens >= 0)[:, None] & (experts < num_experts)[None, :]
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for k in range(TOP_K):
        best = choose_best(values, free, experts, BLOCK_E)
        free = free & (experts[None, :] != best[:, None])
        chosen = tl.where(choices[None, :] == k, best[:, None], chosen)
    written = (tokens < num_tokens)[:, None] & (choices < TOP_K)[None, :]
    tl.store(indices + tokens[:, None] * TOP_K + choices[None, :], chosen.to(tl.int64), mask=written)


@triton.jit
def _keep_kernel(
    expert_indices, valid, starts, capacity, kept, num_slots, num_blocks, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    block = tl.program_id(0)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    experts, is_valid = kept_experts(expert_indices, valid, slots, num_slots)
    equal_before, _ = before_in_block(expert_indices, valid, experts, block, num_slots, BLOCK, CHUNK)
    first = tl.load(starts + experts * num_blocks, mask=is_valid, other=0)  # of the expert, over all blocks
    place = tl.load(starts + experts * num_blocks + block, mask=is_valid, other=0) - first + equal_before
    tl.store(kept + slots, (place < tl.load(capacity)) & is_valid, mask=slots < num_slots)


@triton.jit
def _route_kernel(
    logits, valid, probs, indices, weights, counts, num_tokens, num_experts,
    TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    ACCUMULATOR: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, SMALLEST: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    choices = tl.arange(0, BLOCK_K)
    values, exists, places = load_scores(logits, tokens, experts, num_tokens, num_experts, ACCUMULATOR)
    if SOFTMAX:
        # a token that does not exist has only -inf, and -inf - -inf would be NaN
        largest = tl.where(tokens < num_tokens, tl.max(values, 1), 0.0)
        powers = tl.exp(values - largest[:, None])
        p = powers / tl.where(tokens < num_tokens, tl.sum(powers, 1), 1.0)[:, None]
    else:
        p = 1.0 / (1.0 + tl.exp(-values))
    tl.store(probs + places, p.to(probs.dtype.element_ty), mask=exists)
    counted = tokens < num_tokens
    if valid is not None:
        counted = counted & tl.load(valid + tokens, mask=counted, other=0).to(tl.int1)
    values = tl.where(values != values, float("inf"), values)
    free = (tokens >= 0)[:, None] & (experts < num_experts)[None, :]
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    chosen_p = tl.zeros((BLOCK_T, BLOCK_K), ACCUMULATOR)
    for k in range(TOP_K):
        best = choose_best(values, free, experts, BLOCK_E)
        is_best = experts[None, :] == best[:, None]
        best_p = tl.sum(tl.where(is_best, p, 0.0), 1)
        free = free & (is_best == 0)
        chosen = tl.where(choices[None, :] == k, best[:, None], chosen)
        chosen_p = tl.where((choices[None, :] == k) & counted[:, None], best_p[:, None], chosen_p)
    if NORMALIZE:
        # as a tensor of the accumulator's type: a bare constant is rounded to 32 bits first
        chosen_p = chosen_p / tl.maximum(tl.sum(chosen_p, 1), tl.full((1,), SMALLEST, ACCUMULATOR))[:, None]
    written = (tokens < num_tokens)[:, None] & (choices < TOP_K)[None, :]
    at = tokens[:, None] * TOP_K + choices[None, :]
    tl.store(indices + at, chosen.to(tl.int64), mask=written)
    chosen_p *= tl.full((1, 1), WEIGHT_SCALE, ACCUMULATOR)
    tl.store(weights + at, chosen_p.to(weights.dtype.element_ty), mask=written)
    taken = (free == 0) & (experts < num_experts)[None, :] & counted[:, None]
    load = tl.sum(taken.to(tl.int32), 0).to(tl.int64)
    tl.store(counts + tl.program_id(0).to(tl.int64) * num_experts + experts, load, mask=experts < num_experts)


@triton.jit
def _route_backward_kernel(
    grad_probs, grad_weights, probs, indices, valid, grad_logits, num_tokens, num_experts,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    ACCUMULATOR: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, SMALLEST: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    here = tokens < num_tokens
    exists = here[:, None] & (experts < num_experts)[None, :]
    places = tokens[:, None].to(tl.int64) * num_experts + experts[None, :]
    p = tl.load(probs + places, mask=exists, other=0.0).to(ACCUMULATOR)
    grad_p = tl.load(grad_probs + places, mask=exists, other=0.0).to(ACCUMULATOR)
    counted = here
    if valid is not None:
        counted = here & tl.load(valid + tokens, mask=here, other=0).to(tl.int1)
    chosen = (tokens < 0)[:, None] & (experts < 0)[None, :]
    grad_w = tl.zeros((BLOCK_T, BLOCK_E), ACCUMULATOR)  # of the chosen, at their experts' columns
    for k in range(TOP_K):
        expert = tl.load(indices + tokens * TOP_K + k, mask=counted, other=-1)
        g = tl.load(grad_weights + tokens * TOP_K + k, mask=counted, other=0.0).to(ACCUMULATOR)
        is_expert = experts[None, :] == expert[:, None]
        chosen = chosen | is_expert
        grad_w = tl.where(is_expert, g[:, None] * tl.full((1, 1), WEIGHT_SCALE, ACCUMULATOR), grad_w)
    if NORMALIZE:  # w = p / s with s = Σ p of the chosen, so that ∂L/∂p = (g - Σ g p / s) / s
        total = tl.sum(tl.where(chosen, p, 0.0), 1)
        smallest = tl.full((1,), SMALLEST, ACCUMULATOR)
        mean = tl.where(total > smallest, tl.sum(grad_w * p, 1) / tl.maximum(total, smallest), 0.0)
        grad_w = tl.where(chosen, grad_w - mean[:, None], 0.0) / tl.maximum(total, smallest)[:, None]
    grad_p += grad_w
    grad = p * (grad_p - tl.sum(grad_p * p, 1)[:, None]) if SOFTMAX else grad_p * p * (1.0 - p)
    tl.store(grad_logits + places, grad.to(grad_logits.dtype.element_ty), mask=exists)
