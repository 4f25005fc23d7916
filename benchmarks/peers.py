"""Other libraries' layers with the same weights, if installed. One that fails the check gets no time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import layer_contenders as layers
from .contender import Contender
from .layer_contenders import LayerCase, contend

Builder = Callable[[LayerCase, Sequence[int]], Contender]


def fairscale(case: LayerCase, experts: Sequence[int]) -> Contender:
    """MOELayer with Top2Gate in a single-process group. The gate adds noise and drops what exceeds its capacity."""
    from fairscale.nn.moe.moe_layer import MOELayer
    from fairscale.nn.moe.top2gate import Top2Gate

    shape = case.shape
    networks = nn.ModuleList()
    for e in range(shape.E):
        network = nn.Sequential(
            nn.Linear(shape.D, shape.F, bias=False), nn.GELU(), nn.Linear(shape.F, shape.D, bias=False)
        )
        network[0].weight, network[2].weight = nn.Parameter(case.w_in[e]), nn.Parameter(case.w_out[e])
        networks.append(network)
    layer = MOELayer(Top2Gate(shape.D, shape.E), networks, _group_of_one(case.x.device))
    layer.gate.wg.weight = nn.Parameter(case.router)
    parameters = list(layer.parameters())
    x = case.x[:, None].clone().requires_grad_()  # (T, 1, D): it needs a first dimension divisible by E
    capacity = 2 * shape.T // shape.E
    why = "noise and capacity: another function"
    contender = contend(
        case, "fairscale MOELayer", layer, parameters, None, case.cost(note=why),
        x=x, upstream=case.upstream[:, None], peer=True, unchecked=why,
    )  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        y = contender.forward()
        y.backward(torch.ones_like(y))  # the counter's module hooks do not work with `autograd.grad`
    for parameter in parameters:
        parameter.grad = None
    kept = sum(min(int(rows), capacity) for rows in case.load)
    cost = replace(
        contender.cost,
        executed_flops=float(counter.get_total_flops()),
        padded_share=1 - kept / (capacity * shape.E),  # without its noise, which moves a few second choices
    )
    return replace(contender, cost=cost)


def _group_of_one(device: torch.device) -> dist.ProcessGroup:
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


def _transformers(case: LayerCase, experts: Sequence[int], implementation: str) -> Contender:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    shape = case.shape
    config = MixtralConfig(
        hidden_size=shape.D,
        intermediate_size=shape.F,
        num_local_experts=shape.E,
        num_experts_per_tok=shape.K,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    assert case.w_gate is not None
    block.gate.weight = nn.Parameter(case.router)
    block.experts.gate_up_proj = nn.Parameter(torch.cat([case.w_gate, case.w_in], dim=1))  # (E, 2F, D)
    block.experts.down_proj = nn.Parameter(case.w_out)
    parameters = [block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]

    def split(grads: Sequence[Tensor]) -> Mapping[str, Tensor]:
        w_gate, w_in = grads[1][list(experts)].chunk(2, dim=1)
        return layers.canonical(case, range(len(experts)))([grads[0], w_in, grads[2][list(experts)], w_gate])

    return contend(
        case, f"transformers Mixtral {implementation}", block, parameters, split, case.cost(),
        x=case.x[None].clone().requires_grad_(), upstream=case.upstream[None], peer=True,
    )  # fmt: skip


def transformers_eager(case: LayerCase, experts: Sequence[int]) -> Contender:
    """Mixtral's block, looping over its experts."""
    return _transformers(case, experts, "eager")


def transformers_grouped_mm(case: LayerCase, experts: Sequence[int]) -> Contender:
    """Mixtral's block with torch's grouped_mm: the library's fast path on a CPU."""
    return _transformers(case, experts, "grouped_mm")


