"""The fast portable path: one GEMM per expert and matrix, grouped by torch where it can, with its own backward.

Experts without rows are skipped. For the backward it keeps the input rows, the pre-activations and, without a gate, the
activations: recomputing them costs 4% of the step, in memory traffic (T=2048, D=256, F=1024, 8 experts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import expert_threads, onednn
from ..backend import is_watched
from ..expert_threads import Span
from .gradient_memory import GradientMemory


class Saved(NamedTuple):
    """What the backward needs besides the inputs."""

    hidden: Tensor  # (R, F) rows @ w_inᵀ + b_in
    other: Tensor  # (R, F) rows @ w_gateᵀ with a gate, act(hidden) without


class Gradients(NamedTuple):
    """Gradients in the order of the arguments; None if there is no such argument or its gradient is not needed."""

    rows: Tensor | None
    w_in: Tensor | None
    w_gate: Tensor | None
    w_out: Tensor | None
    b_in: Tensor | None
    b_out: Tensor | None


def forward(
    rows: Tensor,
    bounds: list[int],
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> tuple[Tensor, Saved]:
    """Output rows (R, D) and what the backward needs. `bounds` are the E+1 row offsets."""
    hidden = _grouped_linear(rows, bounds, w_in, b_in)  # (R, F)
    if w_gate is None:
        other = inner = _activate(hidden, activation)
    else:
        other = _grouped_linear(rows, bounds, w_gate, None)
        inner = _activate(other, activation).mul_(hidden)
    return _grouped_linear(inner, bounds, w_out, b_out), Saved(hidden, other)


def backward(
    grad: Tensor,
    saved: Saved,
    rows: Tensor,
    bounds: list[int],
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    has_biases: list[bool],
    activation: str,
    memory: GradientMemory | None,
    dtypes: Sequence[torch.dtype],
    needs: Sequence[bool] = (True,) * 6,
) -> Gradients:
    """The gradients that are needed, for an upstream gradient (R, D).

    has_biases: b_in, b_out. dtypes: of the gradients of w_in, w_gate, w_out, b_in, b_out. needs: in Gradients' order.
    """
    hidden, other = saved
    grad = grad.contiguous()  # an upstream .sum() gives stride 0
    grad_hidden = grad_gate = grad_rows = None
    if any(needs[i] for i in (0, 1, 2, 4)):  # something before the activation needs one
        grad_inner = _grouped_matmul(grad, bounds, w_out)  # (R, F)
        if w_gate is None:
            inner, grad_hidden = other, _activation_backward(grad_inner, hidden, activation, out=grad_inner)
        else:
            inner, grad_hidden, grad_gate = _through_gate(grad_inner, hidden, other, activation)
    else:
        inner = other if w_gate is None or not needs[3] else _activate(other, activation).mul_(hidden)
    grad_w_out = _grouped_outer(grad, inner, bounds, _gradient("w_out", w_out, dtypes[2], memory)) if needs[3] else None
    if needs[0] and grad_hidden is not None:
        grad_rows = _grouped_matmul(grad_hidden, bounds, w_in)  # (R, D)
        if w_gate is not None and grad_gate is not None:
            grad_rows += _grouped_matmul(grad_gate, bounds, w_gate)

    def outer_with_rows(name: str, index: int, grad_of: Tensor | None, weight: Tensor | None) -> Tensor | None:
        if grad_of is None or weight is None or not needs[1 + index]:
            return None
        return _grouped_outer(grad_of, rows, bounds, _gradient(name, weight, dtypes[index], memory))

    grad_b_in = None
    if has_biases[0] and needs[4] and grad_hidden is not None:
        grad_b_in = _grouped_sum(grad_hidden, bounds, dtypes[3])
    return Gradients(
        rows=grad_rows,
        w_in=outer_with_rows("w_in", 0, grad_hidden, w_in),
        w_gate=outer_with_rows("w_gate", 1, grad_gate, w_gate),
        w_out=grad_w_out,
        b_in=grad_b_in,
        b_out=_grouped_sum(grad, bounds, dtypes[4]) if has_biases[1] and needs[5] else None,
    )


def _spans(bounds: list[int]) -> list[Span]:
    """(expert, first row, end row) of the experts that have rows."""
    return [(e, bounds[e], bounds[e + 1]) for e in range(len(bounds) - 1) if bounds[e] < bounds[e + 1]]


def _split(rows: Tensor, spans: Sequence[Span]) -> Sequence[Tensor]:
    """The rows of each of these consecutive spans: one call is cheaper than a slice for each."""
    if not spans:
        return ()
    return rows[spans[0][1] : spans[-1][2]].split([end - start for _, start, end in spans])


def _grouped_linear(rows: Tensor, bounds: list[int], weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows of e @ weight[e]ᵀ (+ bias[e]): (R, K), (E, N, K) -> (R, N)."""
    out = _grouped_matmul(rows, bounds, weight.transpose(1, 2))
    if bias is not None:
        for e, start, end in _spans(bounds):
            out[start:end] += bias[e]
    return out


