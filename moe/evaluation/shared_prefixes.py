"""Score many continuations of one context, reading the shared tokens once into a key-value cache.

The choices of a question share its context, and questions with the same demonstrations share those. Requests that share
too little go to `moe.evaluation.scorer.score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe.distributed.world import World
from moe.evaluation.scorer import BATCH_TOKENS, Request, Score, ScoreReport, fit, score
from moe.model import KeyValueCache, Transformer, autocast

MIN_PREFIX = 64  # tokens: below this, one wide batch is cheaper than one pass for the prefix and one for the rest
_MIN_SAVING = 0.25  # share of a cluster's tokens


class Cluster(NamedTuple):
    """Sequences with a common prefix in which no token is scored."""

    prefix_length: int
    members: list[int]  # indices of requests, sorted by their tokens


def score_sharing_prefixes(
    model: Transformer,
    requests: Sequence[Request],
    *,
    greedy: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    precision: str = "fp32",
    world: World | None = None,
    min_prefix: int = MIN_PREFIX,
) -> ScoreReport:
    """Same result as `score` with the same arguments, up to rounding, but shared prefixes are read once.

    Clusters depend only on the set of requests, so the numbers do not depend on their order or the number of ranks. For
    a model that is shared among ranks, or drops tokens in evaluation, everything goes to `score`.
    """
    fit(model, requests)  # clusters bypass `score`, so invalid requests are refused here first
    clusters = (
        [] if drops_tokens(model) or is_shared(model) else find_clusters(requests, model.config.max_seq_len, min_prefix)
    )
    clustered = {index for cluster in clusters for index in cluster.members}
    others = [index for index in range(len(requests)) if index not in clustered]
    settings: dict[str, Any] = {
        "greedy": greedy,
        "batch_tokens": batch_tokens,
        "precision": precision,
        "world": world,
    }
    report = score(model, [requests[index] for index in others], **settings)
    scores: list[Score | None] = [None] * len(requests)
    for index, each in zip(others, report.scores, strict=True):
        scores[index] = each
    num_forward_tokens = report.num_forward_tokens
    numbers, places = _score_clusters(model, requests, clusters, batch_tokens, precision, world)
    values, flags = numbers[0].tolist(), numbers[1].bool().tolist()
    for index, place in places.items():
        count = len(requests[index].tokens) - requests[index].start
        likeliest = tuple(flags[place : place + count]) if greedy else None
        scores[index] = Score(tuple(values[place : place + count]), likeliest)
    for cluster in clusters:
        distinct = {tuple(requests[index].tokens) for index in cluster.members}
        num_forward_tokens += cluster.prefix_length + sum(len(t) - 1 - cluster.prefix_length for t in distinct)
    whole = [each for each in scores if each is not None]
    assert len(whole) == len(requests)
    return ScoreReport(whole, report.num_truncated, report.dropped_fraction, num_forward_tokens)


def find_clusters(requests: Sequence[Request], max_seq_len: int, min_prefix: int = MIN_PREFIX) -> list[Cluster]:
    """Requests that share enough to cluster. Sequences too long for the model are left to `score`."""
    fitting = [i for i, request in enumerate(requests) if 1 < len(request.tokens) <= max_seq_len + 1]
    order = sorted(fitting, key=lambda i: (tuple(requests[i].tokens), requests[i].start))
    clusters: list[Cluster] = []
    current: Cluster | None = None
    for i in order:
        usable = requests[i].start - 1  # the token before the first scored one must be run to predict it
        if current is not None:
            first = requests[current.members[0]].tokens
            shared = _common(first, requests[i].tokens, min(current.prefix_length, usable))
            count = len(current.members)
            # joining saves `count` prefixes of the new length instead of count - 1 of the old
            if shared >= min_prefix and count * shared >= (count - 1) * current.prefix_length:
                current = Cluster(shared, [*current.members, i])
                continue
            clusters.append(current)
        current = Cluster(usable, [i])
    if current is not None:
        clusters.append(current)
    return [cluster for cluster in clusters if _is_worth_it(cluster, requests, min_prefix)]


def _is_worth_it(cluster: Cluster, requests: Sequence[Request], min_prefix: int) -> bool:
    lengths = [len(tokens) - 1 for tokens in {tuple(requests[i].tokens) for i in cluster.members}]
    saved = (len(lengths) - 1) * cluster.prefix_length
    return cluster.prefix_length >= min_prefix and saved >= _MIN_SAVING * sum(lengths)


def _common(first: Sequence[int], second: Sequence[int], most: int) -> int:
    """Length of the common prefix, at most `most`."""
    for index in range(most):
        if first[index] != second[index]:
            return index
    return most


def drops_tokens(model: Transformer) -> bool:
    """Whether experts have a capacity in evaluation, for which the sequences of a batch compete."""
    return model.config.moe is not None and model.config.moe.eval_capacity_factor is not None


def is_shared(model: Transformer) -> bool:
    """Whether the ranks hold parts of one model, so that all must run every batch."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def _score_clusters(
    model: Transformer,
    requests: Sequence[Request],
    clusters: list[Cluster],
    batch_tokens: int,
    precision: str,
    world: World | None,
) -> tuple[Tensor, dict[int, int]]:
    """Numbers (2, N) of all scored tokens (log-probability, greedy flag), and each request's offset in them."""
    places: dict[int, int] = {}
    total = 0
    for cluster in clusters:
        for index in cluster.members:
            places[index] = total
            total += len(requests[index].tokens) - requests[index].start
    device = next(model.parameters()).device if world is None else world.device
    numbers = torch.zeros(2, total, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        for number, cluster in enumerate(clusters):
            if world is None or number % world.size == world.rank:
                with autocast(device, precision):
                    _score_cluster(model, requests, cluster, places, numbers, batch_tokens)
    finally:
        model.train(was_training)
    return numbers if world is None or total == 0 else world.sum(numbers), places


def _score_cluster(
    model: Transformer,
    requests: Sequence[Request],
    cluster: Cluster,
    places: dict[int, int],
    numbers: Tensor,
    batch_tokens: int,
) -> None:
    device, length = numbers.device, cluster.prefix_length
    distinct: dict[tuple[int, ...], list[int]] = {}
    for index in cluster.members:
        distinct.setdefault(tuple(requests[index].tokens), []).append(index)
    rows = sorted(distinct, key=lambda tokens: (-len(tokens), tokens))
    prefix = model.new_cache(1, length)
    model(torch.tensor([rows[0][:length]], device=device), cache=prefix)
    per_batch = max(1, batch_tokens // len(rows[0]))  # by the longest row, prefix included, as the cache holds both
    for begin in range(0, len(rows), per_batch):
        batch = rows[begin : begin + per_batch]
        width = len(batch[0]) - 1 - length
        # the padding follows each row's end, so none of its tokens sees it
        padded = torch.tensor([[*row[length:], *[0] * (len(batch[0]) - len(row))] for row in batch], device=device)
        cache = _repeated(model, prefix, len(batch), length + width)
        logits = model(padded[:, :-1], cache=cache).logits  # (B, width, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = padded[:, 1:]
        log_probs = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)  # (B, width)
        likeliest = logits.argmax(-1) == targets
        for i, row in enumerate(batch):
            for index in distinct[row]:
                start = requests[index].start
                wanted = slice(start - 1 - length, len(row) - 1 - length)  # position p predicts token p + 1
                place = slice(places[index], places[index] + len(row) - start)
                numbers[0, place] = log_probs[i, wanted].double()
                numbers[1, place] = likeliest[i, wanted].double()


def _repeated(model: Transformer, prefix: KeyValueCache, batch_size: int, max_len: int) -> KeyValueCache:
    """A cache with `batch_size` copies of `prefix`."""
    cache = model.new_cache(batch_size, max_len)
    for wide, narrow in zip(cache.layers, prefix.layers, strict=True):
        wide.keys[:, :, : prefix.length] = narrow.keys
        wide.values[:, :, : prefix.length] = narrow.values
    cache.length = prefix.length
    return cache
