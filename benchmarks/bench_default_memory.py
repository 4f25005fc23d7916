"""The layer as a program that sets nothing runs it: torch's and glibc's defaults, beside the option it can take alone.

These run before all others: the allocator's setting that the trainer makes (moe.training.allocator) cannot be undone.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from . import layer_contenders as layers
from .layer_contenders import LayerCase
from .loads import Shape
from .peers import PEERS
from .suite import Ratio, Suite


@pytest.mark.default_memory
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def bench_layer_with_default_memory(shape: Shape, gated: bool, default_memory: Suite) -> None:
    suite = default_memory
    case = LayerCase.make(shape, "uniform", gated=gated, device=suite.device)
    sampled = case.sampled()
    reference = layers.loop_over_unbind(case, sampled)
    contenders = [layers.ours(case, sampled, name="ours, persistent_grad")]
    if not gated:
        contenders += [layers.dense(case), layers.ours(case, sampled, name="ours, nothing set", persistent=False)]
    peer = "transformers" if gated else "grouped_mm"
    if peer in suite.options.peers and PEERS[peer].installed:
        contenders.append(PEERS[peer].build(case, sampled))
    contenders = [c if c.outcome is None else replace(c, reference=reference) for c in contenders]
    others = ("dense", "ours, nothing set", "F.grouped_mm", "transformers Mixtral grouped_mm")
    suite.run(
        f"layer, default memory, {'SwiGLU' if gated else 'GELU'}, {shape}",
        contenders,
        ratios=[Ratio("ours, persistent_grad [fp32]", f"{other} [fp32]") for other in others],
    )