def _grouped_matmul(rows: Tensor, bounds: list[int], weight: Tensor) -> Tensor:
    """rows of e @ weight[e]: (R, N), (E, N, K) -> (R, K)."""
    spans = _spans(bounds)
    on_cpu = rows.device.type == "cpu"
    threaded = on_cpu and expert_threads.wins(spans)
    few = on_cpu and 4 * len(spans) <= weight.shape[0]  # F.grouped_mm also multiplies for experts without rows
    mean_work = rows.numel() * weight.shape[2] / max(1, len(spans))
    by_onednn = onednn.wins(rows.dtype, rows.device.type, mean_work)
    rounded = by_onednn or onednn.needs_few_shapes(rows, len(spans))
    if not threaded and not few and not rounded and _grouped_mm_takes(rows, weight):
        ends = torch.tensor(bounds[1:], dtype=torch.int32, device=rows.device)
        return F.grouped_mm(rows, weight, offs=ends)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    matrices = weight.mT if by_onednn else weight
    # unbind once: indexing weight[e] 512 times costs as much as the small GEMMs themselves
    weights = {e: matrices[e] for e, _, _ in spans} if few else matrices.unbind(0)

    def multiply(part: Sequence[Span]) -> None:
        if rounded:
            onednn.grouped_products(rows, weights, part, out)
            return
        for (e, _, _), some, result in zip(part, _split(rows, part), _split(out, part), strict=True):
            torch.mm(some, weights[e], out=result)

    if threaded:
        expert_threads.over_experts(multiply, spans)
    else:
        multiply(spans)
    return out


def _grouped_mm_takes(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's own grouped GEMM accepts these tensors; it takes 21 ms where the loop takes 28 (E=512, R=8192).

    Its product of two row-major matrices into (E, N, K) is slower than the loop (31 against 17 ms) and not used.
    torch's FLOP counters do not know it, so the loop runs under them.
    """
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if rows.device.type == "cpu" else (torch.bfloat16,)
    unit, pitch = sorted(weight.stride()[1:])
    aligned = all(stride * rows.element_size() % 16 == 0 for stride in (rows.stride(0), weight.stride(0), pitch))
    dense = unit == 1 and rows.stride(1) == 1
    return rows.shape[0] > 0 and rows.dtype in dtypes and aligned and dense and not is_watched()


def _gradient(name: str, weight: Tensor, dtype: torch.dtype, memory: GradientMemory | None) -> Tensor:
    """Uninitialised memory for a weight's gradient."""
    if memory is None:
        return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    return memory.empty_like(name, weight, dtype)


def _grouped_outer(left: Tensor, right: Tensor, bounds: list[int], out: Tensor) -> Tensor:
    """(left of e)ᵀ @ right of e: (R, N), (R, K) -> `out` (E, N, K) of any dtype, zero for experts without rows."""
    outs = out.unbind(0)
    spans = _spans(bounds)
    written = 0
    for e, _, _ in spans:
        if written < e:
            out[written:e].zero_()  # neighbours without rows together: one large fill uses all cores
        written = e + 1
    out[written:].zero_()

    def multiply(part: Sequence[Span]) -> None:
        for (e, _, _), some, others in zip(part, _split(left, part), _split(right, part), strict=True):
            if out.dtype == left.dtype:
                torch.mm(some.T, others, out=outs[e])
            else:
                outs[e].copy_(torch.mm(some.T, others))

    if out.device.type == "cpu" and expert_threads.wins(spans):
        expert_threads.over_experts(multiply, spans)
    else:
        multiply(spans)
    return out


def _grouped_sum(rows: Tensor, bounds: list[int], dtype: torch.dtype) -> Tensor:
    """Sum of each expert's rows: (R, N) -> (E, N)."""
    out = rows.new_zeros(len(bounds) - 1, rows.shape[1], dtype=dtype)
    for e, start, end in _spans(bounds):
        torch.sum(rows[start:end], dim=0, dtype=dtype, out=out[e])
    return out


def _through_gate(grad_inner: Tensor, hidden: Tensor, gate: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """act(gate) · hidden, recomputed, and the gradients of `hidden` and `gate`. All (R, F); overwrites `grad_inner`.

    A few rows at a time, so that each operation finds in the cache what the one before loaded.
    """
    inner, grad_gate = torch.empty_like(gate), torch.empty_like(gate)
    rows = max(1, _CHUNK_NUMBERS // hidden.shape[1])
    tensors = (grad_inner, hidden, gate, inner, grad_gate)
    for g, h, z, i, gz in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        _ACTIVATE[activation](z, out=i)
        _activation_backward(g * h, z, activation, out=gz)
        g.mul_(i)
        i.mul_(h)
    return inner, grad_inner, grad_gate


_CHUNK_NUMBERS = 2**16  # of each tensor: a few of them fit in a core's second-level cache
_aten = torch.ops.aten
_APPROXIMATION = {"gelu": "none", "gelu_tanh": "tanh"}  # torch's names for the two forms
_ACTIVATE: dict[str, Callable[..., Tensor]] = {
    "gelu": _aten.gelu.out,
    "gelu_tanh": partial(_aten.gelu.out, approximate="tanh"),
    "relu": _aten.relu.out,
    "silu": _aten.silu.out,
}


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation in _APPROXIMATION:
        return F.gelu(x, approximate=_APPROXIMATION[activation])
    return F.relu(x) if activation == "relu" else F.silu(x)


def _activation_backward(grad: Tensor, x: Tensor, activation: str, *, out: Tensor) -> Tensor:
    if activation in _APPROXIMATION:
        return _aten.gelu_backward.grad_input(grad, x, approximate=_APPROXIMATION[activation], grad_input=out)
    if activation == "relu":
        return _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)
    return _aten.silu_backward.grad_input(grad, x, grad_input=out)
