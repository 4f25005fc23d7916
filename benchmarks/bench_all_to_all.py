"""Expert parallelism's communication between real processes, next to a plain all-to-all of the same rows.

Every method sends the same rows to the same ranks, is verified, and is timed in alternation with the plain one. Bytes
are counted as sent by a rank to others, and compared with those of its rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.distributed.all_to_all import all_to_all, count_traffic
from moe.distributed.wire import FlatWire, TwoLevelWire, Wire, send_out
from moe.distributed.world import World

from .processes import run_ranks
from .suite import Held, Row, Suite

D = 256
NUM_LOCAL = 8  # experts per rank
ROWS = (256, 8192, 32768)  # sent per rank, its own included; from 8,192 (8 MiB) on the limit is enforced
QUICK_ROWS = (64,)
LARGE = 8192
LEAST_SHARE = 0.9  # of a plain all-to-all's speed, for large rows
PLAIN = "all_to_all_single"


def _counts(world: World, rows: int) -> Tensor:
    """(P, NUM_LOCAL) int64: this rank's rows for each expert, uneven, `rows` in total."""
    generator = torch.Generator().manual_seed(world.rank)
    weights = torch.rand(world.size * NUM_LOCAL, generator=generator) + 0.5
    chosen = torch.multinomial(weights, rows, replacement=True, generator=generator)
    return chosen.bincount(minlength=world.size * NUM_LOCAL).view(world.size, NUM_LOCAL)


def _ways(world: World, rows: int, wires: dict[str, Wire]) -> tuple[dict[str, Callable[[], Tensor]], int]:
    """Each method of sending the same rows, and the bytes that this rank sends to others."""
    counts = _counts(world, rows)
    x = torch.randn(rows, D, generator=torch.Generator().manual_seed(100 + world.rank))
    journey = FlatWire(dist.group.WORLD).announce(counts)
    send, receive = journey.legs[0].send, journey.legs[0].receive

    def plain() -> Tensor:
        arriving = x.new_empty(sum(receive), D)
        dist.all_to_all_single(arriving, x, receive, send)
        return arriving

    def along(wire: Wire) -> Tensor:
        way = send_out(x, wire.announce(counts))
        return way.arrive(way.leaving)

    ways: dict[str, Callable[[], Tensor]] = {
        PLAIN: plain,
        "ours, rows": lambda: all_to_all(x, send, receive, dist.group.WORLD),
    }
    ways |= {name: partial(along, wire) for name, wire in wires.items()}
    return ways, (rows - send[world.rank]) * D * x.element_size()


def _program(world: World, sizes: tuple[int, ...], rounds: tuple[int, ...]) -> list[dict[str, Any]]:
    """On each rank: seconds of every round of every method, and the check's result."""
    wires: dict[str, Wire] = {"ours, counts and rows": FlatWire(dist.group.WORLD)}
    if world.size == 4:
        within = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][world.rank // 2]
        between = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])][world.rank % 2]
        wires["ours, counts and rows, two levels"] = TwoLevelWire(within, between)
    results = []
    for rows, num_rounds in zip(sizes, rounds, strict=True):
        ways, wanted_bytes = _ways(world, rows, wires)
        expected = ways[PLAIN]()
        checks, sent = {}, {}
        for name, way in ways.items():
            with count_traffic() as traffic:
                arrived = way()
            checks[name] = "ok" if torch.equal(arrived, expected) else "WRONG: other rows arrived"
            sent[name] = traffic.row_bytes
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(num_rounds):
            for name, way in ways.items():
                dist.barrier()
                start = time.perf_counter()
                way()
                dist.barrier()  # every rank waits for the slowest, so all measure its time
                seconds[name].append(time.perf_counter() - start)
        results.append({"seconds": seconds, "checks": checks, "sent": sent, "wanted": wanted_bytes})
    return results


@pytest.mark.parametrize("num_ranks", [2, 4])
def bench_all_to_all(suite: Suite, num_ranks: int) -> None:
    if suite.device.type != "cpu":
        pytest.skip("times gloo between processes of one machine: NCCL needs a GPU for each rank")
    sizes = QUICK_ROWS if suite.options.small else ROWS
    longest = 3 * suite.options.few_rounds  # for the largest size; short calls vary more
    rounds = tuple(longest if rows == ROWS[-1] else 3 * suite.options.num_rounds for rows in sizes)
    rounds = rounds if suite.options.flops else (1,) * len(sizes)
    by_rank = run_ranks(_program, num_ranks, sizes, rounds)
    for index, rows in enumerate(sizes):
        results = [rank[index] for rank in by_rank]
        for result in results:
            wrong = {name: check for name, check in result["checks"].items() if check != "ok"}
            assert not wrong, wrong
            for name, sent in result["sent"].items():
                two_levels = "two levels" in name  # two hops: some rows are sent twice
                assert name == PLAIN or (sent >= result["wanted"] if two_levels else sent == result["wanted"]), name
        if suite.options.flops:
            _report(suite, f"all-to-all, {num_ranks} processes, {rows} rows of D={D} each", rows, results[0])


def _report(suite: Suite, case: str, rows: int, result: dict[str, Any]) -> None:
    """Table rows; `/ first` is the time relative to the plain all-to-all's."""
    plain = result["seconds"][PLAIN]
    for name, seconds in result["seconds"].items():
        ratio = statistics.median(own / other for own, other in zip(seconds, plain, strict=True))
        median = statistics.median(seconds)
        suite.rows.append(
            Row(
                case=case,
                name=name,
                dtype="fp32",
                backend="",
                routing="",
                check=result["checks"][name],
                seconds=median,
                spread=(max(seconds) - min(seconds)) / 2 / median,
                wall_seconds=median,
                rounds=len(seconds),
                bytes=result["sent"][name] or result["wanted"],
                to_first=ratio,
            )
        )
        if name == PLAIN:
            continue
        held_to = name == "ours, rows" and rows >= LARGE
        limit = 1 / LEAST_SHARE if held_to else None
        suite.held.append(Held(f"{case}: {name} / {PLAIN}", ratio, limit, None, across_processes=True))
