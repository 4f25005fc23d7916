"""The feed-forward networks of all experts at once: checks, choice of backend and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import choose_backend
from . import reference, torch_impl

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def expert_ffn(
    rows: Tensor,
    expert_offsets: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    *,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    """Each row through the network of its expert. -> (R, D), in the dtype of `rows`, or of autocast where enabled.

        y = act(x W_inᵀ + b_in) W_outᵀ + b_out                      without w_gate
        y = (act(x W_gateᵀ) * (x W_inᵀ + b_in)) W_outᵀ + b_out      with w_gate (SwiGLU for silu)

    rows: (R, D), sorted by expert. expert_offsets: (E+1,) int64 from 0 to R; rows offsets[e] to offsets[e+1] belong
    to expert e, which may have none. w_in, w_gate: (E, F, D). w_out: (E, D, F). b_in: (E, F). b_out: (E, D).
    activation: "gelu" (exact), "relu" or "silu". Experts without rows get zero gradients. Raises ValueError for
    shapes that do not fit, offsets that do not cover the rows, and unknown names.
    """
    _check(rows, expert_offsets, w_in, w_gate, w_out, b_in, b_out, activation)
    backend = choose_backend("expert_ffn", backend, rows.device.type)
    if torch.is_autocast_enabled(rows.device.type):  # as nn.Linear: inputs and weights in the autocast dtype
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, w_in, w_out = rows.to(dtype), w_in.to(dtype), w_out.to(dtype)
        w_gate, b_in, b_out = (None if tensor is None else tensor.to(dtype) for tensor in (w_gate, b_in, b_out))
    with torch.autocast(rows.device.type, enabled=False):
        if backend == "reference":
            return reference.expert_ffn(rows, expert_offsets, w_in, w_gate, w_out, b_in, b_out, activation)
        bounds = expert_offsets.tolist()
        return _ExpertFFN.apply(rows, bounds, w_in, w_gate, w_out, b_in, b_out, activation)


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        bounds: list[int],
        w_in: Tensor,
        w_gate: Tensor | None,
        w_out: Tensor,
        b_in: Tensor | None,
        b_out: Tensor | None,
        activation: str,
    ) -> Tensor:
        rows = rows.contiguous()
        y, saved = torch_impl.forward(rows, bounds, w_in, w_gate, w_out, b_in, b_out, activation)
        ctx.save_for_backward(rows, w_in, w_gate, w_out, *saved)
        ctx.bounds, ctx.activation = bounds, activation
        ctx.has_b_in, ctx.has_b_out = b_in is not None, b_out is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, w_in, w_gate, w_out, hidden, gate = ctx.saved_tensors
        saved = torch_impl.Saved(hidden, gate)
        grad_rows, *grad_weights = torch_impl.backward(
            grad, saved, rows, ctx.bounds, w_in, w_gate, w_out, ctx.has_b_in, ctx.has_b_out, ctx.activation
        )
        return grad_rows, None, *grad_weights, None


def _check(
    rows: Tensor,
    expert_offsets: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation ({activation!r}) must be one of: {', '.join(ACTIVATIONS)}")
    if rows.dim() != 2 or w_in.dim() != 3:
        raise ValueError(f"rows {tuple(rows.shape)} must be (R, D) and w_in {tuple(w_in.shape)} must be (E, F, D)")
    num_experts, d_ff, d_model = w_in.shape
    expected = {
        "rows": (rows, (rows.shape[0], d_model)),
        "expert_offsets": (expert_offsets, (num_experts + 1,)),
        "w_gate": (w_gate, (num_experts, d_ff, d_model)),
        "w_out": (w_out, (num_experts, d_model, d_ff)),
        "b_in": (b_in, (num_experts, d_ff)),
        "b_out": (b_out, (num_experts, d_model)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be {shape} to fit w_in {tuple(w_in.shape)}")
    if int(expert_offsets[0]) != 0 or int(expert_offsets[-1]) != rows.shape[0]:
        raise ValueError(
            f"expert_offsets must run from 0 to the number of rows ({rows.shape[0]}), "
            f"not from {int(expert_offsets[0])} to {int(expert_offsets[-1])}"
        )
