"""The feed-forward networks of all experts of one layer, as one set of stacked weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.kernels.expert_ffn import GradientMemory, expert_ffn, routed_expert_ffn
from moe.kernels.permute import RowOrder
from moe.layers.feed_forward import draw_parameter, require_activation
from moe.layers.initialization import DEFAULT_INIT, WeightInit, parameter_generator


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
            # without a seed one draw serves all experts: there is nothing to repeat
            for e, part in enumerate([parameter] if seed is None else parameter.unbind(0)):
                generator = parameter_generator(seed, layer, f"experts.{name}", e)
                draw_parameter(part, name, generator, init, self.w_out)

    def persistent_grad(self, on: bool = True) -> None:
        """Keep the memory of the weights' gradients from step to step instead of allocating it anew.

        For training loops on a CPU that set gradients to None: with 64 experts or more each gradient is a block that
        glibc otherwise maps afresh. Gradients are ordinary tensors as before, and memory is used again only when
        nobody holds them. Costs their bytes between steps. Without effect under torch.compile.
        """
        self._gradient_memory = GradientMemory() if on else None

    def forward(
        self,
        rows: Tensor,
        expert_offsets: Tensor,
        *,
        order: RowOrder | None = None,
        expert_weights: Tensor | None = None,
    ) -> Tensor:
        """Rows offsets[e] to offsets[e+1] through expert e. (R, D), (E+1,) int64 -> (R, D).

        With an `order` and `expert_weights` (T, K), `rows` are tokens (T, D) and come back as the weighted sums of
        what their experts make of them: on a GPU in fewer kernels, and only while nothing drops out between.
        """
        weights = (self.w_in, self.w_gate, self.w_out, self.b_in, self.b_out)
        if order is not None and expert_weights is not None:
            assert not self.drops_out
            return routed_expert_ffn(
                rows, expert_weights, order, *weights, activation=self.activation, backend=self.backend
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

    @property
    def drops_out(self) -> bool:
        """Whether dropout stands between the experts and their sum now."""
        return self.training and self.dropout > 0.0

    def extra_repr(self) -> str:
        num_experts, d_model, d_ff = self.w_out.shape
        return (
            f"num_experts={num_experts}, d_model={d_model}, d_ff={d_ff}, activation={self.activation}, "
            f"gated={self.w_gate is not None}"
        )
