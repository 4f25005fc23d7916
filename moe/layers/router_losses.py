"""Auxiliary losses and statistics of routing: pure functions of a Routing, so recompute cannot count them twice."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe.layers.routing import Routing, count_assignments

SCOPES = ("local", "global", "sequence")


def load_balance_loss(
    routing: Routing, choices: str = "all", scope: str = "local", group: dist.ProcessGroup | None = None
) -> Tensor:
    """E · Σ_e mean_prob_e · f_e (GShard, Switch Transformer eq. 4): 1 at perfect balance. A scalar.

    At most E over first choices and E / K over all K.

    f_e is expert e's share of the assignments, before drops and without gradient: of all K ("all") or of first
    choices only ("first", the paper's, Artetxe et al. 2021). mean_prob_e is the mean over valid tokens of the
    probabilities, normalised to sum to 1 per token. Zero if every token is masked.

    scope, which tokens form one group:
    - "local": all tokens of this routing.
    - "global": those of all ranks of `group` (Qiu et al. 2025). Every rank gets the same value. Its gradient with
      respect to this rank's probabilities is scaled by (valid tokens of all ranks / of this rank), so that a mean
      over ranks weighted by valid tokens, as for the cross-entropy, equals the one-process gradient.
    - "sequence": each sequence by itself, averaged by valid tokens.

    Raises ValueError for unknown names, and for "global" without a group.
    """
    if choices not in ("all", "first"):
        raise ValueError(f"choices ({choices!r}) must be one of: all, first")
    if scope not in SCOPES:
        raise ValueError(f"scope ({scope!r}) must be one of: {', '.join(SCOPES)}")
    if (scope == "global") != (group is not None):
        raise ValueError(
            f"scope ({scope!r}) and group ({group}) must agree: scope='global' needs a group and the others take none"
        )
    num_experts = routing.router_probs.shape[1]
    probs = _normalized_probs(routing)
    columns = slice(0, 1) if choices == "first" else slice(None)
    indices, chosen = routing.expert_indices[:, columns], routing.chosen[:, columns]
    if scope == "sequence" and routing.sequence_ids is not None:
        return _sequence_balance(probs, indices, chosen, routing, num_experts)
    counts = routing.tokens_per_expert if choices == "all" else count_assignments(indices, chosen, num_experts)
    if group is not None:
        return _global_balance(probs, counts, routing.token_mask, group)
    shares = counts.to(probs.dtype) / counts.sum().clamp_min(1)  # (E,)
    return num_experts * (_masked_mean(probs, routing.token_mask) * shares).sum()


def gshard_load_balance_loss(routing: Routing, *, times_experts_squared: bool = True) -> Tensor:
    """The loss exactly as fairseq's gate returns it, or as fairscale's does, without the factor E². A scalar.

    mean_e(me · ce) · E², with me an expert's mean probability and ce its share of first choices; both are means over
    all T tokens: masked tokens count with their probability but without a choice (Artetxe et al. 2021).
    """
    num_tokens, num_experts = routing.router_probs.shape
    probs = routing.router_probs.to(torch.promote_types(routing.router_probs.dtype, torch.float32))
    counts = count_assignments(routing.expert_indices[:, :1], routing.chosen[:, :1], num_experts)
    mean = (probs.sum(dim=0) * counts.to(probs.dtype)).mean() / max(num_tokens, 1) ** 2
    return mean * num_experts**2 if times_experts_squared else mean


def router_z_loss(routing: Routing) -> Tensor:
    """Mean over valid tokens of logsumexp(router_logits)² (ST-MoE, eq. 5). A scalar; zero if all are masked."""
    wide = torch.promote_types(routing.router_logits.dtype, torch.float32)
    squares = routing.router_logits.to(wide).logsumexp(dim=1).square()  # (T,)
    return _masked_mean(squares, routing.token_mask)


class RoutingStatistics(NamedTuple):
    """How the experts of one layer were used. Fields are tensors, so the caller decides when to wait for a GPU."""

    num_tokens: Tensor  # valid tokens
    tokens_per_expert: Tensor  # (E,) int64 assignments before drops
    load_max_over_mean: Tensor  # assignments of the busiest expert over the mean
    load_cv: Tensor  # standard deviation of the assignments per expert over the mean
    entropy: Tensor  # nats, of a token's router probabilities, mean over valid tokens
    dropped_fraction: Tensor  # share of all choices that found no room
    dropped_per_choice: Tensor  # (K,) the same for first choices, second choices, ...
    chosen_per_choice: Tensor  # (K,) int64 number of first choices, second choices, ...
    dead_experts: Tensor  # number of experts without an assignment


@torch.no_grad()
def routing_statistics(routing: Routing) -> RoutingStatistics:
    """Statistics of one routing; all zeros if it has no valid tokens."""
    entropy = _masked_mean(torch.special.entr(_normalized_probs(routing)).sum(dim=1), routing.token_mask)
    chosen = routing.chosen.sum(dim=0)  # (K,)
    dropped = (routing.chosen & ~routing.kept).sum(dim=0)
    mask = routing.token_mask
    num_tokens = _count(routing.kept.shape[0], chosen) if mask is None else mask.sum()
    return _summarize(num_tokens, routing.tokens_per_expert, entropy.float(), dropped.float(), chosen)


@torch.no_grad()
def merge_statistics(parts: list[RoutingStatistics]) -> RoutingStatistics:
    """The statistics of several routings of one layer (micro-batches), as if they were one."""
    num_tokens = torch.stack([part.num_tokens for part in parts])
    weights = num_tokens.float() / num_tokens.sum().clamp_min(1)
    entropy = (torch.stack([part.entropy for part in parts]) * weights).sum()
    chosen = torch.stack([part.chosen_per_choice for part in parts])
    dropped = (torch.stack([part.dropped_per_choice for part in parts]) * chosen).sum(dim=0)
    counts = torch.stack([part.tokens_per_expert for part in parts]).sum(dim=0)
    return _summarize(num_tokens.sum(), counts, entropy, dropped, chosen.sum(dim=0))


def _summarize(
    num_tokens: Tensor, tokens_per_expert: Tensor, entropy: Tensor, dropped: Tensor, chosen: Tensor
) -> RoutingStatistics:
    load = tokens_per_expert.double()
    mean = load.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return RoutingStatistics(
        num_tokens=num_tokens,
        tokens_per_expert=tokens_per_expert,
        load_max_over_mean=load.max() / mean,
        load_cv=load.std(unbiased=False) / mean,
        entropy=entropy,
        dropped_fraction=dropped.sum() / chosen.sum().clamp_min(1),
        dropped_per_choice=dropped / chosen.clamp_min(1),
        chosen_per_choice=chosen,
        dead_experts=(tokens_per_expert == 0).sum(),
    )


def _normalized_probs(routing: Routing) -> Tensor:
    """Each token's probabilities over their sum, in at least float32. (T, E)

    A sum that underflows to zero (sigmoid scores, Megatron-LM#1545) gives zeros, not NaN.
    """
    probs = routing.router_probs.to(torch.promote_types(routing.router_probs.dtype, torch.float32))
    return probs / probs.sum(dim=1, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)


def _global_balance(probs: Tensor, counts: Tensor, token_mask: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """The loss with all ranks' tokens as one group: sums are exchanged, gradients stay local."""
    num_experts = probs.shape[1]
    own_tokens = _count(probs.shape[0], probs) if token_mask is None else token_mask.sum()
    with torch.no_grad():
        all_counts, all_tokens = counts.clone(), own_tokens.clone()
        dist.all_reduce(all_counts, group=group)
        dist.all_reduce(all_tokens, group=group)
    shares = all_counts.to(probs.dtype) / all_counts.sum().clamp_min(1)  # (E,)
    # the global loss is the sum over ranks of n_r/N · own_r
    own = num_experts * (_masked_mean(probs, token_mask) * shares).sum()
    with torch.no_grad():
        whole = own * own_tokens / all_tokens.clamp_min(1)
        dist.all_reduce(whole, group=group)
    return own + (whole - own.detach())


def _sequence_balance(probs: Tensor, indices: Tensor, chosen: Tensor, routing: Routing, num_experts: int) -> Tensor:
    """The loss of each sequence, averaged by valid tokens."""
    assert routing.sequence_ids is not None
    names, sequence = routing.sequence_ids.unique(return_inverse=True)  # (T,) in [0, number of sequences)
    valid = torch.ones_like(sequence, dtype=torch.bool) if routing.token_mask is None else routing.token_mask
    sums = probs.new_zeros(names.numel(), num_experts)
    lengths = sums[:, 0].index_add(0, sequence, valid.to(probs.dtype))  # (sequences,)
    prob_sums = sums.index_add(0, sequence, torch.where(valid[:, None], probs, 0.0))
    cells = (sequence[:, None] * num_experts + indices).flatten()
    counts = sums.flatten().index_add(0, cells, chosen.flatten().to(probs.dtype)).view_as(sums)
    # Σ over sequences of length · E · Σ_e (prob_sum / length) · (count / all counts), over the sum of lengths
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    return num_experts * (prob_sums * shares).sum() / lengths.sum().clamp_min(1)


def _masked_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean over the valid tokens. (T, ...) -> (...); zeros if there are none. Masked values may be anything."""
    if token_mask is None:
        return values.sum(dim=0) / max(values.shape[0], 1)
    mask = token_mask.view(-1, *[1] * (values.dim() - 1))
    return torch.where(mask, values, 0.0).sum(dim=0) / token_mask.sum().clamp_min(1)


def _count(number: int, like: Tensor) -> Tensor:
    """A scalar int64 on the device of `like`; torch.tensor would make the host wait for a GPU."""
    return torch.full((), number, dtype=torch.int64, device=like.device)
