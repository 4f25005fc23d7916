"""Converts fairscale's MOELayer with a Top2Gate to a MoE and back.

Identical: choices, weights and drops for equal Gumbel noise, and `layer.l_aux`, which here is
`gshard_load_balance_loss(routing, times_experts_squared=False)`. Different: fairscale draws its noise from torch's
global generator, while here a generator is passed; and in half precision fairscale's router projects in half precision,
here in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe.layers import GShardRouter, MoE
from moe.layers.feed_forward import ACTIVATIONS

_ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}
_PROBE_ROWS = 8
_PROBE_TOLERANCE = 1e-9  # relative to the output's largest entry, in float64; exact and tanh GELU differ by 1e-4


def from_fairscale(layer: nn.Module, *, eval_as_original: bool = False) -> MoE:
    """Return a MoE that computes the same as `fairscale.nn.moe.MOELayer`, with copies of its weights.

    If the layer's group has several ranks, each must call this: the experts of all ranks are gathered, and every rank
    gets the whole layer. Tokens are then processed per rank, as in fairscale: each rank is a routing group.

    Experts may be nn.Sequential(Linear, activation, Linear) or modules with Linears `fc1` and `fc2` that compute
    fc2(activation(fc1(x))); the latter are verified by running them once on a few rows. activation: nn.GELU(),
    nn.ReLU() or nn.SiLU(). eval_as_original: sample and drop in evaluation as fairscale does, instead of neither.
    Raises ValueError for another gate, another expert, or experts that differ in shape, bias or activation.
    """
    MOELayer, Top2Gate = _classes()
    if not isinstance(layer, MOELayer):
        raise ValueError(f"layer must be a fairscale MOELayer, not {type(layer).__name__}")
    if type(layer.gate) is not Top2Gate:
        raise ValueError(f"the gate must be fairscale's Top2Gate, not {type(layer.gate).__name__}")
    gate = layer.gate.wg.weight  # (E, D)
    stacked, activation = _stack_experts(list(layer.experts))
    if layer.world_size > 1:
        stacked = {name: _gather(tensor, layer.group) for name, tensor in stacked.items()}
    num_experts, d_ff, d_model = stacked["w_in"].shape
    if gate.shape != (num_experts, d_model):
        raise ValueError(
            f"the gate's weight {tuple(gate.shape)} must be ({num_experts}, {d_model}): there are {num_experts} "
            f"experts of d_model {d_model} on the group's {layer.world_size} ranks"
        )
    router = GShardRouter(d_model, num_experts, rules="fairscale", eval_as_original=eval_as_original, device="meta")
    bias = "b_in" in stacked
    made = MoE(d_model, d_ff, num_experts, activation=activation, bias=bias, router=router, device="meta")
    tensors = {f"experts.{name}": tensor for name, tensor in stacked.items()}
    made.load_state_dict({"router.weight": gate.detach().clone(), **tensors}, assign=True)
    return made.train(layer.training)


def to_fairscale(layer: MoE, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Return a `fairscale.nn.moe.MOELayer` with copies of this rank's block of experts, each as nn.Sequential.

    group: the ranks that share the experts, rank r holding the r-th of equal consecutive blocks; `None` is all ranks
    and requires an initialised process group. In evaluation fairscale samples and drops, whatever the layer did. Raises
    ValueError for what fairscale cannot express: another router or other options, gated or shared networks, dropout,
    and a number of experts that is not divisible by the ranks.
    """
    MOELayer, Top2Gate = _classes()
    if not dist.is_initialized():
        raise ValueError(
            "fairscale's MOELayer needs a process group, even of one rank: call torch.distributed.init_process_group "
            "first"
        )
    if problems := _inexpressible(layer):
        raise ValueError(f"fairscale's MOELayer cannot express this layer: {'; '.join(problems)}")
    experts = layer.experts
    num_experts, d_ff, d_model = experts.w_in.shape
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"this process (rank {dist.get_rank()}) must belong to the group")
    if num_experts % world_size != 0:
        raise ValueError(f"num_experts ({num_experts}) must be divisible by the group's number of ranks ({world_size})")
    block = num_experts // world_size
    local = nn.ModuleList()
    for e in range(rank * block, (rank + 1) * block):
        first = nn.Linear(d_model, d_ff, bias=experts.b_in is not None, device="meta")
        second = nn.Linear(d_ff, d_model, bias=experts.b_in is not None, device="meta")
        _assign(first, experts.w_in[e], None if experts.b_in is None else experts.b_in[e])
        _assign(second, experts.w_out[e], None if experts.b_out is None else experts.b_out[e])
        local.append(nn.Sequential(first, _ACTIVATION_MODULES[experts.activation](), second))
    with torch.device("meta"):
        gate = Top2Gate(d_model, num_experts)
    _assign(gate.wg, layer.router.weight, None)
    return MOELayer(gate, local, group).train(layer.training)  # marks the experts' parameters, so these come first


def _classes() -> tuple[Any, Any]:
    try:
        from fairscale.nn.moe import MOELayer, Top2Gate  # an extra that only these two functions need
    except ImportError as error:
        raise ValueError(
            "converting fairscale's layers needs fairscale: pip install -c constraints.txt '.[fairscale]'"
        ) from error
    return MOELayer, Top2Gate


