"""The fused head beside torch's projection and cross-entropy, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from moe.kernels.linear_cross_entropy import linear_cross_entropy

from .conftest import Contender

T, D = 2048, 128


@pytest.mark.parametrize("vocab_size", [4096, 32768])
def bench_linear_cross_entropy(vocab_size: int, compare: Callable[[str, list[Contender]], None]) -> None:
    hidden = torch.randn(T, D, requires_grad=True)
    weight = torch.randn(vocab_size, D, requires_grad=True)
    targets = torch.randint(vocab_size, (T,))

    def fused() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).sum(), [hidden, weight])

    def plain() -> None:
        losses = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")
        torch.autograd.grad(losses.sum(), [hidden, weight])

    flops = 3 * 2 * T * D * vocab_size
    moved = 4 * (3 * vocab_size * D + 3 * T * D)
    compare(
        f"linear_cross_entropy V={vocab_size}",
        [Contender("ours (chunked)", fused, flops, moved), Contender("torch", plain, flops, moved)],
    )
