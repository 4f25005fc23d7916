"""How well a model predicts held-out text: nats per token, perplexity and bits per byte of each domain."""

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
    perplexity: float  # per token
    bits_per_byte: float  # all predicted tokens over the UTF-8 bytes of the text
    num_tokens: int
    num_bytes: int


class SplitScore(NamedTuple):
    """All domains of a split, and how many of its tokens each expert received."""

    domains: dict[str, DomainScore]
    tokens_per_expert: list[list[int]]  # [sparse layer][expert], over the whole split

    @property
    def dead_experts(self) -> int:
        """Experts, over all sparse layers, that received no token of the split."""
        return sum(count == 0 for layer in self.tokens_per_expert for count in layer)


@torch.no_grad()
def evaluate(
    model: Transformer, domains: Iterable[EvaluationWindows], *, precision: str = "fp32", world: World | None = None
) -> SplitScore:
    """Score every domain in non-overlapping windows, deterministic and without dropped tokens.

    precision: of autocast, "fp32" (off), "bf16" or "fp16". world: ranks that take turns with the batches; every one of
    them must call, and gets the score of all. Sums are in float64.
    """
    was_training = model.training
    model.eval()
    scores: dict[str, DomainScore] = {}
    expert_counts: list[Tensor] = []
    try:
        for windows in domains:
            scores[windows.domain], counts = _score_domain(model, windows, precision, world)
            expert_counts = [a + b for a, b in zip(expert_counts, counts, strict=True)] if expert_counts else counts
    finally:
        model.train(was_training)
    return SplitScore(scores, [counts.tolist() for counts in expert_counts])


def _score_domain(
    model: Transformer, windows: EvaluationWindows, precision: str, world: World | None
) -> tuple[DomainScore, list[Tensor]]:
    device = next(model.parameters()).device if world is None else world.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
    counts: list[Tensor] = []
    for batch in _own_batches(windows, world):
        tokens, targets, token_mask, document_ids = (
            field if field is None else field.to(device) for field in batch[:4]
        )
        with autocast(device, precision):
            output = model(tokens, targets, document_ids=document_ids, token_mask=token_mask)
        losses = output.token_losses.double()
        if token_mask is not None:
            losses = losses[token_mask]
        sums += torch.stack([losses.sum(), losses.new_tensor(losses.numel())])
        batch_counts = [routing.tokens_per_expert for routing in output.routings]
        counts = [a + b for a, b in zip(counts, batch_counts, strict=True)] if counts else batch_counts
    if world is not None:
        sums, counts = world.sum(sums), [world.sum(layer) for layer in counts]
    nats, num_tokens = sums.tolist()
    score = DomainScore(
        cross_entropy=nats / num_tokens,
        perplexity=math.exp(nats / num_tokens),
        bits_per_byte=nats / math.log(2.0) / windows.num_bytes,
        num_tokens=int(num_tokens),
        num_bytes=windows.num_bytes,
    )
    return score, counts


def _own_batches(windows: EvaluationWindows, world: World | None) -> Iterator[TokenBatch]:
    """Every world.size-th batch. All ranks get as many, to meet in every layer: the last may be all masked."""
    if world is None or world.size == 1:
        yield from windows
        return
    turn: list[TokenBatch] = []
    for batch in windows:
        turn.append(batch)
        if len(turn) == world.size:
            yield turn[world.rank]
            turn = []
    if turn:
        idle = turn[0]._replace(token_mask=torch.zeros_like(turn[0].tokens, dtype=torch.bool))
        yield turn[world.rank] if world.rank < len(turn) else idle
