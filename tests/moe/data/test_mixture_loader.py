"""Batches of a mixture: each domain a stream of its own, wherever its documents lie."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.data.loader import TrainLoader
from moe.data.shards import ShardWriter, TokenShard

EOS = 0
SHARES = {"de": 0.2, "en": 0.7, "sw": 0.1}
FIRST_IDS = {"en": 10_000, "de": 20_000, "sw": 30_000}  # tokens of a domain count up from here
LENGTHS = {"en": 900, "de": 300, "sw": 70}
SEQ_LEN = 8


@pytest.fixture
def shard(tmp_path: Path) -> TokenShard:
    """Documents of three domains in turn, so that no domain lies in one piece."""
    writer = ShardWriter(tmp_path / "shard", vocab_size=65536, tokenizer_hash="x")
    left = {domain: list(range(first, first + LENGTHS[domain])) for domain, first in FIRST_IDS.items()}
    number = 0
    while any(left.values()):
        for domain, tokens in left.items():
            if tokens:
                number += 1
                writer.add(domain, [*tokens[: number % 7 + 1], EOS], 1)
                del tokens[: number % 7 + 1]
    writer.finish()
    return TokenShard(tmp_path / "shard")


def loader(shard: TokenShard, **changes: object) -> TrainLoader:
    return TrainLoader(shard, **({"seq_len": SEQ_LEN, "batch_size": 20, "seed": 1, "shares": SHARES} | changes))


def stream(shard: TokenShard, domain: str) -> list[int]:
    return [token for index in shard.documents_of(domain) for token in shard.document(int(index)).tolist()]


def domain_of(row: list[int]) -> str:
    (domain,) = {name for name, first in FIRST_IDS.items() for token in row if first <= token < first + 10_000}
    return domain


def test_windows_are_pieces_of_one_domains_stream(shard: TokenShard) -> None:
    pieces = {
        domain: [text[i : i + SEQ_LEN + 1] for i in range(0, len(text) - SEQ_LEN, SEQ_LEN)]
        for domain in SHARES
        if (text := stream(shard, domain))
    }
    for step in range(10):
        batch = loader(shard).batch(step)
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            window = [*tokens, targets[-1]]
            assert window in pieces[domain_of(window)]
            assert tokens[1:] == targets[:-1]


def test_batches_hold_their_shares_in_a_changing_order(shard: TokenShard) -> None:
    made = loader(shard)
    batches = [[domain_of(row) for row in made.batch(step).tokens.tolist()] for step in range(60)]
    for domains in batches:
        counts = Counter(domains)
        assert all(abs(counts[domain] - 20 * share) <= 2 for domain, share in SHARES.items())
    total = Counter(domain for domains in batches for domain in domains)
    assert all(abs(total[domain] - 1200 * share) <= 1 + 3 * share for domain, share in SHARES.items())
    places = np.array([[domain == "sw" for domain in domains] for domains in batches]).sum(axis=0)
    assert places.max() < 30  # no place is always the same language's: a rank reads them all


def test_each_domain_has_epochs_of_its_own(shard: TokenShard) -> None:
    made = loader(shard)
    rows = [tuple(row) for step in range(120) for row in made.batch(step).tokens.tolist()]
    for domain in SHARES:
        windows = (len(stream(shard, domain)) - 1) // SEQ_LEN
        read = [row for row in rows if domain_of(list(row)) == domain]
        counts = Counter(read)
        assert len(read) >= 2 * windows
        assert len(counts) == windows
        # a seam of epochs may lie inside the last batch, whose order is drawn anew
        assert max(counts.values()) - min(counts.values()) <= 1
        assert read[:windows] != read[windows : 2 * windows]


def test_with_replacement_windows_are_drawn_independently(shard: TokenShard) -> None:
    made = loader(shard, replacement=True)
    rows = [tuple(row) for step in range(120) for row in made.batch(step).tokens.tolist()]
    counts = Counter(row for row in rows if domain_of(list(row)) == "en")
    drawn = sum(counts.values())
    windows = (len(stream(shard, "en")) - 1) // SEQ_LEN
    # the spread of independent draws: variance equal to the mean, against 1/4 at most without replacement
    spread = np.var([*counts.values(), *[0] * (windows - len(counts))])
    assert 0.6 < spread / (drawn / windows) < 1.5


def test_a_batch_is_a_function_of_seed_and_step(shard: TokenShard) -> None:
    walked = loader(shard)
    batches = [walked.batch(step).tokens for step in range(40)]
    for step in (39, 3, 17):  # any order, a new object: nothing to resume
        assert torch.equal(loader(shard).batch(step).tokens, batches[step])
    assert not torch.equal(loader(shard, seed=2).batch(0).tokens, batches[0])


@pytest.mark.parametrize("micro_batch_size", [None, 2, 5])
@pytest.mark.parametrize("replacement", [False, True])
def test_ranks_share_the_global_batch(shard: TokenShard, micro_batch_size: int | None, replacement: bool) -> None:
    changes = {"micro_batch_size": micro_batch_size, "replacement": replacement}
    for step in (0, 31):
        whole = loader(shard, replacement=replacement).batch(step).tokens
        parts = [loader(shard, rank=rank, world_size=2, **changes).batch(step).tokens for rank in (0, 1)]
        micro = 10 if micro_batch_size is None else micro_batch_size
        steps = [part[i : i + micro] for i in range(0, 10, micro) for part in parts]
        assert torch.equal(torch.cat(steps), whole)


def test_within_documents_ids_change_after_each_separator(shard: TokenShard) -> None:
    batch = loader(shard, document_attention="within").batch(0)
    for tokens, ids in zip(batch.tokens.tolist(), batch.document_ids.tolist(), strict=True):
        assert [a != b for a, b in pairwise(ids)] == [token == EOS for token in tokens[:-1]]


def test_a_domain_without_a_share_is_not_read(shard: TokenShard) -> None:
    batch = loader(shard, shares={"en": 0.5, "de": 0.5}).batch(0)
    assert {domain_of(row) for row in batch.tokens.tolist()} == {"en", "de"}


def test_a_domain_of_less_than_one_window_is_refused(shard: TokenShard) -> None:
    with pytest.raises(ValueError, match=r"the domain sw has \d+ training tokens, fewer than one sequence needs: 200"):
        loader(shard, seq_len=200)
    assert loader(shard, seq_len=200, shares={"en": 1.0}).batch(0).tokens.shape == (20, 200)  # more epochs a batch
