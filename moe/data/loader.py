"""From shards to batches. A training batch is a function of (seed, step); there is no state to save."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.data.shards import TokenShard


class TokenBatch(NamedTuple):
    """Inputs and the tokens to predict, one position later."""

    tokens: Tensor  # (B, S) int64
    targets: Tensor  # (B, S) int64
    token_mask: Tensor | None  # (B, S) bool, false for padding; None is no padding
    document_ids: Tensor | None  # (B, S) int64; None attends across documents

    def split(self, micro_batch_size: int) -> list[TokenBatch]:
        """Parts of `micro_batch_size` sequences, the last one possibly smaller."""
        columns = [
            [None] * -(-self.tokens.shape[0] // micro_batch_size) if field is None else field.split(micro_batch_size)
            for field in self
        ]
        return [TokenBatch(*fields) for fields in zip(*columns, strict=True)]


class TrainLoader:
    """Fixed-length windows over the concatenated documents, each window once an epoch in an order drawn anew.

    Window i predicts tokens i·S+1 to (i+1)·S of the stream; only the stream's first token is never predicted. With
    document_attention "across" a window attends across the separators in it (the paper's packing, moe_lm.md 5), with
    "within" each document sees itself alone and positions restart. With `world_size` ranks, rank r reads the r-th
    equal part of each micro-step of the same global batch of `batch_size` sequences, `micro_batch_size` of them (None:
    all of its share at once): for an equal number of micro-steps, the ranks together see in each what one process sees.
    Raises ValueError when the split is shorter than one batch.
    """

    def __init__(
        self,
        shard: TokenShard,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        document_attention: str = "across",
        micro_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_windows = max(shard.num_tokens - 1, 0) // seq_len
        if self.num_windows < batch_size:
            raise ValueError(
                f"the training split has {shard.num_tokens} tokens, less than one batch of {batch_size} sequences of "
                f"{seq_len} tokens and one more; give more text or lower train.batch_tokens"
            )
        if batch_size % world_size != 0:
            raise ValueError(
                f"the batch of {batch_size} sequences cannot be divided among {world_size} ranks; "
                f"change train.batch_tokens"
            )
        self._shard = shard
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._within = document_attention == "within"
        local = batch_size // world_size
        micro = local if micro_batch_size is None else micro_batch_size
        if local % micro != 0:
            raise ValueError(
                f"a rank's {local} sequences of a batch ({batch_size} / {world_size} ranks) cannot be divided into "
                f"micro-batches of {micro}; change train.micro_batch_size or train.batch_tokens"
            )
        # places in the batch that are this rank's: of each micro-step its own run of `micro` sequences
        self._own = [
            step * world_size * micro + rank * micro + i for step in range(local // micro) for i in range(micro)
        ]
        self._order = lru_cache(maxsize=2)(self._draw_order)  # a batch may span two epochs

    def batch(self, step: int) -> TokenBatch:
        """This rank's part of batch `step`, counted from 0."""
        windows = [self._window(step * self._batch_size + place) for place in self._own]
        starts = np.array(windows) * self._seq_len
        index = starts[:, None] + np.arange(self._seq_len + 1)  # (B, S+1)
        stream = torch.from_numpy(self._shard.tokens[index].astype(np.int64))
        ids = None
        if self._within:
            documents = np.searchsorted(self._shard.document_starts, index[:, :-1], side="right")
            ids = torch.from_numpy(documents.astype(np.int64))
        return TokenBatch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), None, ids)

    def _window(self, place: int) -> int:
        epoch, index = divmod(place, self.num_windows)
        return int(self._order(epoch)[index])

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self.num_windows)


class EvaluationWindows:
    """All documents of one domain of a held-out split, in non-overlapping windows; every token is predicted once.

    The separator stands before the first document. The last window is padded and masked. With `max_tokens`, reading
    stops after the first document that reaches it, so that `num_bytes`, the UTF-8 length of the documents read,
    always fits the tokens.
    """

    def __init__(
        self,
        shard: TokenShard,
        domain: str,
        *,
        seq_len: int,
        batch_size: int,
        max_tokens: int | None = None,
        document_attention: str = "across",
    ) -> None:
        self.domain = domain
        self._shard = shard
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._within = document_attention == "within"
        self._documents = shard.documents_of(domain)
        if max_tokens is not None:
            ends = np.cumsum([len(shard.document(index)) for index in self._documents])
            self._documents = self._documents[: int(np.searchsorted(ends, max_tokens)) + 1]
        self.num_bytes = int(shard.document_bytes[self._documents].sum())

    def __iter__(self) -> Iterator[TokenBatch]:
        capacity = self._batch_size * self._seq_len
        stream = np.empty(0, dtype=np.int64)  # inputs still to predict from, and one token more
        ids = np.empty(0, dtype=np.int64)  # document of each token of `stream`
        for number, index in enumerate(self._documents):
            tokens = self._shard.document(int(index)).astype(np.int64)
            if number == 0:
                tokens = np.concatenate([tokens[-1:], tokens])  # a document ends with the separator
            stream = np.concatenate([stream, tokens])
            ids = np.concatenate([ids, np.full(len(tokens), number)])
            while len(stream) > capacity:
                yield self._make(stream[: capacity + 1], ids[:capacity])
                stream, ids = stream[capacity:], ids[capacity:]
        if len(stream) > 1:
            yield self._make(stream, ids[:-1])

    def _make(self, stream: np.ndarray, ids: np.ndarray) -> TokenBatch:
        """A batch of as many windows as `stream` fills, the last one padded."""
        count = len(stream) - 1
        rows = -(-count // self._seq_len)
        padding = rows * self._seq_len - count

        def window(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.pad(values, (0, padding))).view(rows, self._seq_len)

        mask = window(np.ones(count, dtype=bool)) if padding else None
        # padding is a document of its own, so that it attends to nothing real
        documents = window(ids + 1) if self._within else None
        return TokenBatch(window(stream[:-1]), window(stream[1:]), mask, documents)
