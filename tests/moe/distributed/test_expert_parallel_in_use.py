"""Experts spread over ranks as foreign code treats its modules: moved, copied, frozen, tied, evaluated, replayed."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.distributed.all_to_all import count_traffic
from moe.distributed.expert_parallel import DispatchOptions, apply_expert_parallel
from moe.distributed.world import World
from moe.layers import GShardRouter, MoE
from moe.layers.initialization import WeightInit
from tests.moe.distributed.contract import relative_error
from tests.moe.distributed.test_expert_parallel import (
    ROUNDING,
    D,
    E,
    F,
    K,
    error_of,
    layer_of,
    recorded,
    tokens,
    upstream,
)
from tests.ranks import run_ranks

NUM_RANKS = 2


def divided(world: World, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Gradients of this rank's experts with a divisor, where the weights were made anew since it was given."""
    first = layer_of()
    first.experts.requires_grad_(False)
    empty = MoE(D, F, E, K, bias=True, dtype=torch.float64, device="meta")
    layers = {
        name: apply_expert_parallel(layer, mesh, gradient_divisor=world.size)
        for name, layer in {"to": layer_of(), "copy": layer_of(), "thawed": first, "to_empty": empty}.items()
    }
    layers["to"].float().double()
    layers["copy"] = copy.deepcopy(layers["copy"])
    layers["thawed"].experts.requires_grad_(True)
    layers["to_empty"].to_empty(device="cpu").reset_parameters(seed=0, init=WeightInit(std=0.5))
    found = {}
    for name, layer in layers.items():
        count = 5 + world.rank
        layer(tokens(world.rank, count))[0].backward(upstream(world.rank, count, torch.float64))
        found[name] = layer.experts.w_out.grad.to_local()
    return found


class Tied(nn.Module):
    """Two layers with routers of their own and one set of experts, as a module or as weights."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.second = layer_of(), layer_of()
        if what == "module":
            self.second.experts = self.first.experts
        else:
            for name, parameter in self.first.experts.named_parameters():
                setattr(self.second.experts, name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[0])[0]


def tied(world: World, mesh: DeviceMesh) -> dict[str, Any]:
    found = {}
    for what in ("module", "weights"):
        model = apply_expert_parallel(Tied(what), mesh)
        model(tokens(world.rank, 6)).backward(upstream(world.rank, 6, torch.float64))
        names = [name for name, _ in model.named_parameters()]
        found[what] = (names, model.first.experts.w_out.grad.to_local())
    return found


def capacities(world: World, mesh: DeviceMesh) -> dict[str, Any]:
    """With a fixed capacity: evaluation of different numbers of tokens, and replay of more rows than it has."""
    options = DispatchOptions(fixed_capacity=True)
    layer = layer_of(capacity_factor=1.0, eval_capacity_factor=2.0).eval()  # a router asked in evaluation drops too
    apply_expert_parallel(layer, mesh, options=options)
    alone, x = layer_of(capacity_factor=1.0, eval_capacity_factor=2.0).eval(), tokens(world.rank, 8 * (1 + world.rank))
    with torch.no_grad():
        evaluated = relative_error(layer(x)[0], alone(x)[0])
        gshard = GShardRouter(D, E, rules="fairscale", second_policy="all", dtype=torch.float64)
        other = layer_of(router=gshard)
        spread = apply_expert_parallel(copy.deepcopy(other), mesh, options=options)  # takes T % E == 0 alone
        return {
            "evaluation": evaluated,
            "fairscale": relative_error(spread(tokens(world.rank, 16))[0], other(tokens(world.rank, 16))[0]),
            "replay": error_of(lambda: layer.train()(x, routing=recorded(world.rank, len(x), torch.float64))),
        }


def groups_of_levels(mesh: DeviceMesh) -> int:
    """How many process groups eight layers need for their two levels."""
    before = len(dist.distributed_c10d._world.pg_map)
    layers = nn.Sequential(*(MoE(D, F, E, K) for _ in range(8)))
    apply_expert_parallel(layers, mesh, options=DispatchOptions(ranks_per_node=1))
    return len(dist.distributed_c10d._world.pg_map) - before


def recomputed(world: World, mesh: DeviceMesh) -> dict[bool, tuple[int, int]]:
    """Calls and bytes with recomputation, where the backward runs in this thread and, as a GPU's does, in another."""
    found = {}
    for elsewhere in (False, True):
        layer = apply_expert_parallel(layer_of(), mesh, options=DispatchOptions(rows_limit=8))
        with count_traffic() as traffic:
            total = layer(tokens(world.rank, 24).requires_grad_())[0].sum()
            backward = threading.Thread(target=total.backward) if elsewhere else None
            if backward is None:
                total.backward()
            else:
                backward.start()
                backward.join()
        found[elsewhere] = (traffic.calls, traffic.row_bytes)
    return found


def program(world: World) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("ep",))
    return {
        "divided": divided(world, mesh),
        "tied": tied(world, mesh),
        "capacities": capacities(world, mesh),
        "groups": groups_of_levels(mesh),
        "recomputed": recomputed(world, mesh),
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(program, NUM_RANKS)


def test_the_divisor_stays_where_weights_are_made_anew(results: list[dict[str, Any]]) -> None:
    """By `to`, a deepcopy, `to_empty`, and where experts were frozen first."""
    alone = layer_of()
    for rank in range(NUM_RANKS):
        alone(tokens(rank, 5 + rank))[0].backward(upstream(rank, 5 + rank, torch.float64))
    wanted = (alone.experts.w_out.grad / NUM_RANKS).chunk(NUM_RANKS)
    for rank, result in enumerate(results):
        assert set(result["divided"]) == {"to", "copy", "thawed", "to_empty"}
        for name, gradient in result["divided"].items():
            assert relative_error(gradient, wanted[rank]) <= (1e-6 if name == "to" else ROUNDING), name


def test_tied_experts_stay_tied(results: list[dict[str, Any]]) -> None:
    for what in ("module", "weights"):
        model = Tied(what)
        for rank in range(NUM_RANKS):
            model(tokens(rank, 6)).backward(upstream(rank, 6, torch.float64))
        for rank, result in enumerate(results):
            names, gradient = result["tied"][what]
            assert names == [name for name, _ in model.named_parameters()]
            assert relative_error(gradient, model.first.experts.w_out.grad.chunk(NUM_RANKS)[rank]) <= ROUNDING


def test_a_fixed_capacity_is_for_training_and_never_overwrites(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["capacities"]["evaluation"] <= ROUNDING
        assert result["capacities"]["fairscale"] <= ROUNDING
        assert "an expert has more rows than fixed_capacity sends" in result["capacities"]["replay"]


def test_all_layers_share_the_groups_of_two_levels(results: list[dict[str, Any]]) -> None:
    assert all(result["groups"] <= 2 for result in results)


def test_what_is_recomputed_in_another_thread_is_counted(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["recomputed"][True] == result["recomputed"][False]
