"""Choosing experts: checks and choice of backend. Integers come out, so there is no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose_backend
from . import reference, torch_impl

_IMPLEMENTATIONS = {"torch": torch_impl, "reference": reference}


@torch.no_grad()
def top_k_experts(scores: Tensor, top_k: int, *, backend: str = "auto") -> Tensor:
    """The experts of the `top_k` highest scores of each token. (T, E) -> (T, K) int64.

    Best first; of equal scores the lower index comes first, on every device. Scores must not be -inf or NaN.
    Raises ValueError unless 1 <= top_k <= E.
    """
    if scores.dim() != 2 or not 1 <= top_k <= scores.shape[1]:
        raise ValueError(f"top_k ({top_k}) must be between 1 and the E of scores (T, E), here {tuple(scores.shape)}")
    implementation = _IMPLEMENTATIONS[choose_backend("top_k_experts", backend, scores.device.type)]
    return implementation.top_k_experts(scores, top_k)


@torch.no_grad()
def keep_within_capacity(
    expert_indices: Tensor, valid: Tensor, num_experts: int, capacity: int, *, backend: str = "auto"
) -> Tensor:
    """Which choices find room in experts that accept `capacity` rows each. (T, K) -> (T, K) bool.

    valid: (T, K) bool; the others take no room and are not kept. First choices of all tokens are served before any
    second choice, and earlier tokens before later ones (moe_lm.md 4.2, step 12). Raises ValueError for shapes that
    differ or a negative capacity.
    """
    if expert_indices.shape != valid.shape:
        raise ValueError(f"expert_indices {tuple(expert_indices.shape)} and valid {tuple(valid.shape)} must agree")
    if capacity < 0:
        raise ValueError(f"capacity ({capacity}) must not be negative")
    implementation = _IMPLEMENTATIONS[choose_backend("keep_within_capacity", backend, valid.device.type)]
    return implementation.keep_within_capacity(expert_indices, valid, num_experts, capacity)
