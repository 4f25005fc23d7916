"""The specification of choosing experts and of which choices find room, token by token."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_experts(scores: Tensor, top_k: int) -> Tensor:
    """The `top_k` best experts of each token, best first; of equal scores the lower index comes first."""
    chosen = [sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in scores.tolist()]
    return torch.tensor(chosen, dtype=torch.int64, device=scores.device).view(scores.shape[0], top_k)


def keep_within_capacity(expert_indices: Tensor, valid: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Which choices find room. All first choices are served before any second one, earlier tokens before later."""
    kept = torch.zeros_like(valid)
    taken = [0] * num_experts
    for k in range(expert_indices.shape[1]):
        for t in range(expert_indices.shape[0]):
            expert = int(expert_indices[t, k])
            if valid[t, k]:
                kept[t, k] = taken[expert] < capacity
                taken[expert] += 1
    return kept
