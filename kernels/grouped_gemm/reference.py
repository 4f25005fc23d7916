"""The specification of each row's product with its expert: one expert after another, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_gemm(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """Rows offsets[e] to offsets[e+1] times weight[e]ᵀ. (R, K), (E, N, K), (E+1,) -> (R, N)."""
    bounds = expert_offsets.tolist()
    parts = [rows.new_empty(0, weight.shape[1])]
    parts += [rows[bounds[e] : bounds[e + 1]] @ weight[e].T for e in range(weight.shape[0])]
    return torch.cat(parts)
