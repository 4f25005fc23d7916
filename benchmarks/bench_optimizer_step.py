"""Layer and optimizer step together: with hundreds of experts the update costs as much as the experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from . import counts, models
from . import layer_contenders as layers
from .contender import Contender
from .suite import REFERENCE_SHAPES, Ratio, Suite


def _with_update(contender: Contender, name: str, **adamw: Any) -> Contender:
    """The same forward; its gradients go to AdamW and are freed."""
    leaves = contender.parameters
    optimizer = models.adamw(leaves, **adamw)
    differentiate: Callable[[Any], Any] = contender.backward

    def backward(y: Tensor) -> None:
        _, *grads = differentiate(y)
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        del grads
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    numbers = sum(leaf.numel() for leaf in leaves)
    cost = replace(contender.cost, bytes=contender.cost.bytes + counts.optimizer_bytes(numbers))
    return replace(contender, name=name, backward=backward, cost=cost, outcome=_forward_alone)


def _forward_alone(y: Tensor, _: Any) -> dict[str, Tensor]:
    return {"y": y.detach()}


@pytest.mark.default_memory
def bench_layer_and_update(default_memory: Suite) -> None:
    """Both as in a program that sets nothing; ours with persistent_grad."""
    suite = default_memory
    shape = suite.options.layer_shapes[-1]
    case = layers.uniform_case(shape, suite.device)
    sampled = case.sampled()
    ours = _with_update(layers.ours(case, sampled), "ours, fused AdamW", fused=True)
    theirs = layers.grouped_mm(case, sampled)
    contenders = [
        ours,
        _with_update(theirs, "F.grouped_mm, foreach AdamW", foreach=True),
        _with_update(layers.grouped_mm(case, sampled), "F.grouped_mm, fused AdamW", fused=True),
    ]
    reference = replace(layers.reference_loop(case, sampled), outcome=_forward_alone, backward=None)
    limit = 0.45 if shape in REFERENCE_SHAPES and shape.E == 512 else None
    suite.run(
        f"layer and update, default memory, GELU, {shape}",
        [replace(c, reference=reference) for c in contenders],
        ratios=[
            Ratio("ours, fused AdamW [fp32]", "F.grouped_mm, foreach AdamW [fp32]", limit),
            Ratio("ours, fused AdamW [fp32]", "F.grouped_mm, fused AdamW [fp32]"),
        ],
        few=True,  # the limit is far away
    )
