"""Carry rows from the ranks that hold tokens to the ranks that hold their experts, in one all-to-all or two.

Rows leave in the order (destination, expert) and arrive in the order (source, expert). Two levels, first within a node
and then between equal places of all nodes, send fewer and larger messages over the slow links; the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe.distributed.all_to_all import (
    Transfer,
    all_to_all,
    exchange_counts,
    finish,
    refuse_second_derivatives,
    start,
)

Counts = list[list[int]]  # [rank][expert of the receiving rank] rows


class Leg(NamedTuple):
    """One all-to-all of a journey, and the reordering of rows before it."""

    send: list[int]  # rows for each rank of `group`
    receive: list[int]  # rows from each
    group: dist.ProcessGroup
    before: Counts | None  # sizes [a][b] of blocks of rows, to be reordered from (a, b) to (b, a)


class Journey(NamedTuple):
    """How many rows go where, known on the host, and the legs that carry them."""

    tables: tuple[Counts, ...]  # rows sent per [destination], then those in transit, then those received per [source]
    legs: tuple[Leg, ...]

    @property
    def received(self) -> Counts:
        return self.tables[-1]

    @property
    def num_sent(self) -> int:
        return sum(map(sum, self.tables[0]))

    @property
    def num_received(self) -> int:
        return sum(map(sum, self.received))


class Wire(Protocol):
    """Carries rows between the P ranks of an expert-parallel group.

    Another engine (such as DeepEP) plugs in here or, if it also sorts and combines, as a whole dispatcher.
    """

    size: int

    def announce(self, counts: Tensor) -> Journey:
        """The journey of a forward pass, given this rank's rows for each expert: (P, experts of a rank) int64."""
        ...

    def journey(self, *tables: Counts) -> Journey:
        """The journey with these tables."""
        ...

    def uniform(self, rows: int, num_experts: int) -> Journey:
        """The journey in which every rank sends `rows` rows to each of the `num_experts` experts of each rank."""
        ...


class FlatWire:
    """One all-to-all among all ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)

    def announce(self, counts: Tensor) -> Journey:
        sent, received = torch.stack([counts, exchange_counts(counts, self.group)]).tolist()  # one wait for the device
        return self.journey(sent, received)

    def journey(self, *tables: Counts) -> Journey:
        sent, received = tables
        leg = Leg([sum(row) for row in sent], [sum(row) for row in received], self.group, None)
        return Journey(tables, (leg,))

    def uniform(self, rows: int, num_experts: int) -> Journey:
        table = [[rows] * num_experts for _ in range(self.size)]
        return self.journey(table, table)


class TwoLevelWire:
    """Exchanges within the node first, then between the ranks of equal place in all nodes.

    Rank p of the whole group is node · ranks_per_node + place: `within` is the group of one node's places, `between`
    that of one place's nodes, each in ascending order.
    """

    def __init__(self, within: dist.ProcessGroup, between: dist.ProcessGroup) -> None:
        self.within, self.between = within, between
        self.ranks_per_node = dist.get_world_size(within)
        self.num_nodes = dist.get_world_size(between)
        self.size = self.ranks_per_node * self.num_nodes

    def announce(self, counts: Tensor) -> Journey:
        num_experts = counts.shape[1]
        to_places = counts.view(self.num_nodes, self.ranks_per_node, num_experts).transpose(0, 1)
        passing = exchange_counts(to_places.flatten(1), self.within)  # from each place of this node, for each node
        to_nodes = passing.view(self.ranks_per_node, self.num_nodes, num_experts).transpose(0, 1)
        received = exchange_counts(to_nodes.flatten(1), self.between).view(self.size, num_experts)
        tables = torch.stack([counts, passing.view(self.size, num_experts), received]).tolist()
        return self.journey(*tables)

    def journey(self, *tables: Counts) -> Journey:
        sent, passing, received = tables
        by_node = _grid(sent, self.num_nodes, self.ranks_per_node)  # [destination node][place]
        by_place = _grid(passing, self.ranks_per_node, self.num_nodes)  # [source place][destination node]
        arriving = _grid(received, self.num_nodes, self.ranks_per_node)  # [source node][place]
        first = Leg([sum(c) for c in zip(*by_node, strict=True)], [sum(r) for r in by_place], self.within, by_node)
        second = Leg([sum(c) for c in zip(*by_place, strict=True)], [sum(r) for r in arriving], self.between, by_place)
        return Journey(tables, (first, second))

    def uniform(self, rows: int, num_experts: int) -> Journey:
        table = [[rows] * num_experts for _ in range(self.size)]
        return self.journey(table, table, table)


def part_of(wire: Wire, journey: Journey, experts: slice) -> Journey:
    """The journey restricted to a slice of each rank's experts."""
    return wire.journey(*([row[experts] for row in table] for table in journey.tables))


