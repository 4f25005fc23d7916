"""Bytes on the wire in closed form: of one all-to-all, and of all collectives of a training step."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

from moe.config import MoEConfig, RunConfig
from moe.scaling.routing_load import RoutingLoad
from moe.scaling.sharding import element_bytes, parameter_groups


class Collective(NamedTuple):
    """Calls of one kind, and the bytes of their whole buffers, this rank's own part included.

    Of an all_gather what is gathered, of a reduce_scatter and an all_reduce what is added up, of an all_to_all what
    this rank sends.
    """

    calls: int
    bytes: int


def all_to_all_bytes(
    num_tokens: int, d_model: int, top_k: int, *, num_ranks: int, element_bytes: int, training: bool
) -> int:
    """Bytes that one rank sends for one MoE layer under expert parallelism, at even load.

    A share (P-1)/P of its T·K rows belongs to experts of other ranks. They travel to the experts and back, and with
    `training` their gradients do too: two all-to-alls forward, two backward (moe_lm.md 4.6).
    """
    passes = 4 if training else 2
    leaving = Fraction(num_ranks - 1, num_ranks) * num_tokens * top_k
    return round(passes * leaving * d_model * element_bytes)


def step_collectives(
    config: RunConfig, num_ranks: int, load: RoutingLoad | None, *, num_tokens: int, micro_batches: int
) -> dict[str, Collective]:
    """The collectives of one optimizer step of the first rank, by kind: forward and backward passes, gradient norm.

    load: of the ranks that share experts, None where they are not shared. num_tokens: of one micro-batch of a rank.
    FSDP2 gathers every group of parameters for the forward pass and, after `reshard_after_forward`, again for the
    backward pass, the root once; a recomputed layer finds its parameters gathered. Groups of one shard need neither.
    """
    counts = {kind: Collective(0, 0) for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")}

    def add(kind: str, calls: int, num_bytes: int) -> None:
        counts[kind] = Collective(counts[kind].calls + calls, counts[kind].bytes + num_bytes)

    precision = config.train.precision
    exchange = None if load is None else plan_exchange(config, load, num_tokens)
    for group in parameter_groups(config.model, config.parallel, num_ranks):
        again = config.parallel.reshard_after_forward and group.kind != "root"
        gathered = group.num_shards * group.padded_shard
        if group.num_shards > 1:
            calls = micro_batches * (2 if again else 1)
            if group.kind == "experts" and again and exchange is not None:
                calls *= exchange.rounds  # each gathers and frees them
            add("all_gather", calls, calls * gathered * group.computed_bytes(precision))
            add("reduce_scatter", micro_batches, micro_batches * gathered * 4)  # gradients are added up in float32
        if group.num_copies > 1:
            add("all_reduce", micro_batches, micro_batches * group.padded_shard * 4)
    add("all_reduce", 1, 8)  # the squares of the gradient norm
    moe = config.model.moe
    if moe is not None and moe.load_balance_scope == "global":  # choices of each expert, tokens, the loss of all
        layers = micro_batches * len(config.model.moe_layers)
        add("all_reduce", 3 * layers, layers * (8 * moe.num_experts + 8 + 4))
    if moe is not None and exchange is not None:
        layers = micro_batches * len(config.model.moe_layers)
        add("all_to_all", layers * exchange.calls, layers * exchange.bytes)
        if config.parallel.rows_limit is not None:  # the rows of each expert, and the most tokens of a rank
            calls = layers * (2 if config.train.recompute else 1)
            add("all_reduce", 2 * calls, calls * (8 * moe.num_experts + 8))
    return {kind: count for kind, count in counts.items() if count.calls}


class Exchange(NamedTuple):
    """The way of one micro-batch's rows through one sparse layer, forward and backward, for the first rank."""

    rounds: int  # parts of the tokens, where all at once would exceed rows_limit
    sent: int  # rows of this rank's tokens that leave, this rank's own experts included
    received: int  # rows that this rank's experts take in
    calls: int
    bytes: int  # that this rank sends in all calls


def plan_exchange(config: RunConfig, load: RoutingLoad, num_tokens: int) -> Exchange:
    """Counts (int64) are announced before rows travel, unless a fixed capacity makes them known.

    Each part of a rank's experts has an all-to-all of its own. Rounds are recomputed in the backward pass, and so is a
    layer under `train.recompute`; what is recomputed travels again.
    """
    moe, parallel = config.model.moe, config.parallel
    assert moe is not None
    rounds = load.rounds(num_tokens, parallel.rows_limit, expert_capacity(moe, num_tokens))
    tables = [_table(config, load, num_tokens // rounds + (part < num_tokens % rounds)) for part in range(rounds)]
    counts = 0 if parallel.fixed_capacity else 1
    parts = min(parallel.overlap_parts, load.num_experts // load.num_ranks)
    width = config.model.d_model * element_bytes(config.train.precision)
    calls = num_bytes = 0
    for part, table in enumerate(tables):
        rows = sum(map(sum, table)) + load.num_ranks * sum(table[0])  # to the experts, and home again
        # recomputing a layer ends at the last tensor that it kept; a round keeps nothing
        again = config.train.recompute and not (rounds > 1 and part == rounds - 1 and moe.shared_d_ff is None)
        forward_passes = 1 + again + (rounds > 1)
        calls += forward_passes * (counts + 2 * parts) + 2 * parts
        num_bytes += (forward_passes + 1) * rows * width + forward_passes * counts * 8 * load.num_experts
    sent = sum(sum(map(sum, table)) for table in tables)
    return Exchange(rounds, sent, load.num_ranks * sum(sum(table[0]) for table in tables), calls, num_bytes)


def _table(config: RunConfig, load: RoutingLoad, num_tokens: int) -> list[list[int]]:
    """Rows of `num_tokens` tokens of each rank, as [rank of the expert][its place there]."""
    assert config.model.moe is not None
    capacity = expert_capacity(config.model.moe, num_tokens)
    if config.parallel.fixed_capacity and capacity is not None:
        return [[capacity] * (load.num_experts // load.num_ranks)] * load.num_ranks
    return load.rows(num_tokens, capacity)


def expert_capacity(moe: MoEConfig, num_tokens: int) -> int | None:
    """The most rows that an expert takes from `num_tokens` tokens in training; None where nothing is dropped."""
    if moe.router == "gshard":
        return 2 * -(-num_tokens // moe.num_experts)
    if moe.capacity_factor is None:
        return None
    return math.ceil(Fraction(str(moe.capacity_factor)) * num_tokens * moe.top_k / moe.num_experts)
