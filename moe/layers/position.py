"""Where a token stands: positions from document ids, the sinusoidal table and the rotary rotation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions that restart at 0 wherever the document id changes. (B, S) -> (B, S) int64."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)  # (B, S)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def sinusoidal_embedding(positions: Tensor, d_model: int) -> Tensor:
    """The fixed positions of fairseq and XGLM: sines in the first half, cosines in the second. (...,) -> (..., D).

    Frequency i is 10000^(-i / (D/2 - 1)) (moe_lm.md section 2). The caller adds the offset of the first
    position, 2 in those models.
    """
    half = d_model // 2
    exponent = torch.arange(half, device=positions.device, dtype=torch.float32) / max(half - 1, 1)
    angles = positions[..., None].float() * torch.exp(-math.log(10000.0) * exponent)  # (..., D/2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, shared by all layers of one forward pass."""

    cos: Tensor  # (B or 1, 1, S, head_dim)
    sin: Tensor  # (B or 1, 1, S, head_dim)


def rotary_rotation(positions: Tensor, head_dim: int, theta: float) -> Rotation:
    """Rotary angles (RoFormer, eq. 15) in the half-split layout of Llama checkpoints. positions: (B or 1, S)."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * theta**-exponent  # (B, S, head_dim/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # (B, 1, S, head_dim)
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair (i, i + head_dim/2) by its angle. (B, H, S, head_dim) -> same, computed in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = wide.chunk(2, dim=-1)
    return (wide * rotation.cos + torch.cat([-high, low], dim=-1) * rotation.sin).type_as(x)
