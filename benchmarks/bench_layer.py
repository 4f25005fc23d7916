"""The whole layer as run by the trainer, next to its dense twin, plain torch and other libraries' layers."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from . import layer_contenders as layers
from .contender import Contender
from .layer_contenders import LayerCase
from .loads import ROUTINGS, Shape
from .peers import PEERS
from .suite import FASTEST_PEER, REFERENCE_SHAPES, Ratio, Suite

MANY_NUMBERS = 2**27  # elements in one stack of matrices, half a GiB in float32: above this, peers run in float32 only

# ours over theirs: (limit, goal) for E of the reference row
DENSE = {8: (1.06, 1.02), 64: (1.35, 1.20), 512: (4.1, 3.0)}
OURS, GROUPED_MM = "ours [fp32]", "transformers Mixtral grouped_mm [fp32]"
OUR_DENSE = "dense, FeedForward [fp32]"


def held_ratios(shape: Shape, gated: bool) -> list[Ratio]:
    """The limits for the reference row; for other shapes and networks the same ratios without a limit.

    That peers must be slower is required with default memory (bench_default_memory.py); here they have the trainer's
    too.
    """
    dense, bf16 = Ratio(OURS, "dense [fp32]", *DENSE.get(shape.E, (None, None))), Ratio("ours [bf16]", OURS)
    if shape.E in (8, 64):
        bf16 = bf16._replace(limit=0.60)
    peers = [Ratio(OURS, GROUPED_MM) if gated else Ratio(OURS, FASTEST_PEER)]
    required = shape in REFERENCE_SHAPES and not gated
    held = [dense, bf16] if required else [each._replace(limit=None, goal=None) for each in (dense, bf16)]
    return [*held, Ratio(OURS, OUR_DENSE), *peers]


def contenders_of(suite: Suite, case: LayerCase) -> list[Contender]:
    """Ours on each backend, the dense twin and every peer that supports the case, in each dtype."""
    sampled = case.sampled()
    reference = layers.reference_loop(case, sampled)
    contenders: list[Contender] = []
    for dtype in suite.options.torch_dtypes:
        rounded = case.to(dtype)
        for backend in suite.options.backends:
            name = "ours" if backend == "auto" else f"ours, {backend}"
            contenders.append(layers.ours(rounded, sampled, name=name, backend=backend))
        contenders.append(layers.dense(rounded))
        if dtype == torch.float32:
            contenders.append(replace(layers.our_dense(rounded), few=True))
        if dtype == torch.float32 and PEERS["fairscale"].takes(rounded):
            contenders.append(replace(layers.ours_gshard(rounded), few=True))
        for name in suite.options.peers:
            peer = PEERS[name]
            heavy = dtype != torch.float32 and case.w_in.numel() >= MANY_NUMBERS
            if peer.installed and peer.takes(rounded) and not heavy and not peer.is_slow(case):
                contenders.append(replace(peer.build(rounded, sampled), few=True))  # required with default memory
    return [c if c.outcome is None else replace(c, reference=reference) for c in contenders]


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def bench_layer(shape: Shape, gated: bool, suite: Suite) -> None:
    if gated and not suite.options.all_rows:
        pytest.skip("with --full: bench_default_memory.py has SwiGLU, and GELU has all dtypes here")
    case = layers.uniform_case(shape, suite.device, gated=gated)
    name = f"layer, {'SwiGLU' if gated else 'GELU'}, {shape}"
    suite.note_load(f"{name}, uniform", case.load)
    suite.run(name, contenders_of(suite, case), ratios=held_ratios(shape, gated))


def bench_layer_on_two_threads(suite: Suite) -> None:
    """Wall time: what gather, sort and small GEMMs lose in parallel scaling."""
    if (os.cpu_count() or 1) < 2 or suite.device.type != "cpu" or "fp32" not in suite.options.dtypes:
        pytest.skip("needs two cores, --device cpu and fp32")
    shape = suite.options.layer_shapes[0]
    case = layers.uniform_case(shape, suite.device)
    sampled = case.sampled()
    ours = replace(layers.ours(case, sampled), reference=layers.reference_loop(case, sampled))
    goal = 1.20 if shape in REFERENCE_SHAPES and shape.E == 8 else None
    ratios = [Ratio("ours [fp32]", "dense [fp32]", None, goal)]
    suite.run(f"layer on two threads, GELU, {shape}", [ours, layers.dense(case)], ratios=ratios, threads=2)


def bench_load(suite: Suite) -> None:
    """Ours alone, over the number of experts and their imbalance, in one run."""
    options = suite.options
    backend, shapes = options.backends[0], options.layer_shapes
    contenders: list[Contender] = []
    for shape in shapes:
        uniform = layers.uniform_case(shape, suite.device)
        contenders += layers.ours_under_loads(uniform, ROUTINGS, backend=backend)
        for routing in ROUTINGS:
            load = (uniform if routing == "uniform" else uniform.with_routing(routing)).load
            suite.note_load(f"load, {shape}, {routing}", load)
        if shape is shapes[-1]:
            contenders.append(layers.dense(uniform))
    held = shapes == REFERENCE_SHAPES
    ratios = [Ratio(f"ours {s} zipf [fp32]", f"ours {s} uniform [fp32]", 1.15 if held else None) for s in shapes]
    growth = {64: 1.4} if held else {}
    ratios += [
        Ratio(f"ours {s} uniform [fp32]", f"ours {shapes[0]} uniform [fp32]", growth.get(s.E)) for s in shapes[1:]
    ]
    suite.run("load, GELU", contenders, ratios=ratios, few=True)
