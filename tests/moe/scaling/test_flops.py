"""FLOPs against torch's counter and against the paper's cost sheet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe.compose import compose
from moe.config import ModelConfig
from moe.model import Transformer
from moe.scaling.flops import flops_per_token, paper_training_flops

SHAPES = {
    "dense": {},
    "sparse": {"sparse": True},
    "experts_of_another_width": {"sparse": True, "expert_d_ff": 7, "moe_placement": "first"},
    "gated_grouped_heads": {"sparse": True, "gated": True, "num_kv_heads": 1, "head_dim": 6},
    "shared_experts": {"sparse": True, "gated": True, "experts": {"shared_d_ff": 7, "shared_gate": True}},
    "narrow_embedding": {"embedding_dim": 8, "position": "learned", "tie_embeddings": False},
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_counter_of_torch_agrees(name: str, model_config: Callable[..., ModelConfig]) -> None:
    """With the reference backend and SDPA's plain maths: the counter sees neither custom ops nor flash attention."""
    shape = dict(SHAPES[name])
    experts = shape.pop("experts", {})
    config = model_config(**shape)
    if experts:
        config = replace(config, moe=replace(config.moe, **experts))
    model = Transformer(config, backend="reference")
    tokens = torch.randint(config.vocab_size, (2, 8))
    expected = flops_per_token(config, 8)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            output = model(tokens, tokens)
        assert counter.get_total_flops() == expected.forward * tokens.numel()
        with FlopCounterMode(display=False) as counter:
            output.token_losses.sum().backward()
    assert counter.get_total_flops() == pytest.approx((expected.training - expected.forward) * tokens.numel(), rel=1e-9)


# moe_lm.md section 2: ZFLOPs of 300e9 tokens with and without recompute; None has no twin
ZETTAFLOPS = {
    "125m": (0.364, 0.273, 0.432),
    "355m": (1.059, 0.794, 1.300),
    "1.3b": (3.567, 2.675, 4.533),
    "2.7b": (7.076, 5.307, None),
    "6.7b": (17.119, 12.839, 22.273),
    "13b": (32.673, 24.505, None),
}


@pytest.mark.parametrize("name", ZETTAFLOPS)
def test_the_papers_cost_sheet(name: str) -> None:
    dense, without_recompute, sparse = ZETTAFLOPS[name]
    model = compose([f"model={name}"]).model
    assert round(paper_training_flops(model, 300e9, 2048) / 1e21, 3) == dense
    assert round(paper_training_flops(model, 300e9, 2048, recompute=False) / 1e21, 3) == without_recompute
    if sparse is not None:
        twin = compose([f"model={name}", "+moe=gshard_512e"]).model
        assert round(paper_training_flops(twin, 300e9, 2048) / 1e21, 3) == sparse


def test_twins_of_tiny_differ_by_their_routers_alone() -> None:
    """Two experts of half the width do what the dense network does; the projection to 512 logits comes on top."""
    dense, sparse = compose(["model.vocab_size=4096"]).model, compose(["model.vocab_size=4096", "+moe=512e"]).model
    a, b = flops_per_token(dense, 256).forward, flops_per_token(sparse, 256).forward
    assert b - a == len(sparse.moe_layers) * 2 * sparse.d_model * 512


def test_shapes_the_formula_was_not_made_for_are_refused() -> None:
    with pytest.raises(ValueError, match="ungated d_ff"):
        paper_training_flops(compose(["model=opt_125m", "model.d_ff=100"]).model, 1e9, 2048)
    with pytest.raises(ValueError, match="top_k=2, moe_every=2"):
        paper_training_flops(compose(["model=125m", "+moe=64e_top8"]).model, 1e9, 2048)
