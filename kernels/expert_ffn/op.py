"""The feed-forward networks of all experts at once: checks, choice of backend and gradient."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import second_order
from ..autocast import autocast_dtype, without_autocast
from ..backend import choose_backend
from ..offsets import read_bounds
from . import reference, torch_impl, triton_op
from .gradient_memory import GradientMemory

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
    gradient_memory: GradientMemory | None = None,
) -> Tensor:
    """Apply each row's expert to it. -> (R, D), in the dtype of `rows`, or autocast's if enabled.

        y = act(x W_inᵀ + b_in) W_outᵀ + b_out                      without w_gate
        y = (act(x W_gateᵀ) * (x W_inᵀ + b_in)) W_outᵀ + b_out      with w_gate (SwiGLU for silu)

    rows: (R, D), sorted by expert. expert_offsets: (E+1,) int64 from 0 to R; rows offsets[e] to offsets[e+1] belong
    to expert e, which may have none. "triton" also accepts offsets that end before R, as its `sort_by_expert` returns
    them: the rows beyond are not read, and their outputs and gradients hold anything. w_in, w_gate: (E, F, D).
    w_out: (E, D, F). b_in: (E, F). b_out: (E, D).
    activation: "gelu" (exact), "gelu_tanh" (its approximation), "relu" or "silu". Experts without rows get zero
    gradients. Raises ValueError for mismatched shapes and dtypes, offsets that do not cover the rows, and unknown
    names.
    gradient_memory: holds the weights' gradients and, under autocast, the matrices in its dtype, outside
    torch.compile; `None` allocates them anew.
    """
    _check(rows, expert_offsets, w_in, w_gate, w_out, b_in, b_out, activation)
    backend = choose_backend("expert_ffn", backend, rows.device.type, has_triton=True)
    weights: Sequence[Tensor | None] = (w_in, w_gate, w_out, b_in, b_out)
    # as in nn.Linear: inputs and weights in the autocast dtype, float64 unchanged
    mixed = autocast_dtype(rows)
    if mixed is not None:
        rows = rows.to(mixed)
    for name, weight in zip(("w_in", "w_gate", "w_out"), weights, strict=False):
        if mixed is None and weight is not None and weight.dtype != rows.dtype:
            raise ValueError(
                f"rows ({rows.dtype}) and {name} ({weight.dtype}) must have the same dtype; convert one of them, or "
                "use autocast"
            )
    if torch._C._are_functorch_transforms_active():
        gradient_memory = None  # a transformation's tensors have no storage to inspect
    with without_autocast(rows.device.type):
        if backend == "torch" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y: Tensor = _ExpertFFN.apply(rows.contiguous(), expert_offsets, *weights, activation, gradient_memory)[0]
            return y
        others: list[Any] = [expert_offsets, *_converted(weights, rows.dtype), activation]
        if backend == "reference":
            return reference.expert_ffn(rows, *others)
        if backend == "triton":
            return triton_op.run(rows, None, None, *others)
        run = _expert_ffn if torch.compiler.is_compiling() else _forward
        return run(rows.contiguous(), *others)[0]


def _converted(weights: Sequence[Tensor | None], dtype: torch.dtype, memory: GradientMemory | None = None) -> list[Any]:
    """w_in, w_gate, w_out, b_in and b_out in `dtype`; copies of the matrices use `memory` if given."""

    def convert(name: str | None, weight: Tensor | None) -> Tensor | None:
        if weight is None or weight.dtype == dtype:
            return weight
        if memory is None or name is None:
            return weight.to(dtype)
        return memory.empty_like(f"{name} in the rows' dtype", weight, dtype).copy_(weight)

    return [convert(*each) for each in zip(("w_in", "w_gate", "w_out", None, None), weights, strict=True)]


# The loop over experts reads how many rows each has, so a compiler sees one opaque op. An op cannot return None: a
# tensor without elements stands for what does not exist.


@torch.library.custom_op(
    "moe::expert_ffn",
    mutates_args=(),
    schema="(Tensor rows, Tensor expert_offsets, Tensor w_in, Tensor? w_gate, Tensor w_out, Tensor? b_in, "
    "Tensor? b_out, str activation) -> (Tensor, Tensor, Tensor)",
)
def _expert_ffn(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(*inputs)


def _forward(
    rows: Tensor,
    expert_offsets: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds = read_bounds(expert_offsets, rows.shape[0])
    y, saved = torch_impl.forward(rows, bounds, w_in, w_gate, w_out, b_in, b_out, activation)
    return y, saved.hidden, saved.other


@_expert_ffn.register_fake
def _(
    rows: Tensor, expert_offsets: Tensor, w_in: Tensor, w_gate: Tensor | None, w_out: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = rows.new_empty(rows.shape[0], w_in.shape[1])
    return rows.new_empty(rows.shape[0], w_out.shape[1]), hidden, torch.empty_like(hidden)


@torch.library.custom_op(
    "moe::expert_ffn_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor other, Tensor rows, Tensor expert_offsets, Tensor w_in, "
    "Tensor? w_gate, Tensor w_out, str activation, bool[] has_biases, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _expert_ffn_backward(
    grad: Tensor,
    hidden: Tensor,
    other: Tensor,
    rows: Tensor,
    expert_offsets: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    activation: str,
    has_biases: list[bool],
    needs: list[bool],
) -> tuple[Tensor, ...]:
    saved = torch_impl.Saved(hidden, other)
    bounds = read_bounds(expert_offsets, rows.shape[0])
    options = (has_biases, activation, None, [w_in.dtype] * 5, needs)
    grads = torch_impl.backward(grad, saved, rows, bounds, w_in, w_gate, w_out, *options)
    return tuple(rows.new_empty(0) if each is None else each for each in grads)


@_expert_ffn_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    other: Tensor,
    rows: Tensor,
    expert_offsets: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    activation: str,
    has_biases: list[bool],
    needs: list[bool],
) -> tuple[Tensor, ...]:
    num_experts, d_ff, d_model = w_in.shape
    shapes = (
        rows.shape,
        w_in.shape,
        None if w_gate is None else w_gate.shape,
        w_out.shape,
        (num_experts, d_ff) if has_biases[0] else None,
        (num_experts, d_model) if has_biases[1] else None,
    )
    found = (0 if shape is None or not needed else shape for shape, needed in zip(shapes, needs, strict=True))
    return tuple(w_in.new_empty(shape) for shape in found)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    rows, expert_offsets, w_in, w_gate, w_out, b_in, b_out, activation = inputs
    _, hidden, other = output
    ctx.save_for_backward(rows, expert_offsets, w_in, w_gate, w_out, hidden, other)
    ctx.activation = activation
    ctx.has_biases = [b_in is not None, b_out is not None]
    ctx.set_materialize_grads(False)  # zeros for `hidden` and `other` would be two fills of (R, F)


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad = grads[0]  # of y: the other outputs only serve the backward
    if grad is None:
        return (None,) * 8
    rows, expert_offsets, w_in, w_gate, w_out, hidden, other = ctx.saved_tensors
    needs = _needs(ctx)
    found = _expert_ffn_backward(
        grad, hidden, other, rows, expert_offsets, w_in, w_gate, w_out, ctx.activation, ctx.has_biases, needs
    )
    of_rows, *of_weights = (each if needed else None for each, needed in zip(found, needs, strict=True))
    return of_rows, None, *of_weights, None


def _needs(ctx: Any) -> list[bool]:
    """Whether rows, w_in, w_gate, w_out, b_in and b_out need gradients. An input of None needs none."""
    of_rows, _, *of_weights = ctx.needs_input_grad[:7]
    return [of_rows, *of_weights]


_expert_ffn.register_autograd(_gradient, setup_context=_context)


class _ExpertFFN(torch.autograd.Function):
    """The same without a compiler: less overhead per call, and torch.func can transform it.

    Weights may have other dtypes than the rows, as under autocast. They are converted here, so that the gradients of
    the matrices are written directly in the weights' own dtypes, into the gradient memory.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        rows, expert_offsets, *weights, activation, memory = inputs
        converted = _converted(weights, rows.dtype, memory)
        arguments: list[Any] = [rows, expert_offsets, *converted, activation]
        # also outputs: what the backward needs besides the inputs
        matrices = zip(converted[:3], weights, strict=False)
        return *_forward(*arguments), *(each for each, weight in matrices if each is not weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, expert_offsets, *weights, activation, ctx.gradient_memory = inputs
        _, hidden, other, *copies = output
        converted = iter(copies)
        matrices = [w if w is None or w.dtype == rows.dtype else next(converted) for w in weights[:3]]
        _context(ctx, (rows, expert_offsets, *matrices, *weights[3:], activation), (output[0], hidden, other))
        # as stored, for second derivatives: not saved for backward, since converted ones may change meanwhile
        ctx.weights = weights
        ctx.versions = _versions(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 9
        rows, expert_offsets, w_in, w_gate, w_out, hidden, other = ctx.saved_tensors
        if second_order.wanted():
            if ctx.versions != _versions(ctx.weights):
                raise RuntimeError(
                    "expert weights were modified in place between the forward and a backward with create_graph=True; "
                    "run the backward before the weights change"
                )

            def specification(rows: Tensor, *weights: Tensor | None) -> Tensor:
                arguments: list[Any] = [*_converted(weights, rows.dtype), ctx.activation]
                return reference.expert_ffn(rows, expert_offsets, *arguments)

            of_rows, *of_weights = second_order.gradients(specification, (rows, *ctx.weights), _needs(ctx), grad)
            return of_rows, None, *of_weights, None, None
        saved = torch_impl.Saved(hidden, other)
        of_rows, *of_weights = torch_impl.backward(
            grad,
            saved,
            rows,
            read_bounds(expert_offsets, rows.shape[0]),
            w_in,
            w_gate,
            w_out,
            ctx.has_biases,
            ctx.activation,
            ctx.gradient_memory,
            [rows.dtype if weight is None else weight.dtype for weight in ctx.weights],
            _needs(ctx),
        )
        return of_rows, None, *of_weights, None, None


def _versions(weights: Sequence[Tensor | None]) -> list[int | None]:
    """How often each was modified in place; an inference-mode tensor does not say."""
    return [None if weight is None or weight.is_inference() else weight._version for weight in weights]


_ExpertFFN.forward.__dict__["__signature__"] = inspect.signature(_ExpertFFN.forward)


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
