"""Closed-form bytes on the wire: of one all-to-all, and of all collectives of a training step."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

from moe.config import MoEConfig, RunConfig
from moe.config.checks import exact_fraction
from moe.scaling.routing_load import RoutingLoad
from moe.scaling.sharding import element_bytes, parameter_groups


class Collective(NamedTuple):
    """Calls of one kind, and the total bytes of their buffers, this rank's own part included.

    For an all_gather the gathered result, for reduce_scatter and all_reduce the reduced input, for an all_to_all what
    this rank sends.
    """

    calls: int
    bytes: int


def all_to_all_bytes(
    num_tokens: int, d_model: int, top_k: int, *, num_ranks: int, element_bytes: int, training: bool
) -> int:
    """Bytes that one rank sends for one MoE layer under expert parallelism with uniform load.

    A share (P-1)/P of its T·K rows goes to experts on other ranks. Rows travel to the experts and back, and with
    `training` their gradients do too: two all-to-alls forward, two backward (Artetxe et al. 2021).
    """
    passes = 4 if training else 2
    leaving = Fraction(num_ranks - 1, num_ranks) * num_tokens * top_k
    return round(passes * leaving * d_model * element_bytes)


class Ring(NamedTuple):
    """Collectives of one kind among evenly spaced ranks: calls, buffer bytes as in `Collective`, and the ranks."""

    kind: str
    calls: int
    bytes: int
    size: int  # ranks that take part
    stride: int  # distance between neighbouring ranks


def step_collectives(
    config: RunConfig, num_ranks: int, load: RoutingLoad | None, *, num_tokens: int, micro_batches: int
) -> dict[str, Collective]:
    """The first rank's collectives in one optimizer step, by kind: forward and backward passes, gradient norm.

    load: of the ranks that share experts; None if none do. num_tokens: per rank and micro-batch.
    """
    exchange = None if load is None else plan_exchange(config, load, num_tokens)
    counts: dict[str, Collective] = {}
    for ring in step_rings(config, num_ranks, exchange, micro_batches=micro_batches):
        before = counts.get(ring.kind, Collective(0, 0))
        counts[ring.kind] = Collective(before.calls + ring.calls, before.bytes + ring.bytes)
    if exchange is not None:
        layers = micro_batches * len(config.model.moe_layers)
        counts["all_to_all"] = Collective(layers * exchange.calls, layers * exchange.bytes)
    return {kind: count for kind, count in counts.items() if count.calls}


def step_rings(config: RunConfig, num_ranks: int, exchange: Exchange | None, *, micro_batches: int) -> list[Ring]:
    """All collectives of a step except the all-to-alls.

    FSDP2 gathers every group of parameters for the forward pass and, with `reshard_after_forward`, again for the
    backward pass, the root only once; a recomputed layer finds its parameters gathered. Groups of one shard need
    neither.
    """
    rings: list[Ring] = []
    parallel, precision = config.parallel, config.train.precision
    for group in parameter_groups(config.model, parallel, num_ranks):
        again = parallel.reshard_after_forward and group.kind != "root"
        gathered = group.num_shards * group.padded_shard
        if group.num_shards > 1:
            calls = micro_batches * (2 if again else 1)
            if group.kind == "experts" and exchange is not None:
                calls *= (
                    exchange.rounds
                )  # each round gathers and frees them, in the backward regardless of what stays after the forward
            among = (group.num_shards, parallel.ep_size if group.kind == "experts" else 1)
            rings.append(Ring("all_gather", calls, calls * gathered * group.computed_bytes(precision), *among))
            # gradients are reduced in float32
            rings.append(Ring("reduce_scatter", micro_batches, micro_batches * gathered * 4, *among))
        if group.num_copies > 1:
            among = (group.num_copies, num_ranks // group.num_copies)
            rings.append(Ring("all_reduce", micro_batches, micro_batches * group.padded_shard * 4, *among))
    rings.append(Ring("all_reduce", 1, 8, num_ranks, 1))  # squared gradient norms
    moe, layers = config.model.moe, micro_batches * len(config.model.moe_layers)
    if moe is not None and moe.load_balance_scope == "global":  # choices per expert, token count, total loss
        rings.append(Ring("all_reduce", 3 * layers, layers * (8 * moe.num_experts + 8 + 4), num_ranks, 1))
    if moe is not None and exchange is not None and parallel.rows_limit is not None:
        calls = layers * (2 if config.train.recompute else 1)
        rings.append(Ring("all_reduce", calls, calls * 8 * moe.num_experts, parallel.ep_size, 1))  # rows per expert
        rings.append(Ring("all_reduce", calls, calls * 16, num_ranks, 1))  # the most rows and tokens of any rank
    return rings


class Exchange(NamedTuple):
    """The exchange of one micro-batch's rows in one MoE layer, forward and backward, for the first rank."""

    rounds: int  # parts the tokens are split into if all at once would exceed rows_limit
    sent: int  # rows of this rank's tokens, those for its own experts included
    received: int  # rows that this rank's experts receive
    calls: int
    bytes: int  # sent by this rank in all calls
    bytes_to: tuple[int, ...]  # of these, to each rank of the group, itself first
    fullest_bytes: int  # exchanged by the rank with most rows with each other rank, the larger direction


