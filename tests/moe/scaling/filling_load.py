"""A load that gives the first rank's experts a stated number of rows."""

from __future__ import annotations

from dataclasses import dataclass

from moe.scaling.routing_load import RoutingLoad


@dataclass(frozen=True)
class Filling(RoutingLoad):
    """In every layer each rank sends the first one its share of `here` rows, and the second one the others."""

    here: int = 0

    def rows(self, num_tokens: int, capacity: int | None = None) -> list[list[int]]:
        """As [rank of the expert][its place there], all of them in a rank's first expert."""
        assert capacity is None
        own, rest = self.here // self.num_ranks, [0] * (self.num_experts // self.num_ranks - 1)
        return [[rows, *rest] for rows in (own, num_tokens * self.top_k - own, *[0] * (self.num_ranks - 2))]
