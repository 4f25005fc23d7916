"""Which links the bytes of a step use: none, those within a node, or those between nodes.

Rank r is device r % gpus_per_node of node r // gpus_per_node, and mesh axes are those of `moe.distributed.mesh`, with
experts innermost. Gathers and reductions go around a ring in which a node's members are adjacent and one of them sends
to the next node; all-to-alls go directly to each row's destination.
"""

from __future__ import annotations

from typing import NamedTuple

from moe.scaling.communication import Exchange, Ring


class LinkBytes(NamedTuple):
    """Bytes that one rank sends, by link. For a ring, the mean over the members of a node."""

    own: int  # to itself
    within: int  # to other devices of its node
    across: int  # to other nodes

    @property
    def total(self) -> int:
        return sum(self)


def ring_links(ring: Ring, gpus_per_node: int) -> LinkBytes:
    """(N-1)/N of the buffer for an all-gather or reduce-scatter, twice that for an all-reduce."""
    passes = 2 if ring.kind == "all_reduce" else 1
    sent = passes * ring.bytes * (ring.size - 1) // ring.size
    members = node_members(ring.size, ring.stride, gpus_per_node)
    across = 0 if members == ring.size else sent // members
    return LinkBytes(0, sent - across, across)


def exchange_links(exchange: Exchange, gpus_per_node: int) -> LinkBytes:
    """All all-to-alls of one MoE layer and micro-batch, for the first rank."""
    here = node_members(len(exchange.bytes_to), 1, gpus_per_node)
    own, *others = exchange.bytes_to
    return LinkBytes(own, sum(others[: here - 1]), sum(others[here - 1 :]))


def fullest_links(exchange: Exchange, gpus_per_node: int) -> LinkBytes:
    """As `exchange_links`, for the rank that receives most rows: what its links carry in the busier direction."""
    size = len(exchange.bytes_to)
    here = node_members(size, 1, gpus_per_node)
    return LinkBytes(exchange.bytes_to[0], exchange.fullest_bytes * (here - 1), exchange.fullest_bytes * (size - here))


def node_members(size: int, stride: int, gpus_per_node: int) -> int:
    """How many of `size` ranks, starting at rank 0 with the given stride, are devices of the first node."""
    return min(size, -(-gpus_per_node // stride))


def step_links(rings: list[Ring], exchange: Exchange | None, gpus_per_node: int, layers: int) -> dict[str, LinkBytes]:
    """Bytes of a step by kind of collective. layers: MoE layers times micro-batches."""
    found: dict[str, LinkBytes] = {}
    for ring in rings:
        before = found.get(ring.kind, LinkBytes(0, 0, 0))
        links = ring_links(ring, gpus_per_node)
        found[ring.kind] = LinkBytes._make(a + b for a, b in zip(before, links, strict=True))
    if exchange is not None:
        found["all_to_all"] = LinkBytes._make(layers * part for part in exchange_links(exchange, gpus_per_node))
    return found
