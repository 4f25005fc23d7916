"""Converts the weights of megablocks' MoE and dMoE layers to a MoE and back. megablocks itself is not needed.

Names and shapes, from databricks/megablocks (D = hidden_size, F = ffn_hidden_size, E = moe_num_experts):

    router.layer.weight        (E, D)        megablocks/layers/router.py, LearnedRouter
    experts.mlp.w1             (E, D, F)     megablocks/layers/mlp.py, MLP: the layer `MoE`, layout "moe"
    experts.mlp.w2             (E, F, D)
    experts.mlp.w1, v1, w2     (E·F, D)      mlp.py, SparseMLP and GroupedMLP; glu.py adds v1: `dMoE`, layout "dmoe"
    experts.bias               (D,)          megablocks/layers/moe.py, ParallelMLP, where `bias` is true
    shared_expert.up_proj.weight, down_proj.weight, gate_proj.weight    nn.Linear's; mlp.py SharedMLP, glu.py SharedGLU

It computes a softmax over E and its top_k, with weights divided by their L1 norm or unchanged; an expert is
act(x w1ᵀ) w2, or (act(x w1ᵀ) * (x v1ᵀ)) w2 with v1 (in layout "moe" w1 is stored transposed); the shared network is
added with weight 1. Its load-balancing loss is `load_balance_loss(routing)`, its z-loss `router_z_loss(routing)`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moe.layers import MoE, TopKRouter
from moe.layers.feed_forward import require_activation

LAYOUTS = ("dmoe", "moe")
_ROUTER, _W1, _V1, _W2 = "router.layer.weight", "experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"
_SHARED = {  # their names -> names of FeedForward
    "shared_expert.up_proj.weight": "w_in",
    "shared_expert.gate_proj.weight": "w_gate",
    "shared_expert.down_proj.weight": "w_out",
}


def from_megablocks(
    state_dict: Mapping[str, Tensor],
    *,
    top_k: int,
    d_ff: int,
    activation: str,
    normalize: bool = False,
    jitter: float | None = None,
    prefix: str = "",
) -> MoE:
    """Return a dropless MoE with copies of the weights of one megablocks layer, in either layout.

    state_dict: the whole layer's. For a layer spread over expert-parallel ranks, first concatenate the ranks' w1, v1
    and w2 along dimension 0; d_ff is required because one rank's block would look like narrower experts. prefix: what
    precedes the layer's names, for instance "layers.3.ffn."; other names are ignored. top_k, d_ff, jitter: moe_top_k,
    ffn_hidden_size and moe_jitter_eps. normalize: True for moe_normalize_expert_weights=1, False for None; other norms
    are not supported. activation: "gelu" is the exact one, "gelu_tanh" the approximation that is megablocks' default.

    A `MoE` with moe_capacity_factor above 0 keeps int(factor · T · K / E) rows per expert, those of earlier tokens
    whatever the choice; `TopKRouter(capacity_factor=)` rounds up and serves first choices first, so those drops cannot
    be reproduced. Nor can shared_expert_weighted_sum=True, which the tensors do not reveal: do not convert such a
    layer. Raises ValueError listing every missing, unused and misshaped tensor.
    """
    require_activation(activation)
    tensors = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
    if _ROUTER not in tensors or _W1 not in tensors:
        found = ", ".join(tensors) or "none"
        raise ValueError(
            f"{prefix}{_ROUTER} and {prefix}{_W1} must be among the tensors; those that begin with {prefix!r}: {found}"
        )
    shared_d_ff = _check(tensors, d_ff, prefix)
    num_experts, d_model = tensors[_ROUTER].shape
    router = TopKRouter(d_model, num_experts, top_k, normalize=normalize, jitter=jitter, device="meta")
    gated = _V1 in tensors
    layer = MoE(
        d_model,
        d_ff,
        num_experts,
        top_k,
        activation=activation,
        gated=gated,
        router=router,
        shared_d_ff=shared_d_ff,
        device="meta",
    )
    transposed = tensors[_W1].dim() == 3
    w1 = tensors[_W1].mT if transposed else tensors[_W1].reshape(num_experts, d_ff, d_model)
    ours = {
        "router.weight": tensors[_ROUTER],
        "experts.w_in": tensors[_V1].reshape(num_experts, d_ff, d_model) if gated else w1,
        "experts.w_out": tensors[_W2].reshape(num_experts, d_ff, d_model).mT,
    }
    if gated:
        ours["experts.w_gate"] = w1
    ours |= {f"shared.{name}": tensors[theirs] for theirs, name in _SHARED.items() if theirs in tensors}
    layer.load_state_dict({name: _copy(tensor) for name, tensor in ours.items()}, assign=True)
    return layer


def to_megablocks(layer: MoE, *, layout: str = "dmoe", prefix: str = "") -> dict[str, Tensor]:
    """Copy the layer's weights under megablocks' names and shapes; layout "dmoe" or "moe" (not gated).

    Everything else is set in its Arguments: bias=False, moe_top_k=router.top_k, moe_normalize_expert_weights=1 if
    router.normalize else None, moe_jitter_eps=router.jitter, mlp_type="glu" if gated, activation_fn the layer's
    (torch.nn.functional.gelu if it is the exact one, which is not megablocks' default), and moe_capacity_factor=0 for
    the layer `MoE`. Raises ValueError listing what megablocks cannot express.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout ({layout!r}) must be one of: {', '.join(LAYOUTS)}")
    if problems := _inexpressible(layer, layout):
        raise ValueError(f"megablocks cannot express this layer: {'; '.join(problems)}")
    experts = layer.experts
    first = experts.w_in if experts.w_gate is None else experts.w_gate  # (E, F, D): the activation's input
    second = experts.w_out.mT  # (E, F, D)
    tensors: dict[str, Tensor] = {_ROUTER: layer.router.weight}
    if layout == "moe":
        tensors |= {_W1: first.mT, _W2: second}
    else:
        tensors |= {_W1: first.flatten(0, 1), _W2: second.flatten(0, 1)}
        if experts.w_gate is not None:
            tensors[_V1] = experts.w_in.flatten(0, 1)
    if layer.shared is not None:
        parameters = dict(layer.shared.named_parameters())
        tensors |= {theirs: parameters[name] for theirs, name in _SHARED.items() if name in parameters}
    return {prefix + name: _copy(tensor) for name, tensor in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _check(tensors: Mapping[str, Tensor], d_ff: int, prefix: str) -> int | None:
    """Raise ValueError listing every fault; return the width of the shared network, or None."""
    num_experts, d_model = tensors[_ROUTER].shape if tensors[_ROUTER].dim() == 2 else (0, 0)
    expected: dict[str, tuple[int, ...]] = {_ROUTER: (num_experts, d_model)}
    if tensors[_W1].dim() == 3:
        expected |= {_W1: (num_experts, d_model, d_ff), _W2: (num_experts, d_ff, d_model)}
    else:
        expected |= dict.fromkeys([_W1, _W2, *([_V1] if _V1 in tensors else [])], (num_experts * d_ff, d_model))
    shared_d_ff = None
    if any(name in tensors for name in _SHARED):
        up = tensors.get("shared_expert.up_proj.weight")
        shared_d_ff = 0 if up is None else up.shape[0]
        for theirs, name in _SHARED.items():
            if name != "w_gate" or _V1 in tensors:
                expected[theirs] = (d_model, shared_d_ff) if name == "w_out" else (shared_d_ff, d_model)
    missing = [prefix + name for name in expected if name not in tensors]
    unused = [prefix + name for name in tensors if name not in expected]
    misshaped = [
        f"{prefix}{name} {tuple(tensors[name].shape)} must be {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if not (missing or unused or misshaped):
        return shared_d_ff
    text = f"these are not the weights of {num_experts} experts with d_model={d_model} and d_ff={d_ff}"
    for what, names in (("missing", missing), ("unused", unused), ("misshaped", misshaped)):
        text += f"; {what}: {', '.join(names)}" if names else ""
    if "experts.bias" in tensors:
        text += "; experts.bias is added once after combining: take it out here and add it to the output yourself"
    raise ValueError(text)


def _inexpressible(layer: MoE, layout: str) -> list[str]:
    router, experts = layer.router, layer.experts
    if not isinstance(router, TopKRouter):
        return [f"its router must be TopKRouter, not {type(router).__name__}"]
    problems = {
        f"scores ({router.scores!r}) must be 'softmax'": router.scores != "softmax",
        f"weight_scale ({router.weight_scale}) must be 1": router.weight_scale != 1.0,
        "bias_balanced must be False": router.expert_bias is not None,
        "num_groups must be None": router.num_groups is not None,
        "capacity_factor and eval_capacity_factor must be None": not (
            router.capacity_factor is None and router.eval_capacity_factor is None
        ),
        "bias must be False: it has one bias for the whole layer": experts.b_in is not None,
        f"dropout ({experts.dropout}) must be 0": experts.dropout > 0,
        "shared_gate must be False": layer.shared_gate is not None,
        "gated must be False with layout='moe'; use layout='dmoe'": experts.w_gate is not None and layout == "moe",
    }
    return [problem for problem, present in problems.items() if present]
