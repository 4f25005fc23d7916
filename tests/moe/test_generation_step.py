"""The step that generation takes on a CPU computes what the model's forward computes, for every shape of model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config import ModelConfig, MoEConfig, RopeScalingConfig
from moe.generation import generate
from moe.generation.decode_step import DecodeStep, decode_step, reason_against
from moe.generation.few_rows import MOST_ROWS
from moe.generation.products import FEWEST_STEPS, MOST_COPIED_BYTES, copies_pay
from moe.kernels.topk_routing import NonFiniteScoresError
from moe.model import Transformer

TOLERANCE = 1e-12  # of the largest logit, in float64
SINGLE = 2e-6  # the same in float32

SHAPES: dict[str, dict[str, Any]] = {
    "rope": {},
    "grouped heads": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 4},
    "learned, biases, layernorm": {"position": "learned", "position_offset": 2, "bias": True, "norm": "layernorm"},
    "sinusoidal, scaled": {"position": "sinusoidal", "position_offset": 2, "scale_embeddings": True},
    "post-norm": {"norm_position": "post"},
    "projected embeddings": {"embedding_dim": 8},
    "gated, untied": {"gated": True, "activation": "silu", "tie_embeddings": False},
    "norm of heads": {"qk_norm": "head", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
    "norm of all": {"qk_norm": "full", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
    "relu": {"activation": "relu", "bias": True},
    "scaled rotation": {"rope_scaling": RopeScalingConfig("linear", 4.0)},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one of five": {"top_k": 1},
    "unnormalised, scaled": {"normalize_weights": False, "weight_scale": 2.5},
    "sigmoid": {"scores": "sigmoid"},
    "biases to balance": {"bias_balance_rate": 0.1},
    "capacity": {"eval_capacity_factor": 1.0},
    "gshard": {"router": "gshard"},
    "shared": {"shared_d_ff": 7, "shared_gate": True},
}


def filled(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Transformer:
    """A model in evaluation whose every parameter matters, norms and biases too."""
    model = Transformer(config, dtype=dtype)
    model.reset_parameters(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model.eval()


def both(model: Transformer, padding: list[int], num_steps: int = 3) -> tuple[Tensor, Tensor]:
    """Logits of three steps after a prompt of five tokens: of the step itself, and of the model. (3, B, V) each"""
    batch = len(padding)
    tokens = torch.randint(0, 37, (batch, 8), generator=torch.Generator().manual_seed(2))
    rows: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for found, fast in zip(rows, (True, False), strict=True):
            cache = model.new_cache(batch, 8, torch.tensor(padding) if any(padding) else None)
            model(tokens[:, :5], cache=cache)
            step = decode_step(model, cache, num_steps)
            assert isinstance(step, DecodeStep)
            for place in range(5, 8):
                if fast:
                    found.append(step(tokens[:, place]))
                else:
                    found.append(model(tokens[:, place : place + 1], cache=cache).logits[:, -1])
            assert cache.length == 8
    return torch.stack(rows[0]), torch.stack(rows[1])


def assert_equal(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("num_steps", [3, FEWEST_STEPS], ids=["views", "copies"])
@pytest.mark.parametrize("padding", [[0], [0, 0, 0], [3, 0, 4]], ids=["one", "even", "padded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_steps_equal_the_model(
    shape: str, padding: list[int], num_steps: int, model_config: Callable[..., ModelConfig]
) -> None:
    assert_equal(*both(filled(model_config(**SHAPES[shape])), padding, num_steps), TOLERANCE)


@pytest.mark.parametrize("num_steps", [3, FEWEST_STEPS], ids=["views", "copies"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("network", [{}, {"gated": True}, {"bias": True}, {"gated": True, "bias": True}], ids=str)
@pytest.mark.parametrize("experts", EXPERTS)
def test_sparse_steps_equal_the_model(
    experts: str,
    network: dict[str, bool],
    batch: int,
    num_steps: int,
    model_config: Callable[..., ModelConfig],
    moe_config: MoEConfig,
) -> None:
    config = model_config(moe=replace(moe_config, **EXPERTS[experts]), **network)
    model = filled(config)
    if experts == "biases to balance":
        router = model.layers[1].feed_forward.router
        router.expert_bias.copy_(torch.tensor([0.0, 5.0, 0.0, 0.0, 5.0]))  # decides what is chosen
    assert_equal(*both(model, [0] * batch, num_steps), TOLERANCE)


def test_many_rows_go_through_the_layer(model_config: Callable[..., ModelConfig]) -> None:
    batch = MOST_ROWS // 2 + 1  # of two choices each
    model = filled(model_config(sparse=True))
    called = []
    sparse = model.layers[1].feed_forward
    forward = sparse.forward
    sparse.forward = lambda *args, **options: called.append(1) or forward(*args, **options)
    found, expected = both(model, [0] * batch)
    assert len(called) == 2 + 3 + 3  # two prompts, three steps each way
    assert_equal(found, expected, TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
def test_steps_in_lower_precision(dtype: torch.dtype, sparse: bool, model_config: Callable[..., ModelConfig]) -> None:
    """bfloat16 has 8 bits: a value rounds to within 2^-9 of itself, and errors of a few operations add up."""
    model = filled(model_config(sparse=sparse, bias=True), dtype)
    tolerance = SINGLE if dtype == torch.float32 else 0.05
    assert_equal(*both(model, [0, 2]), tolerance)


def test_equal_scores_choose_the_first_experts(model_config: Callable[..., ModelConfig], moe_config: MoEConfig) -> None:
    model = filled(model_config(moe=moe_config))
    with torch.no_grad():
        model.layers[1].feed_forward.router.weight.fill_(0.0)
    assert_equal(*both(model, [0]), TOLERANCE)


def test_scores_that_are_not_finite_are_refused(model_config: Callable[..., ModelConfig]) -> None:
    model = filled(model_config(sparse=True))
    cache = model.new_cache(1, 4)
    with torch.no_grad():
        model(torch.tensor([[1]]), cache=cache)
        model.layers[1].feed_forward.router.weight[2] = torch.nan
    with pytest.raises(NonFiniteScoresError):
        decode_step(model, cache, 2)(torch.tensor([1]))


def test_a_full_cache_is_refused(model_config: Callable[..., ModelConfig]) -> None:
    model = filled(model_config())
    cache = model.new_cache(1, 2)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match="all 2 positions of the cache"):
        decode_step(model, cache, 2)(torch.tensor([1]))


@dataclass
class Wider(ModelConfig):
    """A configuration that has learned something that the step does not know."""

    attention_scale: float | None = None


class Scaled(torch.nn.RMSNorm):
    """A norm of someone else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_the_step_does_not_know_it_leaves_to_the_model(model_config: Callable[..., ModelConfig]) -> None:
    config = model_config()
    assert reason_against(filled(config)) is None
    wider = Wider(**vars(config))
    assert reason_against(filled(wider)) is None  # at its default a field means nothing
    wider.attention_scale = 2.0
    assert reason_against(filled(wider)) == "model.attention_scale is set"

    hooked = filled(config)
    hooked.layers[1].attention.register_forward_hook(lambda *_: None)
    assert reason_against(hooked) == "layers.1.attention has hooks"

    other = filled(config)
    other.layers[0].attention_norm = Scaled(12, dtype=torch.float64)
    assert reason_against(other) == "layers.0.attention_norm is a Scaled"
    assert generate(other, [[1, 2]], 6) == _one_by_one(other, [1, 2], 6)

    mixed = filled(config)
    mixed.layers[0].attention_norm.float()
    assert "torch.float32" in str(reason_against(mixed))

    chosen = Transformer(config, backend="reference", dtype=torch.float64)
    assert reason_against(chosen) == "backend=reference asks for other kernels"
    with torch.autocast("cpu"):
        assert "autocast" in str(reason_against(filled(config)))


def test_a_hook_on_the_experts_is_called(model_config: Callable[..., ModelConfig]) -> None:
    model = filled(model_config(sparse=True))
    called = []
    model.layers[1].feed_forward.experts.register_forward_hook(lambda *_: called.append(1))
    generate(model, [[1]], 4)
    assert len(called) == 4


def test_copies_are_for_long_generations_of_few_rows_and_models_that_are_not_huge() -> None:
    assert copies_pay(MOST_COPIED_BYTES, 1, FEWEST_STEPS)
    assert not copies_pay(MOST_COPIED_BYTES + 1, 1, FEWEST_STEPS)
    assert not copies_pay(1, 9, FEWEST_STEPS)
    assert not copies_pay(1, 1, FEWEST_STEPS - 1)


def _one_by_one(model: Transformer, prompt: list[int], count: int) -> list[list[int]]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return [tokens[len(prompt) :]]
