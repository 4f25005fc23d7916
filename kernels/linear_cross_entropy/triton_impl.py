"""The output projection and the cross-entropy on a GPU: logits live in registers, one tile at a time.

Forward: each tile of logits is reduced to its log-sum-exp, one number per token and column tile. Backward: for a chunk
of tokens, each tile is recomputed and turned into the gradient of its logits, from which two plain products make the
gradients. (T, V) numbers never exist.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# what Triton compiles has no Python types: its arguments are pointers, numbers and constants

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grouped_gemm.triton_tiles import (
    HALF_TILES,
    SINGLE_TILES,
    Tile,
    add_product,
    choose_tile,
    place_of,
    tile_arguments,
    unit_stride,
)
from ..launch import launch, num_programs

CHUNK_TOKENS = 4096  # of the backward: tall enough for its products, 400 MB of bfloat16 at V=50k


def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (T,) and log-sum-exp of the logits (T,), at least float32. A target outside the vocabulary gives NaN."""
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    tile = _tile(num_tokens, vocab_size, hidden)
    parts = torch.empty(triton.cdiv(vocab_size, tile.columns), num_tokens, dtype=wide, device=hidden.device)
    target_logits = torch.full((num_tokens,), float("nan"), dtype=wide, device=hidden.device)
    launch(
        _log_sums_kernel,
        (0 if num_tokens == 0 else num_programs(hidden.device, tile.per_processor),),
        **_logits_arguments(hidden, weight, tile, _log_sums_kernel),
        targets=targets.contiguous(),
        parts=parts,
        target_logits=target_logits,
    )
    log_sums = parts.logsumexp(dim=0)
    return log_sums - target_logits, log_sums


