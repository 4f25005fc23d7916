"""The experts' networks, forward and backward, under three loads, beside one dense GEMM chain of equal FLOPs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.expert_ffn import expert_ffn

from .conftest import Contender

R, E, D, FF = 4096, 64, 128, 256


def load(kind: str) -> Tensor:
    """Rows per expert (E,), summing to R."""
    if kind == "uniform":
        return torch.full((E,), R // E)
    if kind == "one-hot":
        return F.one_hot(torch.tensor(3), E) * R
    share = 1.0 / torch.arange(1, E + 1)
    counts = (R * share / share.sum()).long()
    counts[0] += R - counts.sum()
    return counts


@pytest.mark.parametrize("kind", ["uniform", "zipf", "one-hot"])
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def bench_expert_ffn(kind: str, gated: bool, compare: Callable[[str, list[Contender]], None]) -> None:
    offsets = F.pad(load(kind).cumsum(0), (1, 0))
    rows = torch.randn(R, D, requires_grad=True)
    stacks = [torch.randn(E, FF, D, requires_grad=True) for _ in range(3 if gated else 2)]
    w_in, w_out, w_gate = stacks[0], stacks[1].transpose(1, 2).contiguous().detach(), stacks[2] if gated else None
    w_out.requires_grad_()
    leaves = [rows, w_in, w_out, *([] if w_gate is None else [w_gate])]

    def experts(backend: str) -> None:
        y = expert_ffn(
            rows, offsets, w_in, w_gate, w_out, None, None, activation="silu" if gated else "gelu", backend=backend
        )
        torch.autograd.grad(y.sum(), leaves)

    def dense() -> None:
        hidden = F.linear(rows, w_in[0])
        hidden = F.gelu(hidden) if w_gate is None else F.silu(F.linear(rows, w_gate[0])) * hidden
        torch.autograd.grad(F.linear(hidden, w_out[0]).sum(), [rows, w_in, w_out])

    matrices = 3 if gated else 2
    flops = 3 * matrices * 2 * R * D * FF
    weights = matrices * D * FF * int((load(kind) > 0).sum())
    moved = 4 * (3 * weights + 4 * R * D)  # weights read twice and their gradient written; rows in, out and gradients
    compare(
        f"expert_ffn {kind} {'swiglu' if gated else 'gelu'}",
        [
            Contender("ours (torch)", lambda: experts("torch"), flops, moved),
            Contender("reference", lambda: experts("reference"), flops, moved),
            Contender("dense, equal FLOPs", dense, flops, 4 * (3 * matrices * D * FF + 4 * R * D)),
        ],
    )
