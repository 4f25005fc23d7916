"""The two usual normalisations, as torch computes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.config.checks import require_choice


class RMSNorm(nn.RMSNorm):
    """torch's, for an input that is narrower than the weight too, as under autocast.

    torch has a fused kernel for equal dtypes only and warns about others. Widening the input changes no bit of the
    result or the gradients: torch computes in float32 either way.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype))).to(x.dtype)


def make_norm(
    kind: str, width: int, eps: float, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.LayerNorm | RMSNorm:
    """`kind` is "layernorm" (scale and shift) or "rmsnorm" (scale alone); both start at the identity scale.

    Raises ValueError for an unknown kind.
    """
    require_choice("norm", kind, ("layernorm", "rmsnorm"))
    norm = nn.LayerNorm if kind == "layernorm" else RMSNorm
    return norm(width, eps=eps, device=device, dtype=dtype)
