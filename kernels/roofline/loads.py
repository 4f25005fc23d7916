"""How many rows each expert gets under three loads, even to one-hot. Expected loads, not draws: always the same."""

from __future__ import annotations

LOADS = ("uniform", "zipf", "one-hot")


def expert_rows(load: str, num_tokens: int, num_experts: int, top_k: int) -> list[int]:
    """Rows of each expert (E,), T·K in total and at most T for one expert, since a token's K experts are distinct.

    uniform: all equal. zipf: expert e in proportion to 1/(e+1), any excess over T passed on to the others in the same
    proportion. one-hot: the first K experts take every token. Raises ValueError for an unknown load, a negative
    num_tokens or a top_k that is not between 1 and num_experts.
    """
    if load not in LOADS:
        raise ValueError(f"load ({load!r}) must be one of: {', '.join(LOADS)}")
    if num_tokens < 0 or not 1 <= top_k <= num_experts:
        raise ValueError(
            f"num_tokens ({num_tokens}) must not be negative, top_k ({top_k}) between 1 and num_experts ({num_experts})"
        )
    if load == "one-hot":
        return [num_tokens if e < top_k else 0 for e in range(num_experts)]
    weights = [1.0] * num_experts if load == "uniform" else [1 / (e + 1) for e in range(num_experts)]
    return _apportion(weights, num_tokens * top_k, num_tokens)


def _apportion(weights: list[float], total: int, most: int) -> list[int]:
    """`total` in proportion to falling `weights`, none above `most`; fractions go to the largest remainders."""
    full = 0  # how many of the heaviest experts have `most`
    while full < len(weights):
        scale = (total - full * most) / sum(weights[full:])
        if weights[full] * scale <= most:
            break
        full += 1
    exact = [float(most)] * full + [weight * scale for weight in weights[full:]]
    rows = [int(value) for value in exact]
    order = sorted(range(len(rows)), key=lambda e: (rows[e] - exact[e], e))
    for e in order[: total - sum(rows)]:
        rows[e] += 1
    return rows
