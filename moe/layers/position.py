"""Token positions: from document ids, as sinusoidal embeddings and as rotary rotations."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import RopeScalingConfig


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions that restart at 0 wherever the document id changes. (B, S) -> (B, S) int64."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)  # (B, S)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def sinusoidal_embedding(positions: Tensor, d_model: int) -> Tensor:
    """fairseq's and XGLM's fixed embedding: sines in the first half, cosines in the second. (...,) -> (..., D).

    Frequency i is 10000^(-i / (D/2 - 1)) (Artetxe et al. 2021). The caller adds the offset of the first
    position, 2 in those models.
    """
    half = d_model // 2
    # in float32 and in fairseq's order: at large positions, frequencies rounded differently give different sines
    step = math.log(10000.0) / max(half - 1, 1)
    frequencies = torch.exp(torch.arange(half, device=positions.device, dtype=torch.float32) * -step)
    angles = positions[..., None].float() * frequencies  # (..., D/2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, shared by all layers of one forward pass."""

    cos: Tensor  # (B or 1, 1, S, head_dim)
    sin: Tensor  # (B or 1, 1, S, head_dim)


def rotary_rotation(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScalingConfig | None = None
) -> Rotation:
    """Rotary angles (RoFormer, eq. 15) in the half-split layout of Llama checkpoints. positions: (B or 1, S)."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponent  # rounded as in Llama
    if scaling is not None:
        frequencies = scaled_frequencies(frequencies, scaling)
    angles = positions[..., None].float() * frequencies  # (B, S, head_dim/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # (B, 1, S, head_dim)
    return Rotation(angles.cos(), angles.sin())


def scaled_frequencies(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Slower rotations for contexts longer than in pretraining. (head_dim/2,) -> (head_dim/2,).

    "linear" divides every frequency by `factor` (Chen et al. 2023). "llama3" (Llama 3.1's release) divides those that
    complete at most `low_freq_factor` waves in `original_max_seq_len`, keeps those that complete at least
    `high_freq_factor`, and interpolates between.
    """
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert scaling.original_max_seq_len is not None  # RopeScalingConfig checks this
    wavelengths = 2 * math.pi / frequencies
    waves = scaling.original_max_seq_len / wavelengths
    smooth = (waves - low) / (high - low)
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    slowed = torch.where(wavelengths > scaling.original_max_seq_len / low, frequencies / scaling.factor, between)
    return torch.where(wavelengths < scaling.original_max_seq_len / high, frequencies, slowed)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair (i, i + head_dim/2) by its angle. (B, H, S, head_dim) -> same, computed in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = wide.chunk(2, dim=-1)
    return (wide * rotation.cos + torch.cat([-high, low], dim=-1) * rotation.sin).type_as(x)
