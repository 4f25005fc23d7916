"""Checks every analytic count of counts.py against torch's own counter, with the reference backend and SDPA's MATH.

The counter sees neither custom ops nor flash attention, so none of the counts compared were registered by us.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe.compose import compose

from . import counts, models
from . import layer_contenders as layers
from .layer_contenders import LayerCase
from .loads import Shape
from .suite import Suite

SHAPES = [Shape(96, 16, 24, 2, 8), Shape(96, 16, 24, 8, 32), Shape(7, 16, 24, 2, 48)]  # the last has idle experts


def counted(call: Callable[[], Any]) -> int:
    """What torch's counter reports for a call."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def both_passes(contender: layers.Contender) -> Callable[[], Any]:
    """Uses `backward`, since the counter's module hooks do not work with `autograd.grad`."""

    def call() -> None:
        y = contender.forward()
        y.backward(torch.ones_like(y))

    return call


def layer_counts(gated: bool, shapes: Sequence[Shape]) -> Iterator[tuple[str, float, int]]:
    """(name, analytic, counted) of the layer, its dense twin and its experts."""
    for shape in shapes:
        case = LayerCase.make(shape, "uniform", gated=gated, device=torch.device("cpu"))
        kind = f"{'SwiGLU' if gated else 'GELU'}, {shape}"
        ours = layers.ours(case, [0], backend="reference")
        yield f"layer_forward_flops, {kind}", counts.layer_forward_flops(shape, gated=gated), counted(ours.forward)
        yield f"layer_cost, {kind}", case.cost().flops, counted(both_passes(ours))
        twin = layers.dense(case)
        yield f"dense_forward_flops, {kind}", counts.dense_forward_flops(shape, gated=gated), counted(twin.forward)
        yield f"dense_cost, {kind}", twin.cost.flops, counted(both_passes(twin))
        loop = layers.loop_over_unbind(case, [0])
        router = shape.T * counts.router_flops(shape.D, shape.E)
        experts = counts.experts_forward_flops(shape.T * shape.K, shape, gated=gated)
        yield f"experts_forward_flops, {kind}", experts + router, counted(loop.forward)
        cost = counts.experts_cost(shape.T * shape.K, shape, gated=gated, busy_experts=shape.E, element_bytes=4)
        yield f"experts_cost, {kind}", cost.flops + counts.TRAINING * router, counted(both_passes(loop))


def head_counts() -> Iterator[tuple[str, float, int]]:
    tokens, width, vocab = 30, 12, 50
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))

    def both() -> None:
        F.cross_entropy(F.linear(hidden, weight), targets).backward()

    analytic = counts.head_forward_flops(tokens, width, vocab)
    yield "head_forward_flops", analytic, counted(lambda: F.linear(hidden, weight))
    yield "head_cost", counts.head_cost(tokens, width, vocab, element_bytes=4).flops, counted(both)


def model_counts() -> Iterator[tuple[str, float, int]]:
    """Training and generation steps of the models in the table, with fewer and narrower layers."""
    olmoe = models.small_olmoe(small=True)
    tiny = [compose(["model.vocab_size=64", "model.d_model=32", *more]).model for more in ([], ["+moe=8e"])]
    for config in (olmoe, *tiny):
        model = models.our_model(config, torch.device("cpu"), backend="reference")
        tokens = torch.randint(config.vocab_size or 0, (2, 16))
        name = f"{config.name}{'' if config.moe is None else ' ' + config.moe.name}"

        def both(model: Any = model, tokens: Any = tokens) -> None:
            model(tokens, tokens).token_losses.sum().backward()

        yield f"step_flops, {name}", counts.step_flops(config, tokens.numel(), 16), counted(both)
        yield f"step_cost, {name}", counts.step_cost(config, tokens.numel(), 16).flops, counted(both)
        cache = model.new_cache(2, 16)
        with torch.no_grad():
            model(tokens[:, :-1], cache=cache)

            def one(model: Any = model, tokens: Any = tokens, cache: Any = cache) -> None:
                model(tokens[:, -1:], cache=cache)

            found = counted(one)
        yield f"decode_flops, {name}", counts.decode_flops(config, 2, 16), found
        if config.moe is not None:
            cost = counts.decode_cost(config, 2, 16, num_busy_experts=config.moe.num_experts)
            yield f"decode_cost, {name}", cost.flops, found


@pytest.mark.parametrize("source", ["gelu", "swiglu", "head", "model"])
def bench_flop_counts(source: str, suite: Suite) -> None:
    sources = {
        "gelu": lambda: layer_counts(False, SHAPES),
        "swiglu": lambda: layer_counts(True, SHAPES),
        "head": head_counts,
        "model": model_counts,
    }
    differing = []
    for what, analytic, found in sources[source]():
        suite.counts[what] = analytic == found
        if analytic != found:
            differing.append(f"{what}: {analytic:,} by formula, {found:,} counted")
    assert not differing, "; ".join(differing)
