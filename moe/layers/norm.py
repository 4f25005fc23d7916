"""The two usual normalisations, both from torch."""

from __future__ import annotations

import torch
from torch import nn

from moe.config.checks import require_choice


def make_norm(
    kind: str, width: int, eps: float, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.LayerNorm | nn.RMSNorm:
    """`kind` is "layernorm" (scale and shift) or "rmsnorm" (scale alone); both start at the identity scale.

    Raises ValueError for an unknown kind.
    """
    require_choice("norm", kind, ("layernorm", "rmsnorm"))
    norm = nn.LayerNorm if kind == "layernorm" else nn.RMSNorm
    return norm(width, eps=eps, device=device, dtype=dtype)