class InFlight(NamedTuple):
    """Rows in flight. `leaving` holds no data yet; `arrive` waits for them.

    They are separate so that a module in between (FSDP2 hooks into arguments and results) takes and returns tensors.
    """

    leaving: Tensor
    arrive: Callable[[Tensor], Tensor]


def send_out(rows: Tensor, journey: Journey) -> InFlight:
    """Send rows in the order (destination, expert); they arrive in the order (source, expert)."""
    first, *others = journey.legs
    transfer = Transfer(first.send, first.receive, first.group)
    leaving = start(rows if first.before is None else transpose_blocks(rows, first.before), transfer)

    def arrive(leaving: Tensor) -> Tensor:
        arrived = finish(leaving, transfer)
        for leg in others:
            if leg.before is not None:
                arrived = transpose_blocks(arrived, leg.before)
            arrived = all_to_all(arrived, leg.send, leg.receive, leg.group)
        return arrived

    return InFlight(leaving, arrive)


def send_back(rows: Tensor, journey: Journey) -> InFlight:
    """Send rows back, given in the order of their arrival; they return in the order in which they left."""
    last, *others = reversed(journey.legs)
    transfer = Transfer(last.receive, last.send, last.group)
    leaving = start(rows, transfer)

    def arrive(leaving: Tensor) -> Tensor:
        arrived = finish(leaving, transfer)
        if last.before is not None:
            arrived = transpose_blocks(arrived, last.before, back=True)
        for leg in others:
            arrived = all_to_all(arrived, leg.receive, leg.send, leg.group)
            if leg.before is not None:
                arrived = transpose_blocks(arrived, leg.before, back=True)
        return arrived

    return InFlight(leaving, arrive)


def transpose_blocks(rows: Tensor, sizes: Counts, *, back: bool = False) -> Tensor:
    """Reorder blocks of sizes[a][b] rows from the order (a, b) to (b, a); `back` is the inverse.

    (R, ...) -> (R, ...). Differentiable. The index is built on the host, where the sizes are known.
    """
    result: Tensor = _Reorder.apply(rows, _transposed_order(sizes).to(rows.device, non_blocking=True), back)
    return result


def _transposed_order(sizes: Counts) -> Tensor:
    """(R,) int64: for each row in the order (b, a), its index in the order (a, b)."""
    size = np.array(sizes, dtype=np.int64)  # (A, B)
    first = (size.cumsum() - size.ravel()).reshape(size.shape).T.ravel()
    size = size.T.ravel()
    return torch.from_numpy(np.repeat(first - (size.cumsum() - size), size) + np.arange(size.sum()))


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(index)
        ctx.back = back
        return _reorder(rows, index, back)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        refuse_second_derivatives()
        (index,) = ctx.saved_tensors
        return _reorder(grads[0], index, not ctx.back), None, None


def _reorder(rows: Tensor, index: Tensor, back: bool) -> Tensor:
    if not back:
        return rows.index_select(0, index)
    return torch.empty_like(rows, memory_format=torch.contiguous_format).index_copy_(0, index, rows)


def _grid(table: Counts, num_rows: int, num_columns: int) -> Counts:
    """Rows for each of num_rows · num_columns ranks, summed over experts, as [row][column]."""
    totals = [sum(row) for row in table]
    return [totals[i * num_columns : (i + 1) * num_columns] for i in range(num_rows)]