def _stack_experts(experts: Sequence[nn.Module]) -> tuple[dict[str, Tensor], str]:
    """w_in (E, F, D), w_out (E, D, F) and, with biases, b_in (E, F) and b_out (E, D); and the activation."""
    parts = [_read_expert(expert, f"expert {e}") for e, expert in enumerate(experts)]
    for e, (tensors, activation) in enumerate(parts):
        for name, expected, found in (
            ("activation", parts[0][1], activation),
            ("shapes", _shapes(parts[0][0]), _shapes(tensors)),
        ):
            if expected != found:
                raise ValueError(f"all experts must have the same {name}: expert 0 has {expected}, expert {e} {found}")
    return {name: torch.stack([tensors[name] for tensors, _ in parts]) for name in parts[0][0]}, parts[0][1]


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _read_expert(expert: Any, name: str) -> tuple[dict[str, Tensor], str]:
    """The detached weights of one expert, named as in `Experts`, and the name of its activation."""
    first: Any
    second: Any
    if type(expert) is nn.Sequential:
        if len(expert) != 3:
            raise ValueError(f"{name} must be Sequential(Linear, activation, Linear), not of {len(expert)} modules")
        first, act, second = expert
        activation = _activation_name(act, name)
    elif hasattr(expert, "fc1") and hasattr(expert, "fc2"):
        first, second = expert.fc1, expert.fc2
        activation = ""
    else:
        raise ValueError(
            f"{name} ({type(expert).__name__}) must be Sequential(Linear, activation, Linear) or have `fc1` and `fc2`"
        )
    for linear in (first, second):
        if type(linear) is not nn.Linear:
            raise ValueError(f"{name} must have two nn.Linear, not {type(linear).__name__}")
    if (first.bias is None) != (second.bias is None):
        raise ValueError(f"{name} must have a bias in both Linears or in none; give the other one a bias of zeros")
    if first.out_features != second.in_features or first.in_features != second.out_features:
        raise ValueError(f"{name} must map D to F and F to D, not {first} and {second}")
    tensors = {"w_in": first.weight.detach(), "w_out": second.weight.detach()}
    if first.bias is not None:
        tensors |= {"b_in": first.bias.detach(), "b_out": second.bias.detach()}
    return tensors, activation or _probe_activation(expert, name)


def _activation_name(module: nn.Module, owner: str) -> str:
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    for name, kind in _ACTIVATION_MODULES.items():
        if type(module) is kind:
            return name
    raise ValueError(f"{owner}: the activation ({type(module).__name__}) must be nn.GELU, nn.ReLU or nn.SiLU")


@torch.no_grad()
def _probe_activation(expert: Any, owner: str) -> str:
    """The activation for which the module computes fc2(act(fc1(x))), verified because its forward may do anything."""
    wide: Any = copy.deepcopy(expert).double()  # float64 separates the candidates reliably
    features = wide.fc1.in_features
    steps = torch.arange(_PROBE_ROWS * features, dtype=torch.float64, device=wide.fc1.weight.device)
    x = torch.sin(steps + 1.0).view(_PROBE_ROWS, features)  # no draw: converting changes no random state
    found = wide(x)
    fitting = []
    for name, act in ACTIVATIONS.items():
        expected = F.linear(act(F.linear(x, wide.fc1.weight, wide.fc1.bias)), wide.fc2.weight, wide.fc2.bias)
        scale = float(expected.abs().max())
        if found.shape == expected.shape and float((found - expected).abs().max()) <= _PROBE_TOLERANCE * scale:
            fitting.append(name)
    if not fitting:
        raise ValueError(
            f"{owner} ({type(expert).__name__}) must compute fc2(activation(fc1(x))) with one of "
            f"{', '.join(ACTIVATIONS)}; on a few rows it computes something else, as do dropout in training, an "
            f"approximate GELU and residual connections"
        )
    if len(fitting) > 1:
        raise ValueError(
            f"{owner}: {', '.join(fitting)} all reproduce its output, so it is unknown which it uses; are its weights "
            f"zero?"
        )
    return fitting[0]


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(local experts, ...) of each rank -> (E, ...), in rank order."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


def _assign(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())


def _inexpressible(layer: MoE) -> list[str]:
    router = layer.router
    if not isinstance(router, GShardRouter) or router.rules != "fairscale":
        kind = f"{type(router).__name__}, rules={router.rules}" if isinstance(router, GShardRouter) else f"{router}"
        return [f"its router must be GShardRouter(rules='fairscale'), not {kind}"]
    experts = layer.experts
    problems = {
        f"second_policy ({router.second_policy!r}) must be 'sampling'": router.second_policy != "sampling",
        "normalize_before_dropping must be False": router.normalize_before_dropping,
        "batch_prioritized must be False": router.batch_prioritized,
        "eval_capacity_fraction must be None": router.eval_capacity_fraction is not None,
        "gated must be False": experts.w_gate is not None,
        f"dropout ({experts.dropout}) must be 0": experts.dropout > 0,
        "there must be no shared network": layer.shared is not None,
    }
    return [problem for problem, present in problems.items() if present]
