"""Auxiliary losses and statistics of routing: pure functions of a Routing, so recompute cannot count them twice."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe.layers.router import Routing, count_assignments


def load_balance_loss(routing: Routing, choices: str = "all", scope: str = "local") -> Tensor:
    """E · Σ_e mean_prob_e · f_e (GShard, Switch Transformer eq. 4): 1 at perfect balance, at most E. A scalar.

    f_e is the share of the assignments that go to expert e, before drops and without gradient: of all K ("all") or
    of first choices only ("first", the paper's, moe_lm.md 4.4). mean_prob_e is the mean over valid tokens of the
    probabilities, which are normalised to sum 1 for a token. scope: "local" takes all tokens of the routing as one
    group; "sequence" takes each sequence by itself and averages over them by valid tokens. Zero when every token is
    masked. Raises ValueError for unknown names.
    """
    if choices not in ("all", "first"):
        raise ValueError(f"choices ({choices!r}) must be one of: all, first")
    if scope not in ("local", "sequence"):
        raise ValueError(f"scope ({scope!r}) must be one of: local, sequence")
    num_experts = routing.router_probs.shape[1]
    wide = torch.promote_types(routing.router_probs.dtype, torch.float32)
    probs = routing.router_probs.to(wide)
    probs = probs / probs.sum(dim=1, keepdim=True)
    indices = routing.expert_indices[:, :1] if choices == "first" else routing.expert_indices
    if scope == "local" or routing.sequence_ids is None:
        counts = (
            routing.tokens_per_expert
            if choices == "all"
            else count_assignments(indices, routing.token_mask, num_experts)
        )
        shares = counts.to(wide) / counts.sum().clamp_min(1)  # (E,)
        return num_experts * (_masked_mean(probs, routing.token_mask) * shares).sum()
    return _sequence_balance(probs, indices, routing, num_experts)


def router_z_loss(routing: Routing) -> Tensor:
    """mean over valid tokens of logsumexp(router_logits)² (ST-MoE, eq. 5). A scalar; zero if all are masked."""
    wide = torch.promote_types(routing.router_logits.dtype, torch.float32)
    squares = routing.router_logits.to(wide).logsumexp(dim=1).square()  # (T,)
    return _masked_mean(squares, routing.token_mask)


class RoutingStatistics(NamedTuple):
    """How the experts of one layer were used. Tensors, so that reading them is the caller's moment to wait."""

    num_tokens: Tensor  # valid ones
    tokens_per_expert: Tensor  # (E,) int64 assignments before drops
    load_max_over_mean: Tensor  # rows of the busiest expert over the mean
    load_cv: Tensor  # standard deviation of the rows per expert over the mean
    entropy: Tensor  # nats, of a token's router probabilities, mean over valid tokens
    dropped_fraction: Tensor  # of all choices of valid tokens
    dropped_per_choice: Tensor  # (K,) the same for first choices, second choices, ...
    dead_experts: Tensor  # experts without an assignment


@torch.no_grad()
def routing_statistics(routing: Routing) -> RoutingStatistics:
    """Statistics of one routing; all zeros for one without valid tokens."""
    probs = routing.router_probs.float()
    probs = probs / probs.sum(dim=1, keepdim=True)
    entropy = _masked_mean(torch.special.entr(probs).sum(dim=1), routing.token_mask)
    dropped = _masked_mean((~routing.kept).float(), routing.token_mask)  # (K,)
    mask = routing.token_mask
    num_tokens = torch.tensor(routing.kept.shape[0], device=probs.device) if mask is None else mask.sum()
    return _summarize(num_tokens, routing.tokens_per_expert, entropy, dropped)


@torch.no_grad()
def merge_statistics(parts: list[RoutingStatistics]) -> RoutingStatistics:
    """The statistics of several routings of one layer (micro-batches) as if they were one."""
    num_tokens = torch.stack([part.num_tokens for part in parts])
    weights = num_tokens.float() / num_tokens.sum().clamp_min(1)
    entropy = (torch.stack([part.entropy for part in parts]) * weights).sum()
    dropped = (torch.stack([part.dropped_per_choice for part in parts]) * weights[:, None]).sum(dim=0)
    counts = torch.stack([part.tokens_per_expert for part in parts]).sum(dim=0)
    return _summarize(num_tokens.sum(), counts, entropy, dropped)


def _summarize(
    num_tokens: Tensor, tokens_per_expert: Tensor, entropy: Tensor, dropped_per_choice: Tensor
) -> RoutingStatistics:
    load = tokens_per_expert.double()
    mean = load.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return RoutingStatistics(
        num_tokens=num_tokens,
        tokens_per_expert=tokens_per_expert,
        load_max_over_mean=load.max() / mean,
        load_cv=load.std(unbiased=False) / mean,
        entropy=entropy,
        dropped_fraction=dropped_per_choice.mean(),
        dropped_per_choice=dropped_per_choice,
        dead_experts=(tokens_per_expert == 0).sum(),
    )


def _sequence_balance(probs: Tensor, indices: Tensor, routing: Routing, num_experts: int) -> Tensor:
    """The loss of each sequence, averaged by valid tokens."""
    assert routing.sequence_ids is not None
    names, sequence = routing.sequence_ids.unique(return_inverse=True)  # (T,) in [0, number of sequences)
    valid = torch.ones_like(sequence, dtype=torch.bool) if routing.token_mask is None else routing.token_mask
    lengths = torch.bincount(sequence[valid], minlength=names.numel()).to(probs.dtype)  # (sequences,)
    sums = probs.new_zeros(names.numel(), num_experts)
    prob_sums = sums.index_add(0, sequence[valid], probs[valid])
    cells = (sequence[:, None] * num_experts + indices)[valid].flatten()
    counts = torch.bincount(cells, minlength=sums.numel()).view_as(sums).to(probs.dtype)
    # length · E · Σ (prob_sum / length) · (count / (K · length)), then the mean by length
    per_sequence = num_experts * (prob_sums * counts).sum(dim=1) / (indices.shape[1] * lengths.clamp_min(1))
    return per_sequence.sum() / lengths.sum().clamp_min(1)


def _masked_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean over the valid tokens. (T, ...) -> (...); zeros if there are none. Masked values may be anything."""
    if token_mask is None:
        return values.sum(dim=0) / max(values.shape[0], 1)
    mask = token_mask.view(-1, *[1] * (values.dim() - 1))
    return torch.where(mask, values, 0.0).sum(dim=0) / token_mask.sum().clamp_min(1)
