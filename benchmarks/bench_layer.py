"""The whole layer, forward and backward, beside its dense twin and the layers of other libraries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moe.layers import FeedForward, GShardRouter, MoE

from .conftest import Contender

T, D, FF = 2048, 128, 256


def forward_backward(module: nn.Module, x: Tensor, output: Callable[[object], Tensor]) -> Callable[[], None]:
    leaves = [x, *module.parameters()]

    def call() -> None:
        torch.autograd.grad(output(module(x)).sum(), leaves, allow_unused=True)

    return call


def transformers_block(num_experts: int) -> nn.Module | None:
    """Mixtral's layer of equal shape, where transformers is installed."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return None
    config = MixtralConfig(
        hidden_size=D, intermediate_size=FF, num_local_experts=num_experts, num_experts_per_tok=2, hidden_act="silu"
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


@pytest.mark.parametrize("num_experts", [8, 64, 512])
def bench_layer(num_experts: int, compare: Callable[[str, list[Contender]], None]) -> None:
    x = torch.randn(1, T, D, requires_grad=True)
    layer = MoE(D, FF, num_experts, gated=True, activation="silu")
    gshard = MoE(D, FF, num_experts, gated=True, activation="silu", router=GShardRouter(D, num_experts))
    dense = FeedForward(D, 2 * FF, gated=True, activation="silu")
    routed = 3 * 3 * 2 * 2 * T * D * FF
    flops = routed + 3 * 2 * T * D * num_experts
    moved = 4 * (3 * 3 * num_experts * D * FF + 4 * T * D)
    contenders = [
        Contender("MoE, dropless", forward_backward(layer, x, lambda result: result[0]), flops, moved),
        Contender("MoE, GShard", forward_backward(gshard, x, lambda result: result[0]), flops, moved),
        Contender(
            "dense, as wide as two",
            forward_backward(dense, x, lambda result: result),
            routed,
            4 * (3 * 3 * D * 2 * FF + 4 * T * D),
        ),
    ]
    if (peer := transformers_block(num_experts)) is not None:
        call = forward_backward(peer, x, lambda result: result[0] if isinstance(result, tuple) else result)
        contenders.append(Contender("transformers Mixtral", call, flops, moved))
    compare(f"layer E={num_experts} T={T}", contenders)
