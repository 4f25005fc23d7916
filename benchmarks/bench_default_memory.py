"""The layer in a program that sets nothing: torch's and glibc's defaults, next to the one option it can set by itself.

These run before all others, since the trainer's allocator setting (moe.training.allocator) cannot be undone. Peers are
compared here as they come, slow ones included; bench_layer.py gives the fast ones the trainer's setting too.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from . import layer_contenders as layers
from .contender import Contender
from .loads import Shape
from .peers import PEERS
from .suite import FASTEST_PEER, REFERENCE_SHAPES, Ratio, Suite

OURS = "ours, persistent_grad [fp32]"
GROUPED_MM = "transformers Mixtral grouped_mm [fp32]"
HELD = {  # (gated, E) of the reference row -> ratios required against peers
    (False, 8): [
        Ratio(OURS, FASTEST_PEER, 1 / 0.97),
        Ratio(OURS, "fairscale MOELayer [fp32]", 1 / 3),
        Ratio(OURS, "tutel [fp32]", 1 / 2),
    ],
    (False, 64): [
        Ratio(OURS, FASTEST_PEER),
        Ratio(OURS, "fairscale MOELayer [fp32]", 1 / 3),
        Ratio(OURS, "tutel [fp32]", 1 / 2),
        Ratio(OURS, "loop over w[e] [fp32]", 1 / 15),
    ],
    (False, 512): [Ratio(OURS, FASTEST_PEER), Ratio(OURS, "tutel [fp32]", 1 / 2)],
    (True, 8): [Ratio(OURS, FASTEST_PEER, 1 / 0.97)],
    (True, 64): [Ratio(OURS, GROUPED_MM, 1 / 1.3), Ratio(OURS, "transformers Mixtral eager [fp32]", 1 / 15)],
    (True, 512): [Ratio(OURS, GROUPED_MM, 1 / 1.3)],
}


def held_ratios(shape: Shape, gated: bool) -> list[Ratio]:
    """The ratios required of the reference row; for other shapes the same ratios without a limit."""
    ratios = [Ratio(OURS, "dense [fp32]")]
    ratios += [] if gated else [Ratio("ours, nothing set [fp32]", "dense [fp32]")]
    ratios += HELD.get((gated, shape.E), [])
    return ratios if shape in REFERENCE_SHAPES else [ratio._replace(limit=None) for ratio in ratios]


@pytest.mark.default_memory
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def bench_layer_with_default_memory(shape: Shape, gated: bool, default_memory: Suite) -> None:
    suite = default_memory
    case = layers.uniform_case(shape, suite.device, gated=gated)
    sampled = case.sampled()
    reference = layers.reference_loop(case, sampled)
    contenders = [layers.ours(case, sampled, name="ours, persistent_grad"), layers.dense(case)]
    if not gated:
        unset = layers.ours(case, sampled, name="ours, nothing set", persistent=False)
        contenders.append(replace(unset, few=True))
    asked = [PEERS[name] for name in suite.options.peers]
    built = [peer.build(case, sampled) for peer in asked if peer.installed and peer.takes(case)]
    held = held_ratios(shape, gated)
    reference_row = shape in REFERENCE_SHAPES
    contenders += [replace(each, few=reference_row and not decides(each, held)) for each in built]
    contenders = [c if c.outcome is None else replace(c, reference=reference) for c in contenders]
    suite.run(
        f"layer, default memory, {'SwiGLU' if gated else 'GELU'}, {shape}",
        contenders,
        ratios=held,
    )


def decides(peer: Contender, held: list[Ratio]) -> bool:
    """Whether a limit applies to ours against this peer, whose rounds are then not cut."""
    limits = {ratio.denominator: ratio.limit for ratio in held}
    return limits.get(FASTEST_PEER) is not None or limits.get(peer.label) is not None
