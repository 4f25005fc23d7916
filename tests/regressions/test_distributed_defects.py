"""Defects that other libraries shipped in expert parallelism, each foreclosed here by name, in real processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moe.distributed.all_to_all import Transfer
from moe.distributed.expert_parallel import DispatchOptions, apply_expert_parallel
from moe.distributed.wire import TwoLevelWire
from moe.distributed.world import World
from moe.layers import MoE, load_balance_loss, router_z_loss
from moe.layers.experts import Experts
from moe.layers.initialization import WeightInit
from moe.layers.moe import MoE as MoELayer
from tests.moe.distributed.contract import (
    Case,
    Measured,
    MeshesOf,
    build,
    expected,
    measure,
    rank_batch,
    relative_error,
    trainer_of,
)
from tests.ranks import run_ranks

RANKS, D, F, E = 4, 16, 32, 8
ROUNDING = 1e-10  # float64, of the largest entry
SPREAD = {ep: Case(RANKS, "unbalanced", ep) for ep in (1, 2, 4)}
MICRO = {count: Case(RANKS, "unbalanced", RANKS, micro_batches=count) for count in (1, 2, 4)}
BALANCED = {ep: Case(RANKS, "sequence", ep, recompute=True) for ep in (1, 4)}


def layer_of(**options: Any) -> MoE:
    layer = MoE(D, F, E, dtype=torch.float64, **options)
    layer.reset_parameters(seed=0, init=WeightInit(std=0.5))
    return layer


def tokens(rank: int) -> Tensor:
    return torch.randn(6 + rank, D, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def auxiliary_gradient(world: World, *, parallel: bool) -> dict[str, Tensor]:
    """Of the auxiliary losses alone: the router's gradient, added up over ranks, and the input's."""
    layer, x = layer_of(), tokens(world.rank).requires_grad_()
    if parallel:
        apply_expert_parallel(layer, init_device_mesh("cpu", (world.size,)))
    _, routing = layer(x)
    share = x.shape[0] / sum(tokens(rank).shape[0] for rank in range(world.size))
    balance = load_balance_loss(routing, scope="global", group=world.group)
    ((balance + router_z_loss(routing)) * share).backward()
    assert layer.router.weight.grad is not None
    return {"router": world.sum(layer.router.weight.grad)}


def biases_after_steps(world: World, meshes: MeshesOf) -> dict[bool, list[Tensor]]:
    """Balancing biases after three updates with and without recomputation."""
    result = {}
    for recompute in (False, True):
        case = Case(RANKS, "balanced", 2, recompute=recompute)
        model = build(case, meshes(case))
        trainer = trainer_of(case, world, model, lambda step, case=case: rank_batch(case, world.rank, step))
        for _ in range(3):
            trainer.step()
        result[recompute] = [m.router.expert_bias.clone() for m in model.modules() if isinstance(m, MoELayer)]
    return result


def timeline(world: World) -> list[str]:
    """What starts and waits, and when the shared network and the experts compute, in one forward pass."""
    layer = layer_of(shared_d_ff=F)
    options = DispatchOptions(num_parts=2)
    apply_expert_parallel(layer, init_device_mesh("cpu", (world.size,)), options=options)
    events: list[str] = []

    def note(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            events.append(name)
            return function(*args, **options)

        return noted

    original = Transfer.start, Transfer.wait
    Transfer.start, Transfer.wait = note("start", Transfer.start), note("wait", Transfer.wait)
    assert layer.shared is not None
    layer.shared.register_forward_pre_hook(lambda module, inputs: events.append("shared"))
    try:
        with torch.no_grad():
            layer(tokens(world.rank))
    finally:
        Transfer.start, Transfer.wait = original
    return events


def messages(world: World) -> dict[str, Any]:
    """Of two nodes of two: how many others each all-to-all of a journey talks to, and whether bits are the same."""
    mesh = init_device_mesh("cpu", (world.size,))
    flat, x = apply_expert_parallel(layer_of(), mesh), tokens(world.rank)
    layered = apply_expert_parallel(layer_of(), mesh, options=DispatchOptions(ranks_per_node=2))
    wire = layered.dispatcher.wire
    assert isinstance(wire, TwoLevelWire)
    legs = wire.uniform(1, E // world.size).legs
    return {
        "partners": [dist.get_process_group_ranks(leg.group) for leg in legs],
        "equal": torch.equal(flat(x)[0], layered(x)[0]),
    }


def own_experts(world: World) -> dict[str, Any]:
    """The names, whole shapes and this rank's values of a shared layer's experts, built from one seed everywhere."""
    torch.manual_seed(7)  # the same on all ranks, as a launcher sets it
    layer = layer_of()
    apply_expert_parallel(layer, init_device_mesh("cpu", (world.size,)))
    state = layer.experts.state_dict()
    return {name: (tuple(value.shape), value.to_local().clone()) for name, value in state.items()}


def program(world: World) -> dict[str, Any]:
    meshes = MeshesOf(world)
    return {
        "measured": measure(world, [*SPREAD.values(), *MICRO.values(), *BALANCED.values()]),
        "auxiliary": [auxiliary_gradient(world, parallel=parallel) for parallel in (False, True)],
        "biases": biases_after_steps(world, meshes),
        "timeline": timeline(world),
        "messages": messages(world),
        "experts": own_experts(world),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(program, RANKS)


def expert_norm(measured: Measured) -> float:
    squares = [float(g.square().sum()) for name, g in measured.gradients.items() if ".experts." in name]
    return math.sqrt(sum(squares))


def test_gradients_of_experts_do_not_grow_with_the_ranks_that_share_them(ranks: list[dict[str, Any]]) -> None:
    """pytorch#160285, Megatron-LM#5956, #7160, DeepSpeed#5259, #5618, #6546, megablocks#86: they came out ep_size times
    too large, for the all-to-all adds up over ranks what other gradients are averaged over."""
    norms = [expert_norm(ranks[0]["measured"][case]) for case in SPREAD.values()]
    assert norms[0] > 0.1
    assert norms == pytest.approx([expert_norm(expected(SPREAD[1]))] * 3, rel=ROUNDING)


def test_micro_batches_add_up_where_experts_have_no_copies(ranks: list[dict[str, Any]]) -> None:
    """Megatron-LM#6660: with ep = dp the buffer of the experts' gradients doubled at every micro-batch."""
    whole = ranks[0]["measured"][MICRO[1]].gradients
    for count in (2, 4):
        parts = ranks[0]["measured"][MICRO[count]].gradients
        assert max(relative_error(parts[name], gradient) for name, gradient in whole.items()) <= ROUNDING


