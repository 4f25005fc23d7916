"""Replace the MLPs of a small random Llama from transformers (nothing is downloaded) by Mixtures of Experts."""
# ruff: noqa: T201 - an example shows what it does

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from moe.layers import MoE, Routing, load_balance_loss, routing_statistics


class ExpertsAsMLP(nn.Module):
    """A MoE with an MLP's signature. It appends its routing to a list that the caller lends for one forward pass."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe
        self.borrowed: list[Routing] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, routing = self.moe(x)
        if self.borrowed is not None:
            self.borrowed.append(routing)
        return y


def loss_and_routings(model: nn.Module, tokens: Tensor) -> tuple[Tensor, list[Routing]]:
    """The loss, and each layer's routing once: a backward pass that recomputes a layer has no list to append to."""
    adapters = [module for module in model.modules() if isinstance(module, ExpertsAsMLP)]
    routings: list[Routing] = []
    for adapter in adapters:
        adapter.borrowed = routings
    try:
        return model(input_ids=tokens, labels=tokens).loss, routings
    finally:
        for adapter in adapters:
            adapter.borrowed = None


torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
for layer in model.model.layers:  # SwiGLU, like Llama's own MLP
    layer.mlp = ExpertsAsMLP(MoE(64, 128, num_experts=8, top_k=2, activation="silu", gated=True))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
starts, strides = torch.randint(64, (16, 1)), torch.randint(1, 4, (16, 1))
tokens = (starts + strides * torch.arange(32)) % 64  # (B, S): each sequence counts in its own stride
for step in range(15):
    cross_entropy, routings = loss_and_routings(model, tokens)
    balance = torch.stack([load_balance_loss(routing) for routing in routings]).mean()
    optimizer.zero_grad()
    (cross_entropy + 0.01 * balance).backward()
    optimizer.step()
    print(f"step {step + 1}: loss {cross_entropy:.3f}, load balance {balance:.3f}")
for number, routing in enumerate(routings):
    print(f"layer {number}: rows of each expert {routing_statistics(routing).tokens_per_expert.tolist()}")
