"""Compiled layers of a model that ranks share: expert parallelism, recomputation, compilation and FSDP2 together."""

from __future__ import annotations

import pytest
from torch._dynamo.utils import counters

from moe.distributed.world import World
from tests.moe.distributed.contract import Case, Measured, expected, measure, relative_error
from tests.ranks import run_ranks

ROUNDING = 1e-10  # float64, of the largest entry; measured about 1e-15
CASES = [Case(2, "dropless", 2, compile=True), Case(2, "shared", 1, 1, 2, True, compile=True)]


def program(world: World) -> tuple[dict[Case, Measured], int]:
    return measure(world, CASES), counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def first_rank() -> tuple[dict[Case, Measured], int]:
    return run_ranks(program, 2)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"compiled-{case}")
def test_gradients_are_those_of_one_process(first_rank: tuple[dict[Case, Measured], int], case: Case) -> None:
    actual, wanted = first_rank[0][case].gradients, expected(case).gradients
    assert max(relative_error(actual[name], gradient) for name, gradient in wanted.items()) <= ROUNDING


def test_graphs_were_compiled(first_rank: tuple[dict[Case, Measured], int]) -> None:
    assert first_rank[1] > 0
