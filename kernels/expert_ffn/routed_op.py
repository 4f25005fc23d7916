"""Tokens through their experts and back in one op: on a GPU the gather, the experts and the sum share kernels.

It computes the composition permute -> expert_ffn -> unpermute, which the other backends run. Fused, nothing of size R·D
is kept for the backward, and the experts' input rows are never written to memory.
"""

from __future__ import annotations

from torch import Tensor

from ..autocast import autocast_dtype, without_autocast
from ..backend import choose_backend
from ..permute import RowOrder, permute, unpermute
from . import triton_op
from .op import expert_ffn


def routed_expert_ffn(
    x: Tensor,
    expert_weights: Tensor,
    order: RowOrder,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    *,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    """Σ_k expert_weights[t, k] · expert(x_t) over the kept choices, in their order. (T, D), (T, K) -> (T, D).

    order: where the kept slots go, from `sort_by_expert`. Other parameters are as in `expert_ffn`. A token without
    kept slots gets zeros; a dropped slot's weight is not read and has gradient zero. Raises ValueError for mismatched
    shapes and, with backend="triton", unless x and the experts have the same dtype.
    """
    backend = choose_backend("routed_expert_ffn", backend, x.device.type, has_triton=True)
    if backend != "triton":
        rows = expert_ffn(
            permute(x, order, backend=backend),
            order.expert_offsets,
            w_in,
            w_gate,
            w_out,
            b_in,
            b_out,
            activation=activation,
            backend=backend,
        )
        return unpermute(rows, expert_weights, order, backend=backend)
    num_tokens = order.token_starts.numel() - 1
    if x.shape != (num_tokens, w_in.shape[2]):
        raise ValueError(f"x {tuple(x.shape)} must be (T, D), here ({num_tokens}, {w_in.shape[2]})")
    if expert_weights.dim() != 2 or expert_weights.shape[0] != num_tokens:
        raise ValueError(f"expert_weights {tuple(expert_weights.shape)} must be (T, K) with T = {num_tokens}")
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
        w_gate, b_in, b_out = (None if tensor is None else tensor.to(dtype) for tensor in (w_gate, b_in, b_out))
    with without_autocast(x.device.type):
        return triton_op.run(
            x, expert_weights, order, order.expert_offsets, w_in, w_gate, w_out, b_in, b_out, activation
        )
