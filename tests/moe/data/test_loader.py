from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.data.loader import EvaluationWindows, TokenBatch, TrainLoader
from moe.data.shards import ShardWriter, TokenShard

EOS = 0


@pytest.fixture
def shard(tmp_path: Path) -> TokenShard:
    """23 documents of 1 to 9 tokens in two domains; token ids count up, so that each is unique."""
    writer = ShardWriter(tmp_path / "shard", vocab_size=1000, tokenizer_hash="x")
    next_id = 1
    for number in range(23):
        length = number % 9 + 1
        writer.add("docs" if number % 3 else "code", [*range(next_id, next_id + length), EOS], 2 * length)
        next_id += length
    writer.finish()
    return TokenShard(tmp_path / "shard")


def loader(shard: TokenShard, **changes: object) -> TrainLoader:
    return TrainLoader(shard, **({"seq_len": 6, "batch_size": 4, "seed": 1} | changes))


def stream_of(shard: TokenShard) -> list[int]:
    return shard.tokens.tolist()


def test_windows_are_pieces_of_the_stream_shifted_by_one(shard: TokenShard) -> None:
    stream = stream_of(shard)
    batch = loader(shard).batch(0)
    assert batch.tokens.shape == batch.targets.shape == (4, 6)
    assert batch.token_mask is None
    assert batch.document_ids is None
    windows = [stream[i * 6 : i * 6 + 7] for i in range((len(stream) - 1) // 6)]
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        assert [*tokens, targets[-1]] in windows
        assert tokens[1:] == targets[:-1]


def test_an_epoch_reads_every_window_once_and_the_next_one_in_another_order(shard: TokenShard) -> None:
    made = loader(shard, batch_size=1)
    epochs = [
        [tuple(made.batch(e * made.num_windows + i).tokens[0].tolist()) for i in range(made.num_windows)]
        for e in (0, 1)
    ]
    assert len(set(epochs[0])) == made.num_windows == (shard.num_tokens - 1) // 6
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


def test_a_batch_is_a_function_of_seed_and_step(shard: TokenShard) -> None:
    walked = loader(shard)
    batches = [walked.batch(step) for step in range(20)]
    for step in (19, 3, 7):  # any order, a new object: nothing to resume
        assert torch.equal(loader(shard).batch(step).tokens, batches[step].tokens)
    assert not torch.equal(loader(shard, seed=2).batch(0).tokens, batches[0].tokens)


def test_ranks_share_the_global_batch(shard: TokenShard) -> None:
    for step in (0, 5):  # the fifth spans two epochs
        whole = loader(shard).batch(step).tokens
        parts = [loader(shard, rank=rank, world_size=2).batch(step).tokens for rank in (0, 1)]
        assert torch.equal(torch.cat(parts), whole)


def test_within_documents_ids_change_after_each_separator(shard: TokenShard) -> None:
    batch = loader(shard, document_attention="within").batch(0)
    for tokens, ids in zip(batch.tokens.tolist(), batch.document_ids.tolist(), strict=True):
        changes = [b != a for a, b in pairwise(ids)]
        assert changes == [token == EOS for token in tokens[:-1]]


def test_batches_split_into_micro_batches(shard: TokenShard) -> None:
    batch = loader(shard, document_attention="within").batch(0)
    parts = batch.split(3)
    assert [part.tokens.shape[0] for part in parts] == [3, 1]
    for field in ("tokens", "targets", "document_ids"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(batch, field))
    assert parts[0].token_mask is None


def test_too_little_text_is_refused(shard: TokenShard) -> None:
    with pytest.raises(ValueError, match=r"has \d+ tokens, fewer than one batch needs: 4 sequences of 64 tokens"):
        loader(shard, seq_len=64)
    with pytest.raises(ValueError, match="cannot be divided among 3 ranks"):
        loader(shard, world_size=3)


def predicted(batches: list[TokenBatch]) -> list[tuple[int, int]]:
    """(input, target) pairs that count, in order."""
    pairs = []
    for batch in batches:
        mask = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.token_mask is None else batch.token_mask
        pairs += zip(batch.tokens[mask].tolist(), batch.targets[mask].tolist(), strict=True)
    return pairs


@pytest.mark.parametrize(("seq_len", "batch_size"), [(6, 4), (5, 1), (64, 2), (1, 3)])
@pytest.mark.parametrize("domain", ["docs", "code"])
def test_evaluation_predicts_every_token_of_the_domain_once(
    shard: TokenShard, domain: str, seq_len: int, batch_size: int
) -> None:
    windows = EvaluationWindows(shard, domain, seq_len=seq_len, batch_size=batch_size)
    tokens = np.concatenate([shard.document(i) for i in shard.documents_of(domain)]).tolist()
    assert predicted(list(windows)) == list(zip([EOS, *tokens[:-1]], tokens, strict=True))
    assert windows.num_bytes == sum(shard.document_bytes[shard.documents_of(domain)])


def test_evaluation_repeats(shard: TokenShard) -> None:
    windows = EvaluationWindows(shard, "docs", seq_len=6, batch_size=2)
    assert predicted(list(windows)) == predicted(list(windows))


def test_a_limit_stops_after_whole_documents(shard: TokenShard) -> None:
    windows = EvaluationWindows(shard, "docs", seq_len=6, batch_size=2, max_tokens=12)
    lengths = [len(shard.document(i)) for i in shard.documents_of("docs")]
    count = next(n for n in range(len(lengths)) if sum(lengths[:n]) >= 12)
    assert len(predicted(list(windows))) == sum(lengths[:count])
    assert windows.num_bytes == 2 * (sum(lengths[:count]) - count)  # separators are no text


def test_padding_sees_no_document(shard: TokenShard) -> None:
    *_, last = EvaluationWindows(shard, "code", seq_len=6, batch_size=2, document_attention="within")
    assert last.token_mask is not None
    real, padding = last.document_ids[last.token_mask], last.document_ids[~last.token_mask]
    assert not set(real.tolist()) & set(padding.tolist())
