"""Loads and collectives in closed form. tests/moe/test_dry_run.py compares with what ranks call, real and simulated."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.compose import compose
from moe.config import MoEConfig, RunConfig
from moe.layers.gshard_router import GShardRouter
from moe.layers.router import TopKRouter
from moe.scaling.communication import all_to_all_bytes, expert_capacity, plan_exchange, step_collectives
from moe.scaling.routing_load import RoutingLoad


def configured(*overrides: str) -> RunConfig:
    return compose(["model.vocab_size=5001", "train.batch_tokens=65536", *overrides])


def moe_config(*overrides: str) -> MoEConfig:
    moe = configured(*overrides).model.moe
    assert moe is not None
    return moe


@given(
    name=st.sampled_from(["uniform", "zipf", "worst"]),
    ranks=st.integers(1, 8),
    local=st.integers(1, 6),
    top_k=st.integers(1, 4),
    num_tokens=st.integers(0, 300),
)
def test_a_load_sends_every_choice_once_and_the_first_rank_most(
    name: str, ranks: int, local: int, top_k: int, num_tokens: int
) -> None:
    top_k = min(top_k, ranks * local)
    table = RoutingLoad(name, ranks * local, ranks, top_k).rows(num_tokens)
    assert [len(row) for row in table] == [local] * ranks
    assert sum(map(sum, table)) == num_tokens * top_k
    assert all(0 <= count <= num_tokens for row in table for count in row)  # a token chooses an expert once
    assert sum(table[0]) == max(map(sum, table))


def test_the_worst_load_leaves_the_others_what_one_rank_cannot_take() -> None:
    assert RoutingLoad("worst", 8, 4, 2).rows(10) == [[10, 10], [0, 0], [0, 0], [0, 0]]
    assert RoutingLoad("worst", 4, 4, 2).rows(9) == [[9], [3], [3], [3]]


def test_zipf_is_one_over_the_place_and_goes_around_the_ranks() -> None:
    table = RoutingLoad("zipf", 64, 8, 1).rows(100_000)
    scale = 100_000 / sum(1 / j for j in range(1, 65))
    popular = [table[j % 8][j // 8] for j in range(64)]
    assert all(abs(count - scale / (j + 1)) <= 1 for j, count in enumerate(popular))


def test_zipf_gives_no_expert_more_than_every_token() -> None:
    # 1 / (25/12) of 300 would be 144; of the 200 left the next gets 1/2 / (13/12)
    assert RoutingLoad("zipf", 4, 2, 3).rows(100) == [[100, 61], [93, 46]]


def test_a_capacity_drops_what_is_beyond() -> None:
    assert RoutingLoad("worst", 8, 4, 2).rows(10, capacity=3) == [[3, 3], [0, 0], [0, 0], [0, 0]]


def test_loads_say_what_they_cannot_be() -> None:
    with pytest.raises(ValueError, match="must be one of: uniform, zipf, worst"):
        RoutingLoad("even", 8, 4, 2)
    with pytest.raises(ValueError, match=r"num_experts \(9\) must be a multiple of the ranks that share them \(4\)"):
        RoutingLoad("uniform", 9, 4, 2)
    with pytest.raises(ValueError, match=r"rows_limit \(7\) must be at least ranks"):
        RoutingLoad("worst", 8, 4, 2).rounds(100, 7)


@pytest.mark.parametrize(("limit", "rounds"), [(None, 1), (800, 1), (799, 2), (400, 2), (8, 100)])
def test_rounds_keep_the_first_rank_within_its_limit(limit: int | None, rounds: int) -> None:
    load = RoutingLoad("worst", 8, 4, 2)
    assert load.rounds(100, limit) == rounds
    if limit is not None:
        assert 4 * sum(load.rows(math.ceil(100 / rounds))[0]) <= limit


@pytest.mark.parametrize("num_tokens", [1, 511, 512, 513, 4096])
def test_capacities_are_the_routers(num_tokens: int) -> None:
    gshard = moe_config("+moe=gshard_512e")
    assert expert_capacity(gshard, num_tokens) == GShardRouter(8, 512).capacity(num_tokens)
    for factor in (1.25, 4 / 3, 1.1 * 1.1):
        switch = moe_config("+moe=switch_64e", f"model.moe.capacity_factor={factor}")
        capacity = TopKRouter(8, 64, switch.top_k, capacity_factor=factor).capacity(num_tokens)
        assert capacity is not None and expert_capacity(switch, num_tokens) == capacity
    assert expert_capacity(moe_config("+moe=8e"), num_tokens) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_at_even_load_an_exchange_is_what_travels_and_stays(precision: str) -> None:
    config = configured("+moe=16e", "parallel.ep_size=8", f"train.precision={precision}")
    plan = plan_exchange(config, RoutingLoad("uniform", 16, 8, 2), 4096)
    leaving = all_to_all_bytes(4096, 128, 2, num_ranks=8, element_bytes=4 if precision == "fp32" else 2, training=True)
    assert plan.calls == 1 + 4
    assert plan.bytes - 8 * 16 == leaving * 8 // 7  # less the counts


def test_the_papers_all_to_alls() -> None:
    """Two forward and two backward for each sparse layer, and two with recompute (Artetxe et al. 2021)."""
    load = RoutingLoad("uniform", 512, 64, 2)
    for recompute, calls in (("false", 4), ("true", 6)):
        config = compose(
            [
                "experiment=artetxe2021/15b",
                "parallel.ep_size=64",
                "parallel.fixed_capacity=true",
                f"train.recompute={recompute}",
            ]
        )
        counts = step_collectives(config, 64, load, num_tokens=8192, micro_batches=1)
        assert counts["all_to_all"].calls == 6 * calls
        # float16, and a capacity of 2·ceil(8192 / 512) rows each
        assert counts["all_to_all"].bytes == 6 * calls * 512 * 32 * 768 * 2
