from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moe.config import ModelConfig, OptimConfig
from moe.model import Transformer
from moe.training.optimizer import clip_gradients, gradient_norm, learning_rate, make_optimizer, parameter_groups

CONFIG = OptimConfig(lr=0.1, weight_decay=0.5, embedding_lr_scale=3.0, expert_lr_scale=0.5, warmup_steps=10)


def test_every_parameter_is_in_one_group(model_config: Callable[..., ModelConfig]) -> None:
    model = Transformer(model_config(sparse=True, bias=True, norm="layernorm"))
    for decay in ("all", "matrices"):
        groups = parameter_groups(model, replace(CONFIG, decay=decay))
        listed = [id(p) for group in groups for p in group["params"]]
        assert sorted(listed) == sorted(id(p) for p in model.parameters())


def test_groups_have_their_rates_and_decay(model_config: Callable[..., ModelConfig]) -> None:
    model = Transformer(model_config(sparse=True, bias=True))
    groups = {g["name"]: g for g in parameter_groups(model, replace(CONFIG, decay="matrices"))}
    names = {id(p): name for name, p in model.named_parameters()}
    members = {group: {names[id(p)] for p in g["params"]} for group, g in groups.items()}
    assert members["embedding"] == {"embedding.weight"}
    assert members["experts"] == {f"layers.1.feed_forward.experts.{name}" for name in ("w_in", "w_out")}
    assert members["experts_no_decay"] == {f"layers.1.feed_forward.experts.{name}" for name in ("b_in", "b_out")}
    assert "layers.1.feed_forward.router.weight" in members["other"]
    assert {"final_norm.weight", "layers.0.attention.qkv.bias"} <= members["other_no_decay"]
    assert [groups[name]["lr_scale"] for name in ("embedding", "experts", "other")] == [3.0, 0.5, 1.0]
    assert all((g["weight_decay"] == 0) == name.endswith("no_decay") for name, g in groups.items())


def test_decay_is_decoupled() -> None:
    parameter = torch.nn.Parameter(torch.tensor([[2.0]]))
    model = torch.nn.ParameterList([parameter])
    optimizer = make_optimizer(model, CONFIG)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert float(parameter.detach()) == pytest.approx(2.0 * (1 - 0.1 * 0.5))


def rates(config: OptimConfig, num_steps: int = 100) -> list[float]:
    return [learning_rate(step, num_steps, config) / config.lr for step in range(1, num_steps + 1)]


def test_linear_schedule() -> None:
    values = rates(CONFIG)
    assert values[0] == pytest.approx(0.1)
    assert values[9] == 1.0
    assert values[54] == pytest.approx(0.5)
    assert values[-1] == 0.0


def test_cosine_schedule() -> None:
    values = rates(replace(CONFIG, schedule="cosine", final_lr_fraction=0.1))
    assert values[9] == pytest.approx(1.0)
    assert values[54] == pytest.approx(0.55)
    assert values[-1] == pytest.approx(0.1)
    assert values[20] > 1 - 0.9 * 11 / 90  # above the straight line in the first half


def test_wsd_schedule() -> None:
    values = rates(replace(CONFIG, schedule="wsd", decay_fraction=0.2))
    assert values[9:80] == [1.0] * 71
    assert values[89] == pytest.approx(0.5)
    assert values[-1] == 0.0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_a_schedule_shorter_than_its_warm_up_stays_in_range(schedule: str) -> None:
    assert all(0 < value < 1 for value in rates(replace(CONFIG, schedule=schedule), num_steps=5))


def test_clipping_scales_the_whole_gradient() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0, 0.0])
    norm = gradient_norm(parameters)
    assert float(norm) == 5.0
    clip_gradients(parameters, norm, 10.0)
    assert float(gradient_norm(parameters)) == 5.0
    clip_gradients(parameters, norm, 1.0)
    assert float(gradient_norm(parameters)) == pytest.approx(1.0, rel=1e-4)


def test_the_norm_of_a_poisoned_gradient_is_not_finite() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, float("nan")])
    assert not gradient_norm([parameter]).isfinite()
