"""The dense feed-forward network: the second half of a dense layer, and the network that each expert is."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.kernels.linear import linear
from moe.layers.arguments import require_count, require_dropout
from moe.layers.initialization import DEFAULT_INIT, WeightInit, parameter_generator
from moe.scaling.flops import ffn_flops
from moe.scaling.params import ffn_params

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


_GATED_NAMES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


def require_activation(activation: str) -> None:
    """Raise ValueError, with the nearest name, unless `activation` is known."""
    if activation in ACTIVATIONS:
        return
    hint = ""
    if activation in _GATED_NAMES:
        hint = f"; {activation} is activation={_GATED_NAMES[activation]!r} with gated=True"
    elif near := difflib.get_close_matches(activation, ACTIVATIONS, n=1, cutoff=0.5):
        hint = f"; did you mean {near[0]!r}?"
    raise ValueError(f"activation ({activation!r}) must be one of: {', '.join(ACTIVATIONS)}{hint}")


def draw_parameter(
    parameter: Tensor, name: str, generator: torch.Generator | None, init: WeightInit, w_out: Tensor
) -> None:
    """Draw one parameter, by name, of a feed-forward network or of one expert; w_out (..., D, F) gives the sizes.

    "fairseq" is U(±1/√fan_in), biases included; otherwise biases start at zero.
    """
    if name.startswith("b_") and init.kind != "fairseq":
        nn.init.zeros_(parameter)
        return
    fan_in = w_out.shape[-1] if name.endswith("out") else w_out.shape[-2]
    init.draw(parameter, fan_in**-0.5, generator, output=name == "w_out")


class FeedForward(nn.Module):
    """act(x W_inᵀ + b_in) W_outᵀ + b_out; `gated` is (act(x W_gateᵀ) * (x W_inᵀ + b_in)) W_outᵀ + b_out.

    Parameters are named as in `Experts`, without the expert dimension: w_in, w_gate (F, D), w_out (D, F), b_in (F,),
    b_out (D,). activation: "gelu" (exact), "gelu_tanh" (GPT-2's approximation), "relu" or "silu" (with `gated`:
    SwiGLU). Dropout is applied to the output, in training only.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_activation(activation)
        require_dropout(dropout)
        d_model, d_ff = require_count("d_model", d_model), require_count("d_ff", d_ff)
        self.activation = activation
        self.dropout = dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.w_in = nn.Parameter(torch.empty(d_ff, d_model, **factory))
        self.w_gate = nn.Parameter(torch.empty(d_ff, d_model, **factory)) if gated else None
        self.w_out = nn.Parameter(torch.empty(d_model, d_ff, **factory))
        self.b_in = nn.Parameter(torch.empty(d_ff, **factory)) if bias else None
        self.b_out = nn.Parameter(torch.empty(d_model, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, seed: int | None = None, layer: int = 0, init: WeightInit = DEFAULT_INIT) -> None:
        """Draw the weights from (seed, layer)."""
        for name, parameter in self.named_parameters(recurse=False):
            draw_parameter(parameter, name, parameter_generator(seed, layer, f"feed_forward.{name}"), init, self.w_out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        hidden = linear(x, self.w_in, self.b_in)  # (..., F)
        act = ACTIVATIONS[self.activation]
        hidden = act(hidden) if self.w_gate is None else act(linear(x, self.w_gate)) * hidden
        return F.dropout(linear(hidden, self.w_out, self.b_out), self.dropout, self.training)

    @property
    def total_params(self) -> int:
        """All parameters of the network."""
        d_model, d_ff = self.w_out.shape
        return ffn_params(d_model, d_ff, gated=self.w_gate is not None, bias=self.b_in is not None)

    active_params = total_params

    def flops(self, num_tokens: int) -> int:
        """Useful forward FLOPs for `num_tokens` tokens (moe.scaling.flops)."""
        d_model, d_ff = self.w_out.shape
        return num_tokens * ffn_flops(d_model, d_ff, gated=self.w_gate is not None)

    def extra_repr(self) -> str:
        d_model, d_ff = self.w_out.shape
        return f"d_model={d_model}, d_ff={d_ff}, activation={self.activation}, gated={self.w_gate is not None}"
