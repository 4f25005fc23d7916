"""The product of each row with its expert's matrix: checks, choice of backend and gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import second_order
from ..autocast import autocast_dtype, without_autocast
from ..backend import choose_backend
from ..offsets import read_bounds, require_cover
from . import reference, torch_impl


def grouped_gemm(rows: Tensor, weight: Tensor, expert_offsets: Tensor, *, backend: str = "auto") -> Tensor:
    """Each row times its expert's transposed matrix, as in nn.Linear. (R, K), (E, N, K) -> (R, N).

    rows: (R, K), sorted by expert. expert_offsets: (E+1,) int64 from 0 to R; rows offsets[e] to offsets[e+1] belong
    to expert e, which may have none and then gets a zero gradient. weight: in the dtype of `rows`, or both are cast
    to autocast's. Raises ValueError for mismatched shapes or dtypes and, on a CPU, for offsets that do not cover the
    rows (with a GPU the host would have to wait).
    """
    _check(rows, weight, expert_offsets)
    backend = choose_backend("grouped_gemm", backend, rows.device.type, has_triton=True)
    dtype = autocast_dtype(rows)
    if dtype is not None:
        rows, weight = rows.to(dtype), weight.to(dtype)
    if rows.dtype != weight.dtype:
        raise ValueError(
            f"rows ({rows.dtype}) and weight ({weight.dtype}) must have the same dtype; convert one of them"
        )
    with without_autocast(rows.device.type):
        if backend == "reference":
            return reference.grouped_gemm(rows, weight, expert_offsets)
        if torch.compiler.is_compiling():
            return _grouped_gemm(rows, weight, expert_offsets, backend)
        y: Tensor = _GroupedGEMM.apply(rows, weight, expert_offsets, backend)
        return y


@torch.library.custom_op(
    "moe::grouped_gemm",
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor expert_offsets, str backend) -> Tensor",
)
def _grouped_gemm(rows: Tensor, weight: Tensor, expert_offsets: Tensor, backend: str) -> Tensor:
    return _forward(rows, weight, expert_offsets, backend)


def _forward(rows: Tensor, weight: Tensor, expert_offsets: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        if rows.device.type == "cpu":
            require_cover(expert_offsets.tolist(), rows.shape[0])
        from . import triton_impl  # Triton is loaded by the first op that runs on it

        return triton_impl.forward(rows, weight, expert_offsets)
    return torch_impl.forward(rows, weight, read_bounds(expert_offsets, rows.shape[0]))


@_grouped_gemm.register_fake
def _(rows: Tensor, weight: Tensor, expert_offsets: Tensor, backend: str) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op(
    "moe::grouped_gemm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor rows, Tensor weight, Tensor expert_offsets, str backend, bool[] needs) "
    "-> (Tensor, Tensor)",
)
def _grouped_gemm_backward(
    grad: Tensor, rows: Tensor, weight: Tensor, expert_offsets: Tensor, backend: str, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from . import triton_impl

        found = triton_impl.backward(grad, rows, weight, expert_offsets, needs)
    else:
        found = torch_impl.backward(grad, rows, weight, read_bounds(expert_offsets, rows.shape[0]), needs)
    of_rows, of_weight = (rows.new_empty(0) if each is None else each for each in found)  # an op cannot return None
    return of_rows, of_weight


@_grouped_gemm_backward.register_fake
def _(
    grad: Tensor, rows: Tensor, weight: Tensor, expert_offsets: Tensor, backend: str, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape if needs[0] else 0), weight.new_empty(weight.shape if needs[1] else 0)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    found = _grouped_gemm_backward(grad, *ctx.saved_tensors, ctx.backend, needs)
    return *(each if needed else None for each, needed in zip(found, needs, strict=True)), None, None


_grouped_gemm.register_autograd(_gradient, setup_context=_context)


class _GroupedGEMM(torch.autograd.Function):
    """The same without a compiler: less overhead per call, and torch.func can transform it."""

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, expert_offsets: Tensor, backend: str) -> Tensor:
        return _forward(rows, weight, expert_offsets, backend)

    setup_context = staticmethod(_context)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if not second_order.wanted():
            return _gradient(ctx, *grads)
        rows, weight, expert_offsets = ctx.saved_tensors
        specification = partial(reference.grouped_gemm, expert_offsets=expert_offsets)
        found = second_order.gradients(specification, (rows, weight), ctx.needs_input_grad[:2], *grads)
        return *found, None, None


def _check(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> None:
    if rows.dim() != 2 or weight.dim() != 3 or rows.shape[1] != weight.shape[2]:
        raise ValueError(f"rows {tuple(rows.shape)} must be (R, K) and weight {tuple(weight.shape)} (E, N, K)")
    if expert_offsets.shape != (weight.shape[0] + 1,):
        raise ValueError(
            f"expert_offsets {tuple(expert_offsets.shape)} must be (E+1,) with the E of weight {tuple(weight.shape)}"
        )
