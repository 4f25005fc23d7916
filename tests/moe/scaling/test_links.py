"""Bytes by the links they take: against a walk over every rank, and against what real ranks send to whom."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe.compose import compose
from moe.config import RunConfig
from moe.distributed.mesh import make_meshes
from moe.distributed.parallelize import parallelize
from moe.distributed.world import World
from moe.model import Transformer
from moe.scaling.communication import Ring, plan_exchange, step_collectives, step_rings
from moe.scaling.links import exchange_links, fullest_links, node_members, ring_links, step_links
from moe.scaling.routing_load import RoutingLoad
from moe.training.loss import compute_loss
from tests.ranks import run_ranks


def walked(ring: Ring, gpus_per_node: int) -> tuple[float, float]:
    """(within, across) of the mean member of the first node, by walking around the ring."""
    ranks = [i * ring.stride for i in range(ring.size)]
    sent = (2 if ring.kind == "all_reduce" else 1) * ring.bytes * (ring.size - 1) / ring.size
    hops = [(a // gpus_per_node, b // gpus_per_node) for a, b in zip(ranks, [*ranks[1:], ranks[0]], strict=True)]
    first = [a == b for a, b in hops if a == 0]
    return sent * sum(first) / len(first), sent * first.count(False) / len(first)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce"])
@pytest.mark.parametrize(("size", "stride"), [(4, 1), (8, 1), (64, 1), (2, 4), (8, 4), (4, 8), (16, 16), (3, 2)])
def test_a_ring_crosses_between_nodes_once_for_each_node(kind: str, size: int, stride: int) -> None:
    ring = Ring(kind, 1, 3 * 5 * 2**20, size, stride)
    links = ring_links(ring, 8)
    within, across = walked(ring, 8)
    assert (links.own, links.within, links.across) == (0, pytest.approx(within, abs=2), pytest.approx(across, abs=2))


def test_one_rank_sends_nothing() -> None:
    assert ring_links(Ring("all_reduce", 1, 2**20, 1, 1), 8) == (0, 0, 0)
    assert [node_members(*case) for case in ((4, 1, 8), (64, 1, 8), (8, 8, 8), (8, 3, 8))] == [4, 8, 1, 3]


@pytest.mark.parametrize("load", ["uniform", "zipf", "worst"])
@pytest.mark.parametrize("extra", [[], ["train.recompute=true"], ["parallel.rows_limit=4096"]])
def test_an_exchange_is_all_that_is_sent(load: str, extra: list[str]) -> None:
    config = compose(["model.vocab_size=5001", "+moe=16e", "parallel.ep_size=16", *extra])
    routing = RoutingLoad(load, 16, 16, 2)
    exchange = plan_exchange(config, routing, 512)
    links = exchange_links(exchange, 4)
    assert links.total == exchange.bytes == sum(exchange.bytes_to)
    assert (links.own, links.within) == (exchange.bytes_to[0], sum(exchange.bytes_to[1:4]))
    fullest = fullest_links(exchange, 4)
    assert fullest.across == 4 * fullest.within  # twelve ranks to three
    assert fullest == links if load == "uniform" else fullest.across > links.across


@pytest.mark.parametrize("load", ["zipf", "worst"])
def test_rows_go_out_to_where_they_are_chosen_and_come_home_alike(load: str) -> None:
    """Forward and backward: this rank's rows to each rank, and from its experts as many to every rank as it has."""
    config = compose(["model.vocab_size=5001", "+moe=16e", "parallel.ep_size=4"])
    routing = RoutingLoad(load, 16, 4, 2)
    table = routing.rows(512)
    expected = [2 * 128 * 4 * (sum(row) + sum(table[0])) + 8 * 4 for row in table]  # and the counts of four experts
    exchange = plan_exchange(config, routing, 512)
    assert list(exchange.bytes_to) == expected
    assert exchange.fullest_bytes == 2 * 128 * 4 * 2 * sum(table[0]) + 8 * 4


def test_the_links_of_a_step_are_its_collectives() -> None:
    config = compose(["model.vocab_size=5001", "+moe=16e", "parallel.ep_size=4", "parallel.dp_replicate=2"])
    exchange = plan_exchange(config, load := RoutingLoad("zipf", 16, 4, 2), 256)
    links = step_links(step_rings(config, 16, exchange, micro_batches=3), exchange, 8, layers=3 * 2)
    counted = step_collectives(config, 16, load, num_tokens=256, micro_batches=3)
    assert links.keys() == counted.keys()
    assert links["all_to_all"].total == counted["all_to_all"].bytes
    # shards are on one node of eight, copies on two
    assert links["all_gather"].across == links["all_to_all"].across == 0 < links["all_reduce"].across


def sent_by(world: World, config: RunConfig) -> list[int]:
    """Bytes that this rank's all-to-alls send to each rank in a forward and backward pass, as torch is told them."""
    counts = [0] * world.size
    real = dist.all_to_all_single

    def counting(output, input, output_split_sizes=None, input_split_sizes=None, **options):
        sizes = input_split_sizes or [input.shape[0] // world.size] * world.size
        for rank, rows in enumerate(sizes):
            counts[rank] += rows * input[:1].numel() * input.element_size()
        return real(output, input, output_split_sizes, input_split_sizes, **options)

    dist.all_to_all_single = counting
    try:
        model = Transformer(config.model, backend="torch", device="meta")
        parallelize(model, make_meshes(config.parallel, world.size, "cpu"), config)
        model.to_empty(device="cpu")
        model.reset_parameters(0)
        draw = torch.Generator().manual_seed(world.rank)
        tokens = torch.randint(301, (2, 32), generator=draw)
        compute_loss(model(tokens, tokens), None, config.model.moe, world.group).loss.backward()
    finally:
        dist.all_to_all_single = real
    return counts


def test_real_ranks_send_so_many_bytes_to_each_other() -> None:
    """Four gloo processes as two nodes of two. With a fixed capacity every rank sends what is planned."""
    config = compose(
        [
            *("model.vocab_size=301", "model.num_layers=2", "model.d_model=32", "data.seq_len=32"),
            *("+moe=gshard_512e", "model.moe.num_experts=16", "parallel.ep_size=4", "parallel.fixed_capacity=true"),
            "train.batch_tokens=256",
        ]
    )
    exchange = plan_exchange(config, RoutingLoad("uniform", 16, 4, 2), 64)
    for counts in run_ranks(sent_by, 4, config):
        assert tuple(counts) == exchange.bytes_to
    links = exchange_links(exchange, 2)
    assert links.own == links.within == links.across // 2 > 0
