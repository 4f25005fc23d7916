"""The specification of the experts' feed-forward networks: one expert after another, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def expert_ffn(
    rows: Tensor,
    expert_offsets: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> Tensor:
    """Rows offsets[e] to offsets[e+1] go through expert e. Shapes as in `op.expert_ffn`."""
    act = ACTIVATIONS[activation]
    bounds = expert_offsets.tolist()
    parts = [rows.new_empty(0, w_out.shape[1])]
    for e in range(w_in.shape[0]):
        x = rows[bounds[e] : bounds[e + 1]]  # (rows of e, D)
        hidden = x @ w_in[e].T  # (rows of e, F)
        if b_in is not None:
            hidden = hidden + b_in[e]
        hidden = act(hidden) if w_gate is None else act(x @ w_gate[e].T) * hidden
        y = hidden @ w_out[e].T
        parts.append(y if b_out is None else y + b_out[e])
    return torch.cat(parts)
