"""Simulated routing: the rows that each rank sends to each expert."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RoutingLoad:
    """Every rank's T tokens choose alike; the first rank's experts get the most rows. E_local = E/P experts per rank.

    "uniform": each expert gets T·K/E rows, the first ones one more if that is not a whole number.
    "zipf": the j-th most popular expert gets a share proportional to 1/j, at most T rows; counting from 0, it is expert
    (j // P) of rank j % P.
    "worst": every token chooses as many of the first rank's experts as it can, min(K, E_local), and the others in turn.
    """

    name: str
    num_experts: int
    num_ranks: int
    top_k: int

    def __post_init__(self) -> None:
        if self.name not in ("uniform", "zipf", "worst"):
            raise ValueError(f"the load ({self.name!r}) must be one of: uniform, zipf, worst")
        if self.num_experts % self.num_ranks != 0:
            raise ValueError(
                f"num_experts ({self.num_experts}) must be a multiple of the ranks that share them ({self.num_ranks}); "
                f"change one of them"
            )

    def rows(self, num_tokens: int, capacity: int | None = None) -> list[list[int]]:
        """Rows from one rank's `num_tokens` tokens for each expert, as [expert's rank][local expert].

        capacity: the maximum per expert; the rest is dropped.
        """
        local = self.num_experts // self.num_ranks
        slots = num_tokens * self.top_k
        if self.name == "worst":
            counts = self._worst(num_tokens, local)
        elif self.name == "uniform":
            counts = _spread(slots, self.num_experts)
        else:
            counts = self._zipf(slots, num_tokens, local)
        if capacity is not None:
            counts = [min(count, capacity) for count in counts]
        return [counts[rank * local : (rank + 1) * local] for rank in range(self.num_ranks)]

    def rounds(self, num_tokens: int, limit: int | None, capacity: int | None = None) -> int:
        """Number of rounds needed so that the first rank receives at most `limit` rows in each (rows_limit)."""
        if limit is None or self.num_ranks * sum(self.rows(num_tokens, capacity)[0]) <= limit:
            return 1
        num_local = self.num_experts // self.num_ranks
        return -(-num_tokens // tokens_a_round(limit, self.num_ranks, self.top_k, num_local))

    def _worst(self, num_tokens: int, local: int) -> list[int]:
        here = min(self.top_k, local)
        elsewhere = num_tokens * (self.top_k - here)
        return _spread(num_tokens * here, local) + _spread(elsewhere, self.num_experts - local)

    def _zipf(self, slots: int, num_tokens: int, local: int) -> list[int]:
        by_popularity = [0] * self.num_experts
        left, open_from = slots, 0
        while open_from < self.num_experts:  # what exceeds the most popular experts goes to the others, in proportion
            weights = [1.0 / (j + 1) for j in range(open_from, self.num_experts)]
            if left * weights[0] / sum(weights) <= num_tokens:
                shares = _apportion(left, weights)
                by_popularity[open_from:] = [min(share, num_tokens) for share in shares]
                break
            by_popularity[open_from] = num_tokens
            left -= num_tokens
            open_from += 1
        counts = [0] * self.num_experts
        for j, count in enumerate(by_popularity):
            counts[(j % self.num_ranks) * local + j // self.num_ranks] = count
        return counts


def _spread(total: int, places: int) -> list[int]:
    """`total` spread over `places` as evenly as possible, the first ones getting one more."""
    if places == 0:
        return []
    each, more = divmod(total, places)
    return [each + 1] * more + [each] * (places - more)


def _apportion(total: int, weights: list[float]) -> list[int]:
    """Non-increasing whole numbers that sum to `total`, in proportion to non-increasing weights."""
    scale = total / sum(weights)
    shares = [int(weight * scale) for weight in weights]
    for j in range(total - sum(shares)):  # the remainder of rounding down: at most one per place
        shares[j] += 1
    return shares


def tokens_a_round(limit: int, num_ranks: int, top_k: int, num_local: int) -> int:
    """The tokens per rank with which `num_ranks` ranks together send no rank more than `limit` rows.

    num_local: experts of a rank. Raises ValueError if not even one token of each rank fits.
    """
    rows = min(top_k, num_local)  # the most that a token sends one rank: one per expert
    if limit < num_ranks * rows:
        raise ValueError(
            f"rows_limit ({limit}) must be at least ranks * min(top_k, experts of a rank) ({num_ranks} * {rows}): one "
            f"token of each rank may go to one rank whole"
        )
    return limit // (num_ranks * rows)
