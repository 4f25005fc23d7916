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
from moe.scaling.flops import (
    component_flops,
    executed_flops,
    flops_per_token,
    paper_training_flops,
    training_flops,
)

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


RECOMPUTED = {
    **SHAPES,
    "sparse": {"sparse": True, "dropout": 0.1},
    "gated": {"gated": True, "bias": True},
    "norm_behind": {"norm_position": "post"},
    "shared": {"sparse": True, "experts": {"shared_d_ff": 7}},
    "capacity": {"sparse": True, "experts": {"capacity_factor": 1.0}},
    "gshard": {"sparse": True, "experts": {"router": "gshard"}},
}


def test_what_is_computed_again_and_dropped_is_counted(model_config: Callable[..., ModelConfig]) -> None:
    """Recomputed layers and capacities, against torch's counter over forward and backward."""
    dropped = 0
    for name, shape in RECOMPUTED.items():
        shape = dict(shape)
        experts = shape.pop("experts", {})
        config = model_config(**shape)
        if experts:
            config = replace(config, moe=replace(config.moe, **experts))
        model = Transformer(config, backend="reference", recompute=True)
        tokens = torch.randint(config.vocab_size, (2, 8))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = model(tokens, tokens)
            output.token_losses.sum().backward()
        rows = [int(routing.kept.sum()) for routing in output.routings]
        dropped += sum(2 * tokens.numel() - count for count in rows)
        rows_per_token = rows[0] / tokens.numel() if len(rows) == 1 else None
        expected = executed_flops(config, 8, recompute=True, rows_per_token=rows_per_token)
        assert counter.get_total_flops() == pytest.approx(expected.total * tokens.numel(), rel=1e-9), name
    assert dropped > 0


def test_without_recompute_and_drops_all_that_is_executed_is_useful(model_config: Callable[..., ModelConfig]) -> None:
    config = model_config(sparse=True)
    assert executed_flops(config, 8, recompute=False) == training_flops(config, 8)
    twice = executed_flops(config, 8, recompute=False, rows_per_token=4.0)
    useful = training_flops(config, 8)
    assert (twice.experts, twice.permutation) == (2 * useful.experts, 2 * useful.permutation)
    assert twice._replace(experts=0, permutation=0) == useful._replace(experts=0, permutation=0)
    again = executed_flops(config, 8, recompute=False, head_again=True)
    assert again.head * 3 == useful.head * 4
    assert again.total - useful.total == component_flops(config, 8).head


def test_the_permutation_is_a_weighted_sum(model_config: Callable[..., ModelConfig]) -> None:
    """K multiply-adds an element, in one sparse layer of three; in no total, as no counter of products sees it."""
    parts = component_flops(model_config(sparse=True), 8)
    assert parts.permutation == 2 * 2 * 12
    assert parts.total == sum(parts[:-1])


# Artetxe et al. 2021: ZFLOPs of 300e9 tokens with and without recompute, GFLOPs of a token with it
PAPER = {
    "125m": (0.364, 0.273, 1.212),
    "355m": (1.059, 0.794, 3.528),
    "1.3b": (3.567, 2.675, 11.889),
    "2.7b": (7.076, 5.307, 23.585),
    "6.7b": (17.119, 12.839, 57.063),
    "13b": (32.673, 24.505, 108.910),
    "125m +moe": (0.432, 0.324, 1.438),
    "355m +moe": (1.300, 0.975, 4.334),
    "1.3b +moe": (4.533, 3.400, 15.110),
    "6.7b +moe": (22.273, 16.705, 74.243),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_cost_sheet(name: str) -> None:
    preset, *sparse = name.split()
    model = compose([f"model={preset}", *(["+moe=gshard_512e"] if sparse else [])]).model
    with_recompute, without, of_a_token = PAPER[name]
    assert round(paper_training_flops(model, 300e9, 2048) / 1e21, 3) == with_recompute
    assert round(paper_training_flops(model, 300e9, 2048, recompute=False) / 1e21, 3) == without
    assert round(paper_training_flops(model, 1, 2048) / 1e9, 3) == of_a_token


def test_the_papers_ratios_of_twins() -> None:
    ratios = []
    for preset in ("125m", "355m", "1.3b", "6.7b"):
        dense, sparse = (compose([f"model={preset}", *moe]).model for moe in ([], ["+moe=gshard_512e"]))
        ratios.append(round(paper_training_flops(sparse, 1, 2048) / paper_training_flops(dense, 1, 2048), 3))
    assert ratios == [1.187, 1.228, 1.271, 1.301]


def test_what_the_papers_formula_leaves_out() -> None:
    """What the 1.1T model executes without drops is above the paper's count by its routers and 264 rows of its head."""
    model = compose(["experiment=artetxe2021/1.1t"]).model
    executed = executed_flops(model, 2048, recompute=True)
    paper = paper_training_flops(model, 1, 2048)
    assert executed.total - paper == pytest.approx(executed.router + 3 * 2 * 4096 * 264, rel=1e-9)


def test_twins_of_tiny_differ_by_their_routers_alone() -> None:
    """Two experts of half the width do what the dense network does; the projection to 512 logits comes on top."""
    dense, sparse = compose(["model.vocab_size=4096"]).model, compose(["model.vocab_size=4096", "+moe=512e"]).model
    a, b = flops_per_token(dense, 256).forward, flops_per_token(sparse, 256).forward
    assert b - a == len(sparse.moe_layers) * 2 * sparse.d_model * 512


def test_shapes_the_formula_was_not_made_for_are_refused() -> None:
    with pytest.raises(ValueError, match="gated=false, not for d_ff"):
        paper_training_flops(compose(["model=opt_125m", "model.d_ff=100"]).model, 1e9, 2048)
    with pytest.raises(ValueError, match="top_k=2, moe_every=2"):
        paper_training_flops(compose(["model=125m", "+moe=64e_top8"]).model, 1e9, 2048)
    with pytest.raises(ValueError, match=r"without model\.moe\.shared_d_ff"):
        paper_training_flops(compose(["model=125m", "+moe=512e", "model.moe.shared_d_ff=64"]).model, 1e9, 2048)
    with pytest.raises(ValueError, match="experts in half of the layers"):
        paper_training_flops(compose(["model=125m", "+moe=512e", "model.num_layers=11"]).model, 1e9, 2048)
    with pytest.raises(ValueError, match=r"as wide as model\.d_model"):
        paper_training_flops(compose(["model=125m", "model.num_kv_heads=1"]).model, 1e9, 2048)
