"""The specification: all logits at once, then the cross-entropy of each token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden weightᵀ)[target]. (T, D), (V, D), (T,) -> (T,)."""
    logits = F.linear(hidden, weight)  # (T, V)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
