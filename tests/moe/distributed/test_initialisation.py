"""The first weights are functions of the seed alone, and no rank draws or holds experts that are not its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import moe.layers.experts
from moe.distributed.world import World
from moe.layers.experts import Experts
from moe.model import Transformer
from tests.moe.distributed.contract import NUM_EXPERTS, Case, MeshesOf, build
from tests.ranks import run_ranks

CASES = {
    ranks: [
        Case(ranks, "shared", ep, replicate)
        for replicate, ep in {2: ((1, 1), (1, 2), (2, 1)), 4: ((1, 1), (1, 2), (1, 4), (2, 2), (4, 1))}[ranks]
    ]
    for ranks in (2, 4)
}
MATRIX = 16 * 8  # elements of one expert's w_in and w_out: d_ff * d_model


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that is made within, but on the meta device; of a DTensor this rank's part."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if isinstance(own, Tensor) and own.device.type != "meta":
                self.numel = max(self.numel, own.numel())
        return out


@contextmanager
def drawn_experts() -> Iterator[set[int]]:
    """Which experts' weights are drawn within."""
    drawn: set[int] = set()
    original = moe.layers.experts.parameter_generator

    def watch(seed: int | None, *path: int | str) -> torch.Generator | None:
        drawn.add(int(path[-1]))
        return original(seed, *path)

    moe.layers.experts.parameter_generator = watch
    try:
        yield drawn
    finally:
        moe.layers.experts.parameter_generator = original


class Started(NamedTuple):
    """One rank's model as it starts."""

    weights: dict[str, Tensor]  # whole
    buffers: dict[str, Tensor]
    drawn: set[int]
    largest: int  # elements of the largest tensor made while starting
    held: dict[str, int]  # elements of its part of each parameter of the experts


def start(case: Case, meshes: Any) -> Started:
    with drawn_experts() as drawn, LargestTensor() as largest:
        model = build(case, meshes)
    drawn, most = set(drawn), largest.numel
    held = {name: p.to_local().numel() for name, p in expert_parameters(model)}
    weights = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}
    return Started(weights, dict(model.named_buffers()), drawn, most, held)


def expert_parameters(model: Transformer) -> Iterator[tuple[str, Any]]:
    for prefix, module in model.named_modules():
        if isinstance(module, Experts):
            yield from ((f"{prefix}.{name}", parameter) for name, parameter in module.named_parameters())


def program(world: World) -> dict[Case, Started]:
    meshes = MeshesOf(world)
    return {case: start(case, meshes(case)) for case in CASES[world.size]}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[Case, Started]]:
    return run_ranks(program, 2)


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[Case, Started]]:
    return run_ranks(program, 4)


@pytest.fixture(params=[*CASES[2], *CASES[4]], ids=str)
def started(request: pytest.FixtureRequest) -> tuple[Case, list[Started]]:
    case = request.param
    ranks = request.getfixturevalue("two_ranks" if case.ranks == 2 else "four_ranks")
    return case, [of_rank[case] for of_rank in ranks]


def test_every_number_of_ranks_starts_with_the_same_bits(started: tuple[Case, list[Started]]) -> None:
    case, ranks = started
    alone = build(Case(1, "shared"), None)
    for rank in ranks:
        assert list(rank.weights) == [name for name, _ in alone.named_parameters()], case
        for name, parameter in alone.named_parameters():
            assert torch.equal(rank.weights[name], parameter.detach()), name
    assert all(bool(p.any()) for name, p in alone.named_parameters() if name.endswith(("w_in", "w_out", "weight")))


def test_a_rank_draws_its_own_experts_alone(started: tuple[Case, list[Started]]) -> None:
    """Each rank of an ep axis its block, in rank order; the ranks that share an expert draw the same one."""
    case, ranks = started
    num_local = NUM_EXPERTS // case.ep
    for number, rank in enumerate(ranks):
        first = number % case.ep * num_local  # ep is the innermost axis
        assert rank.drawn == set(range(first, first + num_local))


def test_a_rank_holds_its_share_and_never_all_experts(started: tuple[Case, list[Started]]) -> None:
    """Nor does it for a moment: the largest tensor of the whole start is a rank's own part of the experts.

    With one expert a rank or copies of the model everywhere, its part of them is what it must hold.
    """
    case, ranks = started
    share = NUM_EXPERTS * MATRIX * case.replicate // case.ranks
    for rank in ranks:
        matrices = {name: numel for name, numel in rank.held.items() if name.endswith(("w_in", "w_out"))}
        assert len(matrices) == 4
        assert set(matrices.values()) == {share}
        # the embedding and projections of attention are drawn whole: 37 * 8 and 24 * 8
        assert rank.largest <= max(share, 37 * 8), case
    if case.replicate < case.ranks:
        assert share < NUM_EXPERTS * MATRIX