def megablocks(case: LayerCase, experts: Sequence[int]) -> Contender:
    """dMoE, the dropless layer, with its grouped GEMM."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    shape = case.shape
    arguments = Arguments(
        hidden_size=shape.D,
        ffn_hidden_size=shape.F,
        moe_num_experts=shape.E,
        moe_top_k=shape.K,
        moe_normalize_expert_weights=1,
        mlp_type="glu" if case.gated else "mlp",
        mlp_impl="grouped",
        activation_fn=F.silu if case.gated else F.gelu,
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=case.w_in.dtype == torch.bfloat16,
        device=case.x.device,
    )
    layer = dMoE(arguments).to(device=case.x.device, dtype=case.w_in.dtype)
    network = layer.experts.mlp
    flat = (shape.E * shape.F, shape.D)
    layer.router.layer.weight = nn.Parameter(case.router)
    network.w1 = nn.Parameter((case.w_in if case.w_gate is None else case.w_gate).reshape(flat))
    network.w2 = nn.Parameter(case.w_out.transpose(1, 2).reshape(flat).contiguous())
    parameters = [layer.router.layer.weight, network.w1, network.w2]
    if case.gated:
        network.v1 = nn.Parameter(case.w_in.reshape(flat))
        parameters.append(network.v1)

    def split(grads: Sequence[Tensor]) -> Mapping[str, Tensor]:
        w1, w2, *v1 = (grad.view(shape.E, shape.F, shape.D)[list(experts)] for grad in grads[1:])
        ordered = [grads[0], v1[0], w2.mT, w1] if case.gated else [grads[0], w1, w2.mT]
        return layers.canonical(case, range(len(experts)))(ordered)

    def call(x: Tensor) -> Tensor:
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    return contend(
        case, "megablocks dMoE", call, parameters, split, case.cost(),
        x=case.x[:, None].clone().requires_grad_(), upstream=case.upstream[:, None], peer=True,
    )  # fmt: skip


def scattermoe(case: LayerCase, experts: Sequence[int]) -> Contender:
    """Its MLP after a softmax top-k in plain torch, since it has no router."""
    from scattermoe.mlp import MLP

    shape = case.shape
    layer = MLP(shape.D, shape.F, shape.E, shape.K, activation=nn.GELU()).to(case.x)
    router = nn.Parameter(case.router)
    layer.experts.weight, layer.output_experts.weight = nn.Parameter(case.w_in), nn.Parameter(case.w_out)

    def call(x: Tensor) -> Tensor:
        probs = F.linear(x.float(), router.float()).softmax(dim=1)
        weights, indices = probs.topk(shape.K, dim=1)
        return layer(x, (weights / weights.sum(dim=1, keepdim=True)).to(x.dtype), indices)

    parameters = [router, layer.experts.weight, layer.output_experts.weight]
    return contend(
        case, "scattermoe MLP", call, parameters, layers.canonical(case, experts), case.cost(), peer=True
    )  # fmt: skip


def tutel(case: LayerCase, experts: Sequence[int]) -> Contender:
    """Its layer with a capacity equal to the largest load, to which every other expert is padded."""
    from tutel import moe as tutel_moe

    shape = case.shape
    _group_of_one(case.x.device)
    layer = tutel_moe.moe_layer(
        gate_type={"type": "top", "k": shape.K, "capacity_factor": 0.0},
        model_dim=shape.D,
        experts={
            "type": "ffn",
            "num_experts_per_device": shape.E,
            "hidden_size_per_expert": shape.F,
            "activation_fn": F.gelu,
            "has_fc1_bias": False,
            "has_fc2_bias": False,
        },
    ).to(case.x)
    layer.gates[0].wg.weight = nn.Parameter(case.router)
    layer.experts.batched_fc1_w = nn.Parameter(case.w_in)
    layer.experts.batched_fc2_w = nn.Parameter(case.w_out.transpose(1, 2).contiguous())  # (E, F, D)
    parameters = [layer.gates[0].wg.weight, layer.experts.batched_fc1_w, layer.experts.batched_fc2_w]

    def split(grads: Sequence[Tensor]) -> Mapping[str, Tensor]:
        chosen = list(experts)
        return layers.canonical(case, range(len(experts)))([grads[0], grads[1][chosen], grads[2][chosen].mT])

    padded = int(case.load.max()) * shape.E / (shape.T * shape.K)
    routed = layers.counts.TRAINING * layers.counts.experts_forward_flops(shape.T * shape.K, shape, gated=False)
    cost = case.cost()
    cost = replace(cost, padded_share=1 - 1 / padded, executed_flops=cost.flops + routed * (padded - 1))
    return contend(case, "tutel", layer, parameters, split, cost, peer=True)


class Peer:
    """How a peer is built, and what it supports."""

    def __init__(
        self,
        package: str,
        build: Builder,
        *,
        gated: bool | None,
        gpu: bool,
        most_experts: int,
        slow: Sequence[str] = (),
    ) -> None:
        self.package = package  # must be importable
        self.build = build
        self.gated = gated  # which of the two networks it has; None is both
        self.gpu = gpu  # runs only on a GPU
        self.slow = slow  # device types on which it is never the fastest: only in float32 and with default memory
        self.most_experts = most_experts  # with more, a call takes minutes or too much memory

    @property
    def installed(self) -> bool:
        """Whether the package can be found, without importing it."""
        return importlib.util.find_spec(self.package) is not None

    def takes(self, case: LayerCase) -> bool:
        """Whether this peer supports the case."""
        fits = self.gated is None or self.gated == case.gated
        enough = self.most_experts >= case.shape.E and (not self.gpu or case.x.device.type == "cuda")
        if self.build is fairscale:  # float32 softmax and mask; top-2 by definition
            enough = enough and case.shape.K == 2 and case.shape.T % case.shape.E == 0
            enough = enough and case.w_in.dtype == torch.float32
        return fits and enough and not (self.is_slow(case) and case.w_in.dtype != torch.float32)

    def is_slow(self, case: LayerCase) -> bool:
        return case.x.device.type in self.slow


ANY = ("cpu", "cuda")  # device
PEERS = {
    "grouped_mm": Peer("torch", layers.grouped_mm, gated=False, gpu=False, most_experts=4096),
    "loop_unbind": Peer("torch", layers.loop_over_unbind, gated=False, gpu=False, most_experts=64, slow=ANY),
    "loop": Peer("torch", layers.loop_over_index, gated=False, gpu=False, most_experts=64, slow=ANY),
    "fairscale": Peer("fairscale", fairscale, gated=False, gpu=False, most_experts=64, slow=ANY),
    "transformers_eager": Peer("transformers", transformers_eager, gated=True, gpu=False, most_experts=64, slow=ANY),
    "transformers": Peer("transformers", transformers_grouped_mm, gated=True, gpu=False, most_experts=4096),
    "tutel": Peer("tutel", tutel, gated=False, gpu=False, most_experts=4096, slow=["cpu"]),
    "megablocks": Peer("megablocks", megablocks, gated=None, gpu=True, most_experts=4096),
    "scattermoe": Peer("scattermoe", scattermoe, gated=False, gpu=True, most_experts=4096),
}


def parse_peers(text: str) -> list[str]:
    """Parse peer names from "all", "none" or a comma-separated list. Raises ValueError for an unknown one."""
    if text in ("all", "none"):
        return list(PEERS) if text == "all" else []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peer ({name!r}) must be one of: all, none, {', '.join(PEERS)}")
    return names