def test_the_norm_counts_the_experts_of_all_ranks_once(ranks: list[dict[str, Any]]) -> None:
    """Megatron-LM#5916: with expert parallelism the norm missed gradients, and clipping let too much pass."""
    for result in ranks:
        for case in SPREAD.values():
            assert result["measured"][case].norm == pytest.approx(expected(case).norm, rel=ROUNDING)


def test_auxiliary_losses_weigh_the_same_with_experts_elsewhere(ranks: list[dict[str, Any]]) -> None:
    """Megatron-LM#3768, #5047: the scale of balance loss and z-loss depended on the parallel sizes, #3672: and the
    global one's on the number of ranks."""
    layer = layer_of()
    _, routing = layer(torch.cat([tokens(rank) for rank in range(RANKS)]))
    (load_balance_loss(routing) + router_z_loss(routing)).backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.any()
    for result in ranks:
        for gradients in result["auxiliary"]:
            assert relative_error(gradients["router"], layer.router.weight.grad) <= ROUNDING


def test_balance_enters_once_with_recomputation_over_ranks(ranks: list[dict[str, Any]]) -> None:
    """torchtitan#3000 and others: what a forward pass stores is stored twice where it is recomputed."""
    for case in BALANCED.values():
        wanted = expected(case)
        actual = ranks[0]["measured"][case]
        assert actual.losses == pytest.approx(wanted.losses, rel=ROUNDING)
        assert max(relative_error(actual.gradients[n], g) for n, g in wanted.gradients.items()) <= ROUNDING


def test_recomputation_does_not_move_the_balancing_biases(ranks: list[dict[str, Any]]) -> None:
    """torchtitan#1593, #1689: tokens of an expert were counted again when the forward pass was recomputed."""
    for result in ranks:
        once, again = result["biases"][False], result["biases"][True]
        assert all(bias.any() for bias in once)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(once, ranks[0]["biases"][False], strict=True))


def test_the_shared_network_computes_while_rows_travel(ranks: list[dict[str, Any]]) -> None:
    """torchtitan#1741, #2310: it was computed before or after the exchange instead of beside it."""
    for result in ranks:
        events = result["timeline"]
        # both parts of the rows leave; then the shared network; then the first part is waited for
        assert events[:4] == ["start", "start", "shared", "wait"]
        # the first part goes home before the second one is waited for
        assert events[4:] == ["start", "wait", "start", "wait", "wait"]


def test_few_large_messages_between_nodes(ranks: list[dict[str, Any]]) -> None:
    """DeepSpeed#2039, Tutel#136: the hierarchical exchange that papers describe was missing, or gave other results."""
    for rank, result in enumerate(ranks):
        node, place = divmod(rank, 2)
        assert result["messages"]["partners"] == [[2 * node, 2 * node + 1], [place, place + 2]]
        assert result["messages"]["equal"]


def test_ranks_with_one_seed_hold_different_experts(ranks: list[dict[str, Any]]) -> None:
    """fastmoe#4: every worker drew its experts from the same seed, so all of them were equal, modalities#426: or
    weights depended on the rank where they must not."""
    alone = dict(layer_of().experts.named_parameters())
    for name, parameter in alone.items():
        parts = [result["experts"][name][1] for result in ranks]
        assert torch.equal(torch.cat(parts), parameter.detach())
        assert len({tuple(matrix.flatten().tolist()) for part in parts for matrix in part}) == E


def test_every_rank_names_experts_as_one_process_does(ranks: list[dict[str, Any]]) -> None:
    """megablocks#160, Megatron-LM#1517: ranks numbered their own experts from 0 and saved the same ones."""
    alone = Experts(D, F, E).state_dict()
    for result in ranks:
        assert {name: shape for name, (shape, _) in result["experts"].items()} == {
            name: tuple(value.shape) for name, value in alone.items()
        }