def plan_exchange(config: RunConfig, load: RoutingLoad, num_tokens: int) -> Exchange:
    """Plan one layer's exchange. Counts (int64) are sent before the rows, unless a fixed capacity makes them known.

    Each of the overlap parts of a rank's experts has its own all-to-all. Rounds are recomputed in the backward pass, as
    are layers under `train.recompute`; whatever is recomputed is sent again.
    """
    moe, parallel = config.model.moe, config.parallel
    assert moe is not None
    rounds = load.rounds(num_tokens, parallel.rows_limit, expert_capacity(moe, num_tokens))
    tables = [_table(config, load, num_tokens // rounds + (part < num_tokens % rounds)) for part in range(rounds)]
    counts = 0 if parallel.fixed_capacity else 1
    parts = min(parallel.overlap_parts, load.num_experts // load.num_ranks)
    width = config.model.d_model * element_bytes(config.train.precision)
    calls = fullest = 0
    bytes_to = [0] * load.num_ranks
    for part, table in enumerate(tables):
        home = sum(table[0])  # rows that return to each rank
        # recomputation of a layer ends at the last tensor it kept; a round keeps nothing
        again = config.train.recompute and not (rounds > 1 and part == rounds - 1 and moe.shared_d_ff is None)
        forward_passes = 1 + again + (rounds > 1)
        calls += forward_passes * (counts + 2 * parts) + 2 * parts
        announced = forward_passes * counts * 8 * load.num_experts // load.num_ranks
        fullest += 2 * (forward_passes + 1) * home * width + announced
        for rank, row in enumerate(table):
            bytes_to[rank] += (forward_passes + 1) * (sum(row) + home) * width + announced
    sent = sum(sum(map(sum, table)) for table in tables)
    received = load.num_ranks * sum(sum(table[0]) for table in tables)
    return Exchange(rounds, sent, received, calls, sum(bytes_to), tuple(bytes_to), fullest)


def _table(config: RunConfig, load: RoutingLoad, num_tokens: int) -> list[list[int]]:
    """Rows from `num_tokens` tokens of each rank, as [expert's rank][local expert]."""
    assert config.model.moe is not None
    capacity = expert_capacity(config.model.moe, num_tokens)
    if config.parallel.fixed_capacity and capacity is not None:
        return [[capacity] * (load.num_experts // load.num_ranks)] * load.num_ranks
    return load.rows(num_tokens, capacity)


def expert_capacity(moe: MoEConfig, num_tokens: int) -> int | None:
    """Maximum rows an expert takes from `num_tokens` tokens in training; None if dropless."""
    if moe.router == "gshard":
        return 2 * -(-num_tokens // moe.num_experts)
    if moe.capacity_factor is None:
        return None
    return math.ceil(exact_fraction(moe.capacity_factor) * num_tokens * moe.top_k / moe.num_experts)
