"""The feed-forward networks of all experts of one layer, as one set of stacked weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.kernels.expert_ffn import GradientMemory, expert_ffn, routed_expert_ffn
from moe.kernels.permute import RowOrder
from moe.layers.arguments import require_backend, require_count, require_dropout
from moe.layers.feed_forward import draw_parameter, require_activation
from moe.layers.initialization import DEFAULT_INIT, WeightInit, draw_stacked, parameter_generator


class Visit(NamedTuple):
    """Rows that come from other processes and go back to them, in parts: one per slice of this process's experts."""

    parts: list[slice]  # of this process's experts
    arrive: Callable[[int, Tensor], tuple[Tensor, Tensor]]  # (part, tensor in flight) -> its rows and their offsets
    depart: Callable[[int, Tensor], Tensor]  # (part, its result) -> tensor in flight
    gradient_divisor: int | None = None  # divides the weights' gradients


class Experts(nn.Module):
    """E feed-forward networks: w_in, w_gate (E, F, D), w_out (E, D, F), b_in (E, F), b_out (E, D).

    Each matrix has nn.Linear's orientation, so a stack of dense networks is a `torch.stack` of their weights.
    A submodule with its own forward, so that it can be sharded apart from the rest of the model.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_activation(activation)
        require_dropout(dropout)
        d_model, d_ff = require_count("d_model", d_model), require_count("d_ff", d_ff)
        num_experts = require_count("num_experts", num_experts)
        require_backend(backend)
        self.activation = activation
        self.dropout = dropout
        self.backend = backend
        self._gradient_memory: GradientMemory | None = None
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.w_in = nn.Parameter(torch.empty(num_experts, d_ff, d_model, **factory))
        self.w_gate = nn.Parameter(torch.empty(num_experts, d_ff, d_model, **factory)) if gated else None
        self.w_out = nn.Parameter(torch.empty(num_experts, d_model, d_ff, **factory))
        self.b_in = nn.Parameter(torch.empty(num_experts, d_ff, **factory)) if bias else None
        self.b_out = nn.Parameter(torch.empty(num_experts, d_model, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, seed: int | None = None, layer: int = 0, init: WeightInit = DEFAULT_INIT) -> None:
        """Draw expert e from (seed, layer, e), so that no value depends on how many ranks share the experts."""
        for name, parameter in self.named_parameters(recurse=False):
            if seed is None:  # one draw for all experts: there is no seed to reproduce
                draw_parameter(parameter, name, None, init, self.w_out)
                continue

            def draw(e: int, part: Tensor, name: str = name) -> None:
                generator = parameter_generator(seed, layer, f"experts.{name}", e)
                draw_parameter(part, name, generator, init, self.w_out)

            draw_stacked(parameter, draw)

    def persistent_grad(self, on: bool = True) -> None:
        """Reuse the memory of the weights' gradients from step to step instead of allocating it anew.

        For CPU training loops that set gradients to None: with 64 experts or more, each gradient is a block that
        glibc otherwise maps afresh. Gradients remain ordinary tensors, and their memory is reused only when nothing
        else holds it. Under autocast, the weights' copies in its dtype are kept likewise. Costs those bytes between
        steps. No effect under torch.compile.
        """
        self._gradient_memory = GradientMemory() if on else None

    def forward(
        self,
        rows: Any,
        expert_offsets: Tensor | None = None,
        *,
        order: RowOrder | None = None,
        expert_weights: Tensor | None = None,
        visit: Visit | None = None,
    ) -> Any:
        """Apply expert e to rows offsets[e] to offsets[e+1]. (R, D), (E+1,) int64 -> (R, D).

        With an `order` and `expert_weights` (T, K), `rows` are tokens (T, D) and the result is the weighted sums of
        their experts' outputs: on a GPU in fewer kernels, and only while no dropout is active in between.
        With a `visit`, `rows` is a sequence of tensors in flight and so is the result. All use this one method, which
        is where FSDP2 hooks in. Raises ValueError if nothing says which rows each expert has.
        """
        if visit is not None:
            return self._visit(rows, visit)
        weights = self._own_weights()
        if order is not None and expert_weights is not None:
            if self.drops_out:
                raise ValueError("the fused weighted sum cannot apply dropout: pass expert_offsets, not an order")
            return routed_expert_ffn(
                rows, expert_weights, order, *weights, activation=self.activation, backend=self.backend
            )
        if expert_offsets is None:
            raise ValueError(
                "experts(rows) needs expert_offsets (E+1,) int64, the limits of each expert's rows, or an order and "
                "expert_weights; to route tokens call MoE"
            )
        y = expert_ffn(
            rows,
            expert_offsets,
            *weights,
            activation=self.activation,
            backend=self.backend,
            gradient_memory=self._gradient_memory,
        )
        return F.dropout(y, self.dropout, self.training)

    def _visit(self, rows: Sequence[Tensor], visit: Visit) -> tuple[Tensor, ...]:
        """While one part computes, the rows of others may be in flight."""
        sizes = [part.stop - part.start for part in visit.parts]
        own = [_with_divided_gradient(weight, visit.gradient_divisor) for weight in self._own_weights()]
        split = [[None] * len(sizes) if weight is None else weight.split(sizes) for weight in own]
        memory = self._gradient_memory if len(sizes) == 1 else None
        results = []
        weights: tuple[Any, ...]
        for index, weights in enumerate(zip(*split, strict=True)):
            part_rows, offsets = visit.arrive(index, rows[index])
            y = expert_ffn(
                part_rows,
                offsets,
                *weights,
                activation=self.activation,
                backend=self.backend,
                gradient_memory=memory,
            )
            results.append(visit.depart(index, F.dropout(y, self.dropout, self.training)))
        return tuple(results)

    def _own_weights(self) -> tuple[Any, ...]:
        """w_in, w_gate, w_out, b_in, b_out: only this process's experts if several processes share them."""
        weights: tuple[Any, ...] = (self.w_in, self.w_gate, self.w_out, self.b_in, self.b_out)
        return tuple(weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights)

    @property
    def drops_out(self) -> bool:
        """Whether dropout is currently active between the experts and their sum."""
        return self.training and self.dropout > 0.0

    def extra_repr(self) -> str:
        num_experts, d_model, d_ff = self.w_out.shape
        return (
            f"num_experts={num_experts}, d_model={d_model}, d_ff={d_ff}, activation={self.activation}, "
            f"gated={self.w_gate is not None}"
        )


def _with_divided_gradient(weight: Tensor | None, divisor: int | None) -> Tensor | None:
    """The same weight, with its gradient from this pass divided by `divisor`."""
    if weight is None or divisor is None or not (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    # not on the parameter: a hook there is lost when `to`, `to_empty` or a deepcopy replaces its tensor
    weight = weight.view_as(weight)
    weight.register_hook(lambda gradient: gradient / divisor)
    return weight
