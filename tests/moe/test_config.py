"""Checks of single fields that no preset reaches. Combinations and messages are in test_compose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from moe.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    RopeScalingConfig,
    TrainConfig,
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OptimConfig(lr=1.0, beta2=1.0), r"optim\.beta2 \(1\.0\) must be at least 0 and below 1"),
        (lambda: OptimConfig(lr=1.0, weight_decay=-0.1), r"optim\.weight_decay \(-0\.1\) must not be negative"),
        (lambda: OptimConfig(lr=math.inf), r"optim\.lr \(inf\) must be a finite number"),
        (lambda: OptimConfig(lr=math.nan), r"optim\.lr \(nan\) must be a finite number"),
        (lambda: OptimConfig(lr=1.0, weight_decay=math.nan), r"optim\.weight_decay \(nan\) must be a finite number"),
        (lambda: OptimConfig(lr=1.0, clip_norm=math.inf), r"optim\.clip_norm \(inf\) must be a finite number"),
        (lambda: EvalConfig(temperature=math.nan), r"eval\.temperature \(nan\) must be a finite number"),
        (lambda: OptimConfig(lr=1.0, decay_fraction=1.5), r"optim\.decay_fraction \(1\.5\)"),
        (lambda: OptimConfig(lr=1.0, schedule="step"), "linear, cosine, wsd"),
        (lambda: TrainConfig(num_steps=0, batch_tokens=1), r"train\.num_steps \(0\) must be above 0"),
        (lambda: TrainConfig(num_steps=1, batch_tokens=1, precision="fp8"), "fp32, bf16"),
        (lambda: TrainConfig(num_steps=1, batch_tokens=1, max_skipped_steps=-1), "max_skipped_steps"),
        (
            lambda: ParallelConfig(fixed_capacity=True, rows_limit=8),
            r"parallel\.rows_limit \(8\) must be null with parallel\.fixed_capacity=true",
        ),
        (lambda: EvalConfig(temperature=-1.0), "0 is greedy"),
        (lambda: EvalConfig(top_p=0.0), r"eval\.top_p \(0\.0\)"),
        (lambda: DataConfig(name="python", validation_fraction=0.6, test_fraction=0.5), "must leave text to train on"),
        (lambda: DataConfig(name="web"), r"data\.name \('web'\) must be one of: python, packages, text"),
    ],
)
def test_bad_values_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_gshard_owns_its_capacity(moe_config: MoEConfig) -> None:
    with pytest.raises(ValueError, match=r"capacity_factor \(1\.0\) must be null with router=gshard"):
        replace(moe_config, router="gshard", capacity_factor=1.0)
    with pytest.raises(ValueError, match="normalize_weights must be true"):
        replace(moe_config, router="gshard", normalize_weights=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": "tanh"}, "softmax, sigmoid"),
        ({"shared_gate": True}, "model.moe.shared_d_ff"),
        ({"num_groups": 5}, "must be given together"),
        (
            {"num_experts": 8, "num_groups": 3, "top_groups": 1},
            r"num_groups \(3\) must divide model\.moe\.num_experts \(8\)",
        ),
        (
            {"num_experts": 8, "num_groups": 4, "top_groups": 5},
            r"model\.moe\.top_groups \(5\) must be at most model\.moe\.num_groups \(4\)",
        ),
        (
            {"num_experts": 8, "top_k": 3, "num_groups": 4, "top_groups": 1},
            r"model\.moe\.top_k \(3\) must be at most the 2 experts of model\.moe\.top_groups \(1\) of 4 groups",
        ),
        ({"jitter": 1.0}, r"model\.moe\.jitter \(1\.0\) must be below 1"),
        ({"jitter": math.nan}, r"model\.moe\.jitter \(nan\) must be a finite number"),
        ({"capacity_factor": math.inf}, r"model\.moe\.capacity_factor \(inf\) must be a finite number"),
        ({"load_balance_weight": -1.0}, r"load_balance_weight \(-1\.0\) must not be negative; 0 switches it off"),
        ({"second_policy": "random"}, "applies only with router=gshard"),
        ({"load_balance_scope": "rank"}, "local, global, sequence"),
        ({"router": "gshard", "jitter": 0.1}, r"model\.moe\.jitter \(0\.1\) applies only with router=topk"),
        (
            {"router": "gshard", "eval_capacity_factor": 1.0},
            r"eval_capacity_factor \(1\.0\) applies only with router=topk",
        ),
        ({"router": "gshard", "scores": "sigmoid"}, "applies only with router=topk"),
        ({"router": "expert_choice"}, "topk, gshard"),
        ({"bias_balance_rate": 0.0}, r"bias_balance_rate \(0\.0\) must be above 0"),
    ],
)
def test_expert_options_that_do_not_fit_are_refused(moe_config: MoEConfig, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(moe_config, **changes)


def test_sparse_layers_follow_placement(model_config: Callable[..., ModelConfig], moe_config: MoEConfig) -> None:
    def layers(every: int, placement: str) -> tuple[int, ...]:
        return model_config(num_layers=6, moe=replace(moe_config, moe_every=every), moe_placement=placement).moe_layers

    assert layers(2, "last") == (1, 3, 5)
    assert layers(2, "first") == (0, 2, 4)
    assert layers(3, "last") == (2, 5)
    assert layers(1, "last") == (0, 1, 2, 3, 4, 5)
    assert model_config().moe_layers == ()


def test_head_widths(model_config: Callable[..., ModelConfig]) -> None:
    with pytest.raises(ValueError, match="each key-value head serves an equal group"):
        model_config(num_kv_heads=2)
    with pytest.raises(ValueError, match=r"head width \(5\) must be even"):
        model_config(head_dim=5)
    assert model_config(num_kv_heads=1).kv_heads == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "yarn", "factor": 2.0}, r"model.rope_scaling.kind \('yarn'\) must be one of: linear, llama3"),
        ({"kind": "linear", "factor": 0.0}, r"model.rope_scaling.factor \(0.0\) must be above 0"),
        ({"kind": "llama3", "factor": 2.0}, "original_max_seq_len must be set"),
        (
            {"kind": "llama3", "factor": 2.0, "original_max_seq_len": 8, "low_freq_factor": 4.0},
            r"low_freq_factor \(4.0\) must be below high_freq_factor \(4.0\)",
        ),
    ],
)
def test_rope_scaling_is_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScalingConfig(**options)


def test_first_layers_may_stay_dense(model_config: Callable[..., ModelConfig]) -> None:
    moe = replace(model_config(sparse=True).moe, moe_every=1)
    model = replace(model_config(sparse=True), num_layers=4, moe=moe)
    assert replace(model, dense_layers=1).moe_layers == (1, 2, 3)
    assert replace(model, dense_layers=1, moe=replace(moe, moe_every=2)).moe_layers == (1, 3)
    for count in (-1, 4):
        with pytest.raises(ValueError, match=rf"model.dense_layers \({count}\) must be at least 0 and leave a sparse"):
            replace(model, dense_layers=count)
    learned = replace(model, position="learned")
    with pytest.raises(ValueError, match=r"rope_scaling applies only with model\.position=rope, not learned"):
        replace(learned, rope_scaling=RopeScalingConfig("linear", 2.0))
