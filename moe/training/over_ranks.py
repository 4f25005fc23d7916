"""Figures of one step from all ranks: each rank's measurements, merged identically everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.distributed.all_to_all import Traffic
from moe.distributed.world import World
from moe.layers.router_losses import RoutingStatistics, merge_statistics


@dataclass(frozen=True)
class RankMetrics:
    """How evenly the ranks worked in one step: who waits for whom."""

    rows_max_over_mean: float | None  # of rows that a rank's experts received in its forward passes; None without ep
    peak_rows: int  # the most rows that any rank received at once
    slowest_rank: int  # by its own time, without waits for rows
    step_seconds_max_over_mean: float  # of the same time
    all_to_all_seconds_max: float  # that a rank's host waited for rows
    all_to_all_seconds_mean: float
    all_to_all_bytes: int  # rows and gradients that all ranks sent to others


def merge_over_ranks(layers: Sequence[RoutingStatistics], world: World) -> list[RoutingStatistics]:
    """The statistics of each sparse layer as if one process had seen the tokens of all ranks."""
    if world.size == 1 or not layers:
        return list(layers)
    own = torch.cat([_pack(layer) for layer in layers])
    merged = []
    per_rank = [_unpack(packed, layers) for packed in world.gather(own)]
    for parts in zip(*per_rank, strict=True):
        merged.append(merge_statistics(list(parts)))
    return merged


def rank_metrics(traffic: Traffic, seconds: float, world: World) -> RankMetrics | None:
    """The `RankMetrics` of a step; None for one process. seconds: this rank's step so far."""
    if world.size == 1:
        return None
    own = [traffic.rows_received, traffic.peak_rows, seconds - traffic.seconds, traffic.seconds, traffic.row_bytes]
    # float64 is exact to 2^53
    table = torch.stack(world.gather(torch.tensor(own, dtype=torch.float64, device=world.device))).cpu()
    rows, peaks, busy, waited, sent = table.unbind(1)
    return RankMetrics(
        rows_max_over_mean=float(rows.max() / rows.mean()) if float(rows.sum()) > 0 else None,
        peak_rows=int(peaks.max()),
        slowest_rank=int(busy.argmax()),
        step_seconds_max_over_mean=float(busy.max() / busy.mean()),
        all_to_all_seconds_max=float(waited.max()),
        all_to_all_seconds_mean=float(waited.mean()),
        all_to_all_bytes=int(sent.sum()),
    )


def _pack(layer: RoutingStatistics) -> Tensor:
    """The fields that `merge_statistics` reads, in float64, in which counts are exact."""
    fields = (
        layer.num_tokens,
        layer.entropy,
        layer.tokens_per_expert,
        layer.dropped_per_choice,
        layer.chosen_per_choice,
    )
    return torch.cat([field.double().flatten() for field in fields])


def _unpack(packed: Tensor, like: Sequence[RoutingStatistics]) -> list[RoutingStatistics]:
    layers = []
    for layer in like:
        num_experts, top_k = layer.tokens_per_expert.numel(), layer.chosen_per_choice.numel()
        count = 2 + num_experts + 2 * top_k
        own, packed = packed[:count], packed[count:]
        tokens, entropy, counts, dropped, chosen = own.split([1, 1, num_experts, top_k, top_k])
        layers.append(
            layer._replace(
                num_tokens=tokens[0].long(),
                entropy=entropy[0].float(),
                tokens_per_expert=counts.long(),
                dropped_per_choice=dropped.float(),
                chosen_per_choice=chosen.long(),
            )
        )
    return layers
