"""MoE layers in a small transformer in plain PyTorch, which learns in seconds which token follows which."""
# ruff: noqa: T201 - an example shows what it does

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.layers import MoE, Routing, load_balance_loss, router_z_loss, routing_statistics

VOCAB, D_MODEL, LAYERS, BATCH, LENGTH, STEPS = 64, 64, 2, 16, 32, 30


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)). The routing is returned beside the output, never stored."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
        self.attention = nn.MultiheadAttention(D_MODEL, num_heads=4, batch_first=True)
        self.moe = MoE(D_MODEL, d_ff=128, num_experts=8, top_k=2)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Routing]:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        update, routing = self.moe(self.moe_norm(x))
        return x + update, routing


torch.manual_seed(0)
embedding, head = nn.Embedding(VOCAB, D_MODEL), nn.Linear(D_MODEL, VOCAB)
blocks = nn.ModuleList(Block() for _ in range(LAYERS))
optimizer = torch.optim.AdamW(nn.ModuleList([embedding, blocks, head]).parameters(), lr=2e-3)
mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
successor = torch.randperm(VOCAB)  # the synthetic language: what comes after each token
for step in range(STEPS):
    tokens = [torch.randint(VOCAB, (BATCH,))]
    while len(tokens) <= LENGTH:
        tokens.append(successor[tokens[-1]])
    text = torch.stack(tokens, dim=1)  # (B, S+1)
    x, routings = embedding(text[:, :-1]), []
    for block in blocks:
        x, routing = block(x, mask)
        routings.append(routing)
    cross_entropy = F.cross_entropy(head(x).flatten(0, 1), text[:, 1:].flatten())
    balance = torch.stack([load_balance_loss(routing) for routing in routings]).mean()
    z = torch.stack([router_z_loss(routing) for routing in routings]).mean()
    optimizer.zero_grad()
    (cross_entropy + 0.01 * balance + 1e-3 * z).backward()
    optimizer.step()
    print(f"step {step + 1}: loss {cross_entropy:.3f}, load balance {balance:.3f}")
for number, routing in enumerate(routings):
    used = routing_statistics(routing)
    load = f"busiest expert {used.load_max_over_mean:.2f} times the mean, {used.dead_experts} without tokens"
    print(f"layer {number}: {load}, entropy {used.entropy:.2f} nats, dropped {used.dropped_fraction:.1%}")
