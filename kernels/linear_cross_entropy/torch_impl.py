"""The fast portable path: a few hundred tokens at a time, so that (T, V) logits never exist.

The backward computes each chunk's logits again instead of keeping them: one GEMM more, T·V numbers less.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_TOKENS = 512  # a chunk of float32 logits is 8 MB at V=4096: it stays in a last-level cache


def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (T,) and log-sum-exp of the logits (T,), at least float32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    log_sums = torch.empty_like(losses)
    for start, end, logits in _chunks_of_logits(hidden, weight):
        log_sums[start:end] = logits.logsumexp(dim=1)
        losses[start:end] = log_sums[start:end] - logits.gather(1, targets[start:end, None]).squeeze(1)
    return losses, log_sums


def backward(grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of hidden (T, D) and weight (V, D): the logits' is grad_t (softmax - one-hot)."""
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    # low precision would lose small chunks to rounding if they were added up in it
    grad_weight = torch.zeros(weight.shape, dtype=log_sums.dtype, device=weight.device)
    for start, end, logits in _chunks_of_logits(hidden, weight):
        probs = logits.sub_(log_sums[start:end, None]).exp_()  # (chunk, V)
        probs.scatter_add_(1, targets[start:end, None], probs.new_full((end - start, 1), -1.0))
        grad_logits = probs.mul_(grad[start:end, None]).to(hidden.dtype)
        torch.mm(grad_logits, weight, out=grad_hidden[start:end])
        if grad_weight.dtype == hidden.dtype:
            grad_weight.addmm_(grad_logits.T, hidden[start:end])
        else:
            grad_weight += grad_logits.T @ hidden[start:end]
    return grad_hidden, grad_weight.to(weight.dtype)


def _chunks_of_logits(hidden: Tensor, weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(start, end, logits (chunk, V)), at least float32; one buffer serves all chunks, so use each at once."""
    num_tokens = hidden.shape[0]
    buffer = hidden.new_empty(min(CHUNK_TOKENS, num_tokens), weight.shape[0])
    for start in range(0, num_tokens, CHUNK_TOKENS):
        end = min(start + CHUNK_TOKENS, num_tokens)
        logits = torch.mm(hidden[start:end], weight.T, out=buffer[: end - start])
        yield start, end, logits.to(torch.promote_types(hidden.dtype, torch.float32))