def backward(grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of hidden (T, D) and weight (V, D): the logits' gradient is grad_t (softmax - one-hot)."""
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    # accumulating in low precision would lose small chunks to rounding
    grad_weight = torch.zeros(weight.shape, dtype=log_sums.dtype, device=weight.device)
    for start in range(0, hidden.shape[0], CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        grad_logits = logit_gradients(grad[part], hidden[part], weight, targets[part], log_sums[part])
        torch.mm(grad_logits, weight, out=grad_hidden[part])
        grad_weight += grad_logits.T @ hidden[part]
        del grad_logits  # else the next chunk's would be allocated beside it
    return grad_hidden, grad_weight.to(weight.dtype)


def logit_gradients(grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, log_sums: Tensor) -> Tensor:
    """grad_t (softmax - one-hot) of one chunk, in the dtype of hidden. (chunk, V)"""
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    tile = _tile(num_tokens, vocab_size, hidden)
    out = torch.empty(num_tokens, vocab_size, dtype=hidden.dtype, device=hidden.device)
    launch(
        _logit_gradients_kernel,
        (0 if num_tokens == 0 else num_programs(hidden.device, tile.per_processor),),
        **_logits_arguments(hidden, weight, tile, _logit_gradients_kernel),
        targets=targets.contiguous(),
        grad=grad.contiguous(),
        log_sums=log_sums.contiguous(),
        out=out,
    )
    return out


def rehearsals() -> dict[str, Callable[[], None]]:
    """Calls that start every kernel here in every configuration, for the ahead-of-time compiler to record."""
    cases: dict[str, Callable[[], None]] = {}
    for num_tokens in (65536, 64, 32, 8):
        cases[f"bfloat16 T={num_tokens}"] = partial(_rehearse, torch.bfloat16, num_tokens, 50304, 1024)
    cases["bfloat16 V=50257"] = partial(_rehearse, torch.bfloat16, 65536, 50257, 1024)
    cases["float16"] = partial(_rehearse, torch.float16, 65536, 50304, 1024)
    cases["float64"] = partial(_rehearse, torch.float64, 65536, 50304, 1024)
    cases["float32"] = partial(_rehearse, torch.float32, 65536, 50304, 1024)
    return cases


def _rehearse(dtype: torch.dtype, num_tokens: int, vocab_size: int, width: int) -> None:
    hidden = torch.empty(num_tokens, width, dtype=dtype, device="meta")
    weight = torch.empty(vocab_size, width, dtype=dtype, device="meta")
    targets = torch.empty(num_tokens, dtype=torch.int64, device="meta")
    losses, log_sums = forward(hidden, weight, targets)
    logit_gradients(losses, hidden, weight, targets, log_sums)


def _tile(num_tokens: int, vocab_size: int, hidden: Tensor) -> Tile:
    tile = choose_tile(num_tokens, 1, vocab_size, hidden.shape[1], hidden.dtype)
    if vocab_size % 16 and hidden.shape[1] % 64 == 0 and hidden.dtype.itemsize <= 4:
        # a vocabulary such as 50257: only the stores are narrow, not the loads of the products
        tile = (HALF_TILES if hidden.dtype.itemsize == 2 else SINGLE_TILES)[2 if num_tokens > 64 else 0]
        tile = tile._replace(columns=64)
    return tile._replace(max_registers=None)  # the epilogue needs more than a plain product's


def _logits_arguments(hidden: Tensor, weight: Tensor, tile: Tile, kernel: Any) -> dict[str, Any]:
    hidden = unit_stride(hidden)
    return {
        "hidden": hidden,
        "weight": weight,
        "num_tokens": hidden.shape[0],
        "N": weight.shape[0],
        "K": weight.shape[1],
        "stride_hidden": hidden.stride(0),
        "stride_bn": weight.stride(0),
        "stride_bk": weight.stride(1),
        **tile_arguments(tile, weight.shape[0], weight.shape[1], hidden.dtype, kernel),
        "PROGRAMS": num_programs(hidden.device, tile.per_processor),
    }


@triton.jit
def logits_of(
    tile, hidden, weight, num_tokens, N, K, stride_hidden, stride_bn, stride_bk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Tokens, words and logits of a tile, and its column tile. Logits of words outside the vocabulary are -inf."""
    m_tile, n_tile = place_of(tile, tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    tokens = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    words = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = hidden + tl.minimum(tokens, num_tokens - 1).to(tl.int64) * stride_hidden
    # from the tile's first word, so that offsets within it fit in 32 bits
    first = weight + (n_tile * BLOCK_N).to(tl.int64) * stride_bn
    logits = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    logits = add_product(
        logits, begin, first, tl.arange(0, BLOCK_N), N - n_tile * BLOCK_N, K, stride_bn, stride_bk,
        BLOCK_K, EVEN_N, EVEN_K, PRECISION, UPCAST,
    )  # fmt: skip
    if not EVEN_N:
        logits = tl.where((words < N)[None, :], logits, float("-inf"))
    return tokens, words, logits, n_tile


@triton.jit
def _log_sums_kernel(
    hidden, weight, targets, parts, target_logits, num_tokens, N, K, stride_hidden, stride_bn, stride_bk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_M) * tl.cdiv(N, BLOCK_N), PROGRAMS):
        tokens, words, logits, n_tile = logits_of(
            tile, hidden, weight, num_tokens, N, K, stride_hidden, stride_bn, stride_bk, BLOCK_M, BLOCK_N, BLOCK_K,
            EVEN_N, EVEN_K, GROUP_M, ACCUMULATOR, PRECISION, UPCAST,
        )  # fmt: skip
        here = tokens < num_tokens
        target = tl.load(targets + tokens, mask=here, other=-1)
        is_target = (words[None, :] == target[:, None]) & (words < N)[None, :]
        # at most one word of a row is its target, so only the one tile that holds it writes
        found = tl.sum(is_target.to(tl.int32), 1) > 0
        tl.store(target_logits + tokens, tl.sum(tl.where(is_target, logits, 0.0), 1), mask=here & found)
        largest = tl.max(logits, 1)
        log_sum = largest + tl.log(tl.sum(tl.exp(logits - largest[:, None]), 1))
        tl.store(parts + n_tile.to(tl.int64) * num_tokens + tokens, log_sum, mask=here)


@triton.jit
def _logit_gradients_kernel(
    hidden, weight, targets, grad, log_sums, out, num_tokens, N, K, stride_hidden, stride_bn, stride_bk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_M) * tl.cdiv(N, BLOCK_N), PROGRAMS):
        tokens, words, logits, _ = logits_of(
            tile, hidden, weight, num_tokens, N, K, stride_hidden, stride_bn, stride_bk, BLOCK_M, BLOCK_N, BLOCK_K,
            EVEN_N, EVEN_K, GROUP_M, ACCUMULATOR, PRECISION, UPCAST,
        )  # fmt: skip
        here = tokens < num_tokens
        target = tl.load(targets + tokens, mask=here, other=-1)
        log_sum = tl.load(log_sums + tokens, mask=here, other=0.0)
        upstream = tl.load(grad + tokens, mask=here, other=0.0).to(ACCUMULATOR)
        slope = tl.exp(logits - log_sum[:, None])
        slope = tl.where(words[None, :] == target[:, None], slope - 1.0, slope) * upstream[:, None]
        first = tl.min(tokens, 0)  # offsets from the tile's first token fit in 32 bits
        places = (tokens - first)[:, None] * N + words[None, :]
        tl.store(
            out + first.to(tl.int64) * N + places,
            slope.to(out.dtype.element_ty),
            mask=here[:, None] & (words < N)[None, :],
        )
