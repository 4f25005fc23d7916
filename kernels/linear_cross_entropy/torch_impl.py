"""The fast portable path: a few hundred tokens at a time, so that (T, V) logits never exist.

On a CPU the forward also computes the gradients, while a chunk's probabilities are at hand. It cannot know the upstream
gradient of each loss. Hidden's gradient needs it only afterwards, as a factor per row; weight's is a sum over tokens,
computed for "1 at the tokens that count, 0 elsewhere". The upstream gradient of a mean is a multiple of that: one
factor. For any other, the backward recomputes the logits and weight's gradient: two GEMMs more and always right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import onednn

_CHUNK_NUMBERS = 2**19  # of a product that is accumulated in another dtype: 2 MB of float32
CHUNK_TOKENS = 512  # a chunk of float32 logits is 8 MB at V=4096: it stays in a last-level cache


class Chunk(NamedTuple):
    """Buffers of one chunk of tokens; the next chunk overwrites them."""

    part: slice  # of the tokens
    logits: Tensor  # (chunk, V), at least float32
    probs: Tensor  # (chunk, V), at least float32
    slopes: Tensor  # (chunk, V), in the dtype of hidden: room for the logits' gradient


def makes_gradients(hidden: Tensor) -> bool:
    """Whether `forward` can make gradients for `backward` to scale.

    Not on a GPU, where checking the upstream gradient would make the host wait, and not in float16, where small
    probabilities vanish unless first multiplied by the upstream gradient, with its loss scale.
    """
    return hidden.device.type == "cpu" and hidden.dtype != torch.float16


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, counted: Tensor | None, *, for_hidden: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (T,) and log-sum-exp of the logits (T,), in at least float32, and the `units` that `backward` takes.

    All products are in the dtype of hidden.

    The units are hidden's gradient (T, D) for an upstream gradient of 1, in the dtype of hidden, and weight's (V, D)
    for 1 at the `counted` tokens (None: all) and 0 elsewhere, in at least float32; empty if not requested.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    log_sums = torch.empty_like(losses)
    unit_hidden = torch.empty(hidden.shape if for_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    unit_weight = torch.zeros(weight.shape if for_weight else 0, dtype=wide, device=weight.device)
    weight = weight.to(hidden.dtype)
    for chunk in _chunks(hidden, weight):
        part, logits, probs, _ = chunk
        # the largest probability is 1 / Σ exp(logit - largest): it never underflows, and its log needs no extra pass
        log_sums[part] = logits.amax(dim=1) - probs.amax(dim=1).log_()
        losses[part] = log_sums[part] - logits.gather(1, targets[part, None]).squeeze(1)
        if not (for_hidden or for_weight):
            continue
        slopes = _slopes(chunk, targets)
        if for_hidden:
            _multiply(slopes, weight, unit_hidden[part])
        if for_weight:
            rows = hidden[part] if counted is None else hidden[part] * counted[part, None]
            _add_product(unit_weight, slopes, rows)
    return losses, log_sums, unit_hidden, unit_weight


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    counted: Tensor | None,
    units: tuple[Tensor, Tensor],
    *,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden (T, D) and weight (V, D), empty where not requested.

    The logits' gradient is grad_t (softmax - one-hot). The units are scaled where they apply, and stay unchanged for
    another backward.
    """
    unit_hidden, unit_weight = units
    grad_hidden, grad_weight = hidden.new_empty(0), weight.new_empty(0)
    if for_hidden and unit_hidden.shape == hidden.shape:
        grad_hidden, for_hidden = (unit_hidden * grad[:, None]).to(hidden.dtype), False
    if for_weight and unit_weight.shape == weight.shape:
        factor = _common_factor(grad, counted)
        if factor is not None:
            grad_weight, for_weight = (unit_weight * factor).to(weight.dtype), False
    if for_hidden:
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if for_weight:
        # accumulating in low precision would lose small chunks to rounding
        grad_weight = torch.zeros(weight.shape, dtype=grad.dtype, device=weight.device)
    if not (for_hidden or for_weight):
        return grad_hidden, grad_weight
    rounded = weight.to(hidden.dtype)
    for chunk in _chunks(hidden, rounded):
        slopes = _slopes(chunk, targets, grad)
        if for_hidden:
            _multiply(slopes, rounded, grad_hidden[chunk.part])
        if for_weight:
            _add_product(grad_weight, slopes, hidden[chunk.part])
    return grad_hidden, grad_weight.to(weight.dtype)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[Chunk]:
    num_tokens, size = hidden.shape[0], (min(CHUNK_TOKENS, hidden.shape[0]), weight.shape[0])
    wide = torch.promote_types(hidden.dtype, torch.float32)
    product, probs = hidden.new_empty(size), hidden.new_empty(size, dtype=wide)
    logits = product if hidden.dtype == wide else hidden.new_empty(size, dtype=wide)
    slopes = probs if hidden.dtype == wide else product
    for start in range(0, num_tokens, CHUNK_TOKENS):
        part = slice(start, min(start + CHUNK_TOKENS, num_tokens))
        chunk = Chunk(part, *(buffer[: part.stop - start] for buffer in (logits, probs, slopes)))
        torch.mm(hidden[part], weight.T, out=product[: part.stop - start])
        if logits is not product:
            chunk.logits.copy_(product[: part.stop - start])
        torch.softmax(chunk.logits, dim=1, out=chunk.probs)
        yield chunk


def _slopes(chunk: Chunk, targets: Tensor, grad: Tensor | None = None) -> Tensor:
    """The gradient of the logits, (softmax - one-hot) grad_t, in the dtype of hidden. Overwrites the probabilities."""
    _, _, probs, slopes = chunk
    probs.scatter_add_(1, targets[chunk.part, None], probs.new_full((len(probs), 1), -1.0))
    if grad is not None:
        probs.mul_(grad[chunk.part, None])
    return probs if slopes is probs else slopes.copy_(probs)


def _multiply(slopes: Tensor, weight: Tensor, out: Tensor) -> None:
    """slopes @ weight into `out`: (chunk, V), (V, D) -> (chunk, D)."""
    if onednn.wins(slopes.dtype, slopes.device.type, slopes.numel() * weight.shape[1]):
        onednn.grouped_products(slopes, [weight.T], [(0, 0, len(slopes))], out)
    else:
        torch.mm(slopes, weight, out=out)


def _add_product(total: Tensor, slopes: Tensor, rows: Tensor) -> None:
    """total (V, D) += slopesᵀ rows."""
    if total.dtype == slopes.dtype:
        total.addmm_(slopes.T, rows)
        return
    # in low precision, the product for a part of the vocabulary is converted and added while still in the cache
    size = min(len(total), max(1, _CHUNK_NUMBERS // rows.shape[1]))
    product, wide = rows.new_empty(size, rows.shape[1]), total.new_empty(size, rows.shape[1])
    for some, part in zip(total.split(size), slopes.T.split(size), strict=True):
        torch.mm(part, rows, out=product[: len(some)])
        some.add_(wide[: len(some)].copy_(product[: len(some)]))


def _common_factor(grad: Tensor, counted: Tensor | None) -> Tensor | None:
    """The scalar c with grad = c · counted; None if there is none, as for gradients that hold NaN."""
    if counted is None:
        factor = grad[:1].sum()  # 0 for no tokens
        return factor if bool((grad == factor).all()) else None
    factor = grad[counted][:1].sum()
    return factor if torch.equal(grad, counted * factor) else None
