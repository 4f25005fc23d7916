"""How well a model predicts held-out text: nats per token, perplexity and bits per byte of each domain."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from moe.data.loader import EvaluationWindows
from moe.model import Transformer


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
def evaluate(model: Transformer, domains: Iterable[EvaluationWindows], *, precision: str = "fp32") -> SplitScore:
    """Score every domain in non-overlapping windows, deterministic and without dropped tokens.

    precision: "fp32" or "bf16" (autocast). Sums are in float64.
    """
    was_training = model.training
    model.eval()
    scores: dict[str, DomainScore] = {}
    expert_counts: list[Tensor] = []
    try:
        for windows in domains:
            scores[windows.domain], counts = _score_domain(model, windows, precision)
            expert_counts = [a + b for a, b in zip(expert_counts, counts, strict=True)] if expert_counts else counts
    finally:
        model.train(was_training)
    return SplitScore(scores, [counts.tolist() for counts in expert_counts])


def _score_domain(model: Transformer, windows: EvaluationWindows, precision: str) -> tuple[DomainScore, list[Tensor]]:
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    num_tokens = 0
    counts: list[Tensor] = []
    for batch in windows:
        tokens, targets, token_mask, document_ids = (field if field is None else field.to(device) for field in batch)
        with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
            output = model(tokens, targets, document_ids=document_ids, token_mask=token_mask)
        losses = output.token_losses.double()
        nats += losses.sum() if token_mask is None else losses[token_mask].sum()
        num_tokens += losses.numel() if token_mask is None else int(token_mask.sum())
        batch_counts = [routing.tokens_per_expert for routing in output.routings]
        counts = [a + b for a, b in zip(counts, batch_counts, strict=True)] if counts else batch_counts
    total = float(nats)
    score = DomainScore(
        cross_entropy=total / num_tokens,
        perplexity=math.exp(total / num_tokens),
        bits_per_byte=total / math.log(2.0) / windows.num_bytes,
        num_tokens=num_tokens,
        num_bytes=windows.num_bytes,
    )
    return score, counts
