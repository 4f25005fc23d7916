"""Loss on held-out text: nats per token, perplexity and bits per byte of each domain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe.data.loader import EvaluationWindows, TokenBatch
from moe.distributed.world import World
from moe.model import Transformer, autocast


class DomainScore(NamedTuple):
    """One domain of a held-out split."""

    cross_entropy: float  # nats per token, document separators included
    perplexity: float  # per token; inf if it overflows a float
    bits_per_byte: float  # of all predicted tokens, per UTF-8 byte of the text
    num_tokens: int
    num_bytes: int

    def figures(self) -> dict[str, float | None]:
        """All figures for JSON, with None for infinity and NaN, which JSON lacks."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


class DocumentLosses(NamedTuple):
    """Losses per document of a domain, in order, so that the same documents can be resampled for every model."""

    nats: list[float]  # of all predicted tokens, separator included
    num_tokens: list[int]


class SplitScore(NamedTuple):
    """All domains of a split, and the number of tokens each expert received."""

    domains: dict[str, DomainScore]
    expert_tokens: dict[str, list[list[int]]]  # by domain, [MoE layer][expert]; empty lists for a dense model
    documents: dict[str, DocumentLosses]  # by domain

    @property
    def tokens_per_expert(self) -> list[list[int]]:
        """[MoE layer][expert], over the whole split."""
        by_layer = zip(*self.expert_tokens.values(), strict=True)
        return [[sum(counts) for counts in zip(*layer, strict=True)] for layer in by_layer]

    @property
    def dead_experts(self) -> int:
        """Experts, over all MoE layers, that received no token of the split."""
        return sum(count == 0 for layer in self.tokens_per_expert for count in layer)


@torch.no_grad()
def evaluate(
    model: Transformer, domains: Iterable[EvaluationWindows], *, precision: str = "fp32", world: World | None = None
) -> SplitScore:
    """Score every domain in non-overlapping windows, deterministically and without dropped tokens.

    precision: of autocast, "fp32" (off), "bf16" or "fp16". world: ranks that take turns with the batches; all must
    call, and each gets the full score. Sums are in float64.
    """
    was_training = model.training
    model.eval()
    scores: dict[str, DomainScore] = {}
    expert_tokens: dict[str, list[list[int]]] = {}
    documents: dict[str, DocumentLosses] = {}
    try:
        for windows in domains:
            losses, counts = _losses(model, windows, precision, world)
            scores[windows.domain] = _score(losses, windows.num_bytes)
            documents[windows.domain] = losses_by_document(losses, windows.document_lengths)
            expert_tokens[windows.domain] = [layer.tolist() for layer in counts]
    finally:
        model.train(was_training)
    return SplitScore(scores, expert_tokens, documents)


def _losses(
    model: Transformer, windows: EvaluationWindows, precision: str, world: World | None
) -> tuple[Tensor, list[Tensor]]:
    """Loss of every token of a domain, in order, (N,) float64, and tokens per expert for each MoE layer."""
    device = next(model.parameters()).device if world is None else world.device
    num_ranks, rank = (1, 0) if world is None else (world.size, world.rank)
    losses: list[Tensor] = []  # one entry per batch; zeros for another rank's batch
    counts: list[Tensor] = []
    for turn in _turns(windows, num_ranks):
        # ranks run equally many batches, as all must meet in every layer: the last one may be fully masked
        own = turn[rank] if rank < len(turn) else turn[0]._replace(token_mask=torch.zeros_like(turn[0].tokens) > 0)
        tokens, targets, token_mask, document_ids = (field if field is None else field.to(device) for field in own[:4])
        with autocast(device, precision):
            output = model(tokens, targets, document_ids=document_ids, token_mask=token_mask)
        batch_counts = [routing.tokens_per_expert for routing in output.routings]
        counts = [a + b for a, b in zip(counts, batch_counts, strict=True)] if counts else batch_counts
        for place, batch in enumerate(turn):
            mask = None if batch.token_mask is None else batch.token_mask.to(device)
            size = batch.targets.numel() if mask is None else int(mask.sum())
            if place == rank:
                found = output.token_losses.double()
                losses.append(found.flatten() if mask is None else found[mask])
            else:
                losses.append(torch.zeros(size, dtype=torch.float64, device=device))
    everything = torch.cat(losses)
    if world is not None:  # each entry is 0 on all ranks but one
        everything, counts = world.sum(everything), [world.sum(layer) for layer in counts]
    return everything, counts


def _score(losses: Tensor, num_bytes: int) -> DomainScore:
    nats, num_tokens = float(losses.sum()), losses.numel()
    return DomainScore(
        cross_entropy=nats / num_tokens,
        perplexity=perplexity_of(nats / num_tokens),
        bits_per_byte=nats / math.log(2.0) / num_bytes,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
    )


def perplexity_of(nats: float) -> float:
    """exp of the mean nats per unit; infinity above 709 nats, where exp overflows (a diverged model)."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def losses_by_document(losses: Tensor, lengths: list[int]) -> DocumentLosses:
    """Sum the losses (N,) of all tokens, in order, over documents of the given lengths."""
    return DocumentLosses([float(part.sum()) for part in losses.cpu().split(lengths)], lengths)


def _turns(windows: EvaluationWindows, num_ranks: int) -> Iterator[list[TokenBatch]]:
    """Batches in groups of one per rank; the last group may be smaller."""
    turn: list[TokenBatch] = []
    for batch in windows:
        turn.append(batch)
        if len(turn) == num_ranks:
            yield turn
            turn = []
    if turn:
        yield turn
