"""The dynamic loss scale of float16, alone and in a trainer of one process and of two."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moe.checkpoint import TrainState
from moe.distributed.world import World
from moe.training.loss_scale import FIRST_SCALE, GROWTH_STEPS, LOWEST_SCALE, update_scale
from tests.moe.distributed.contract import Case, MeshesOf, build, rank_batch, trainer_of
from tests.ranks import run_ranks


def state_of(scale: float, steps: int = 0) -> TrainState:
    return TrainState(loss_scale=scale, steps_since_overflow=steps)


def test_an_overflow_halves_the_scale_and_starts_the_count_again() -> None:
    state = state_of(1024.0, steps=GROWTH_STEPS - 1)
    assert update_scale(state, finite=False)
    assert (state.loss_scale, state.steps_since_overflow) == (512.0, 0)


def test_the_scale_doubles_after_so_many_steps_and_not_before() -> None:
    state = state_of(1024.0)
    for _ in range(GROWTH_STEPS - 1):
        assert update_scale(state, finite=True)
    assert state.loss_scale == 1024.0
    update_scale(state, finite=True)
    assert (state.loss_scale, state.steps_since_overflow) == (2048.0, 0)


def test_at_the_lowest_scale_an_overflow_is_a_real_one() -> None:
    """Then it counts towards train.max_skipped_steps."""
    state = state_of(2.0 * LOWEST_SCALE)
    assert update_scale(state, finite=False)
    assert not update_scale(state, finite=False)
    assert state.loss_scale == LOWEST_SCALE


def test_float16_trains_in_one_process_and_finds_its_scale() -> None:
    """From a scale far too high: updates are skipped until it fits, none of them as an error, and then it trains."""
    case = Case(1, precision="fp16")
    alone = World(0, 1, torch.device("cpu"), None, math.inf)
    model = build(case, None)
    trainer = trainer_of(case, alone, model, lambda step: rank_batch(case, 0))
    assert trainer.state.loss_scale == FIRST_SCALE
    trainer.state.loss_scale = 2.0**30
    before = [p.detach().clone() for p in model.parameters()]
    steps = [trainer.step() for _ in range(24)]
    skipped = [step.skipped for step in steps]
    first = skipped.index(False)
    assert 0 < first < 20
    assert not any(skipped[first:])
    assert trainer.state.loss_scale == 2.0 ** (30 - first)
    assert (trainer.state.skipped_steps, trainer.state.skipped_in_a_row) == (first, 0)
    assert all(not torch.equal(p.detach(), old) for p, old in zip(model.parameters(), before, strict=True))
    assert steps[-1].cross_entropy < steps[0].cross_entropy
    # the norm that is reported and clipped is of gradients without the scale
    exact = build(case._replace(precision="fp32"), None)
    reference = trainer_of(case._replace(precision="fp32"), alone, exact, lambda step: rank_batch(case, 0))
    assert steps[first].grad_norm == pytest.approx(reference.step().grad_norm, rel=0.02)


def two_ranks(world: World) -> list[tuple[float, bool, float]]:
    """Scales, skips and weights of steps in which the gradients of one rank alone overflow at first."""
    case = Case(world.size, "dropless", world.size, precision="fp16")
    meshes = MeshesOf(world)
    model = build(case, meshes(case))
    trainer = trainer_of(case, world, model, lambda step: rank_batch(case, world.rank))
    overflows = iter([True, True, False, False])

    def poison(module: Any, inputs: Any, out: Any) -> Any:
        if world.rank == 1 and next(overflows):
            out.register_hook(lambda gradient: gradient * float("inf"))
        return out

    model.layers[0].attention.register_forward_hook(poison)
    results = []
    for _ in range(4):
        step = trainer.step()
        assert trainer.state.loss_scale is not None
        weights = sum(float(p.detach().full_tensor().abs().sum()) for p in model.parameters())
        results.append((trainer.state.loss_scale, step.skipped, weights))
    return results


def test_all_ranks_decide_alike() -> None:
    first, second = run_ranks(two_ranks, 2)
    assert first == second
    assert [skipped for _, skipped, _ in first] == [True, True, False, False]
    assert [scale for scale, _, _ in first] == [FIRST_SCALE / 2, FIRST_SCALE / 4, FIRST_SCALE / 4, FIRST_SCALE / 4]
    assert first[0][2] == first[1][2] != first[2][2]  # weights move only in steps that are not skipped
