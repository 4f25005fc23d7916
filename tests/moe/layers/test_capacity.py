"""Capacities are exact whole numbers, however they are asked for, and follow the factor that is set."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from moe.layers import ExpertChoiceRouter, GShardRouter, TopKRouter
from moe.layers.capacity import ExactFactor, expert_capacity
from moe.layers.initialization import WeightInit

T, D, E = 11, 6, 5


def inputs() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(0))


def router(kind: type = TopKRouter, **options: object) -> TopKRouter:
    made = kind(D, E, **options)
    made.reset_parameters(seed=3, init=WeightInit(std=1.0))
    return made


def test_capacity_is_exact_in_decimals() -> None:
    assert expert_capacity(10, 1, 1, ExactFactor.of(1.1)) == 11  # 1.1 * 10 is 11.000000000000002 in binary
    assert expert_capacity(10, 4, 2, ExactFactor.of(1.0)) == 5
    assert expert_capacity(10, 4, 2, ExactFactor.of(1.25)) == 7  # 6.25
    assert expert_capacity(0, 4, 2, ExactFactor.of(1.25)) == 0
    assert expert_capacity(3, 1, 1, ExactFactor.of(4 / 3)) == 4
    assert expert_capacity(100, 1, 1, ExactFactor.of(1.1 * 1.1)) == 121  # 1.2100000000000002
    assert expert_capacity(torch.tensor(3 * 10**9), 1, 1, ExactFactor.of(4 / 3)) == 4 * 10**9


@pytest.mark.parametrize("factor", [0, -1.0, 1e-9, 1e9, torch.nan, torch.inf, True, "1.0"])
def test_a_factor_that_is_none_is_refused_whenever_it_is_set(factor: object) -> None:
    made = {"capacity_factor": TopKRouter(D, E), "eval_capacity_fraction": GShardRouter(D, E)}
    for name in ("capacity_factor", "eval_capacity_factor"):
        with pytest.raises(ValueError, match=rf"{name} \({factor}\) must be above 0.*or None for dropless"):
            TopKRouter(D, E, **{name: factor})
    for name, one in made.items():
        with pytest.raises(ValueError, match=rf"{name} \({factor}\) must be above 0"):
            setattr(one, name, factor)
        assert getattr(one, name) is None
    with pytest.raises(ValueError, match=r"capacity_factor \(None\) must be above 0"):
        ExpertChoiceRouter(D, E, capacity_factor=None)


def test_a_factor_that_is_set_later_takes_effect() -> None:
    """The representation said so while the router went on with the old one."""
    made = router()
    made.capacity_factor, made.eval_capacity_factor = 0.3, 0.5
    assert "capacity_factor=0.3, eval_capacity_factor=0.5" in repr(made)
    for mode, factor in ((True, 0.3), (False, 0.5)):
        expected = router(capacity_factor=factor)(inputs())
        routing = made.train(mode)(inputs())
        assert torch.equal(routing.kept, expected.kept)
        assert not routing.kept.all()
    made.eval_capacity_factor = None
    assert made(inputs()).kept.all()
    assert copy.deepcopy(made).capacity_factor == 0.3
    gshard = router(GShardRouter).eval()
    gshard.eval_capacity_fraction = 0.25
    assert gshard.capacity(T) == 3
    choice = router(ExpertChoiceRouter)
    choice.capacity_factor = 1.0
    assert int(choice(inputs()).kept.sum()) == choice.num_rows(T) == 15


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.1, 4 / 3, 10 / 9, 1.1 * 1.1])
@pytest.mark.parametrize("num_tokens", [4096, 5000])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_capacity_of_many_tokens_is_exact_with_a_mask_and_without(
    factor: float, num_tokens: int, backend: str
) -> None:
    """All tokens want the same experts, so what these keep is their capacity."""
    fraction = Fraction(factor).limit_denominator(1000)
    x, padding = torch.ones(num_tokens, 3), torch.zeros(70, 3)
    mask = torch.arange(num_tokens + 70) < num_tokens
    for e, router in (
        (7, TopKRouter(3, 7, 2, capacity_factor=factor, backend=backend)),
        (7 * 2, ExpertChoiceRouter(3, 7, capacity_factor=factor, backend=backend)),
    ):
        capacity = min(math.ceil(fraction * num_tokens * 2 / e), num_tokens)
        for routing in (router(x), router(torch.cat([x, padding]), mask)):
            taken = torch.zeros(7, dtype=torch.int64)
            taken.scatter_add_(0, routing.expert_indices.flatten(), routing.kept.flatten().long())
            assert taken[taken > 0].tolist() == [capacity] * (2 if e == 7 else 7)
