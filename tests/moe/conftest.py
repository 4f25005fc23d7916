"""Small configurations that the tests of `moe` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from moe.config import ModelConfig, MoEConfig


@pytest.fixture
def moe_config() -> MoEConfig:
    return MoEConfig(
        name="5e",
        num_experts=5,
        top_k=2,
        moe_every=2,
        router="topk",
        normalize_weights=True,
        capacity_factor=None,
        eval_capacity_factor=None,
        load_balance_weight=0.01,
        load_balance_choices="all",
        load_balance_reduction="mean",
        router_z_loss_weight=0.001,
    )


@pytest.fixture
def model_config(moe_config: MoEConfig) -> Callable[..., ModelConfig]:
    """A factory of odd little models; `sparse=True` puts experts into every second layer."""

    def make(*, sparse: bool = False, **changes: object) -> ModelConfig:
        base = ModelConfig(
            name="test",
            d_model=12,
            d_ff=20,
            num_layers=3,
            num_heads=3,
            max_seq_len=24,
            vocab_size=37,
            norm="rmsnorm",
            position="rope",
            bias=False,
            moe=moe_config if sparse else None,
        )
        return replace(base, **changes)

    return make
