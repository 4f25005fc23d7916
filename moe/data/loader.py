"""From shards to batches. A training batch is a function of (seed, step), so there is no state to save.

Without shares all text is one stream; with shares each domain is a stream of its own (moe.data.sampling).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.data.sampling import Schedule
from moe.data.shards import TokenShard


class TokenBatch(NamedTuple):
    """Input tokens and their targets, one position later."""

    tokens: Tensor  # (B, S) int64
    targets: Tensor  # (B, S) int64
    token_mask: Tensor | None  # (B, S) bool, False for padding; None means no padding
    document_ids: Tensor | None  # (B, S) int64; None attends across documents
    loss_mask: Tensor | None = None  # (B, S) bool, True where the target counts; None means everywhere except padding

    @property
    def counted(self) -> Tensor | None:
        """(B, S) bool: the positions whose losses enter the cross-entropy; None means all."""
        return self.token_mask if self.loss_mask is None else self.loss_mask

    def split(self, micro_batch_size: int) -> list[TokenBatch]:
        """Split into parts of `micro_batch_size` sequences; the last one may be smaller."""
        columns = [
            [None] * -(-self.tokens.shape[0] // micro_batch_size) if field is None else field.split(micro_batch_size)
            for field in self
        ]
        return [TokenBatch(*fields) for fields in zip(*columns, strict=True)]


class TrainLoader:
    """Fixed-length windows over the concatenated documents, each read once per epoch in a freshly drawn order.

    Window i predicts tokens i·S+1 to (i+1)·S of the stream; the stream's first token is never predicted, nor are those
    at its end that do not fill a window. With document_attention "across", attention crosses the separators inside a
    window (the paper's packing, Artetxe et al. 2021); with "within", each document attends only to itself and positions
    restart. With `world_size` ranks, rank r reads the r-th equal part of each micro-step of one global batch of
    `batch_size` sequences, `micro_batch_size` of them (None: its whole share at once): for an equal number of
    micro-steps, all ranks together see in each what a single process sees.

    shares: per domain, summing to 1. Each domain is then a stream with its own epochs, every batch holds nearly its
    share of each domain, in random order, and with `replacement` windows are drawn independently. `None` is a single
    stream of all text, in which a window may span domains. Raises ValueError if the split, or a domain with a share, is
    too short.
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
        shares: Mapping[str, float] | None = None,
        replacement: bool = False,
    ) -> None:
        self.num_windows = max(shard.num_tokens - 1, 0) // seq_len
        if self.num_windows < batch_size and shares is None:
            raise ValueError(
                f"the training split has {shard.num_tokens} tokens, fewer than one batch needs: {batch_size} sequences "
                f"of {seq_len} tokens and one token more; give more text or lower train.batch_tokens"
            )
        self._shard = shard
        self._batch_size = batch_size
        self._within = document_attention == "within"
        self._own = own_places(batch_size, micro_batch_size, rank, world_size)
        self._windows: _OneStream | _Mixture
        if shares is None:
            self._windows = _OneStream(seq_len, self.num_windows, seed)
        else:
            self._windows = _Mixture(shard, shares, seq_len=seq_len, seed=seed, replacement=replacement)

    def batch(self, step: int) -> TokenBatch:
        """This rank's part of batch `step`, counting from 0."""
        index = self._windows.positions(step, self._batch_size, self._own)  # (B, S+1)
        stream = torch.from_numpy(self._shard.tokens[index].astype(np.int64))
        ids = None
        if self._within:
            documents = np.searchsorted(self._shard.document_starts, index[:, :-1], side="right")
            ids = torch.from_numpy(documents.astype(np.int64))
        return TokenBatch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), None, ids)


def own_places(batch_size: int, micro_batch_size: int | None, rank: int, world_size: int) -> list[int]:
    """A rank's places in a batch: one contiguous run of sequences per micro-step."""
    if batch_size % world_size != 0:
        raise ValueError(
            f"the batch of {batch_size} sequences cannot be divided among {world_size} ranks; change train.batch_tokens"
        )
    local = batch_size // world_size
    micro = local if micro_batch_size is None else micro_batch_size
    if local % micro != 0:
        raise ValueError(
            f"a rank's {local} sequences of a batch ({batch_size} / {world_size} ranks) cannot be divided into "
            f"micro-batches of {micro}; change train.micro_batch_size or train.batch_tokens"
        )
    return [step * world_size * micro + rank * micro + i for step in range(local // micro) for i in range(micro)]


class _OneStream:
    """All text in shard order."""

    def __init__(self, seq_len: int, num_windows: int, seed: int) -> None:
        self._seq_len = seq_len
        self._num_windows = num_windows
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._draw_order)  # a batch may span two epochs

    def positions(self, step: int, batch_size: int, places: list[int]) -> np.ndarray:
        """Shard positions of the tokens of the windows at `places` of a batch; (len(places), S+1)."""
        windows = [self._window(step * batch_size + place) for place in places]
        return np.array(windows)[:, None] * self._seq_len + np.arange(self._seq_len + 1)

    def _window(self, place: int) -> int:
        epoch, index = divmod(place, self._num_windows)
        return int(self._order(epoch)[index])

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._num_windows)


class _Mixture:
    """Each domain as a stream of its documents, wherever they lie in the shard."""

    def __init__(
        self, shard: TokenShard, shares: Mapping[str, float], *, seq_len: int, seed: int, replacement: bool
    ) -> None:
        drawn = [domain for domain in shard.domains if shares.get(domain, 0.0) > 0.0]
        self._streams = [_DomainStream(shard, domain, seq_len) for domain in drawn]
        self._schedule = Schedule([shares[domain] for domain in drawn], seed)
        self._seed = seed
        self._replacement = replacement
        self._order = lru_cache(maxsize=2 * len(drawn))(self._draw_order)

    def positions(self, step: int, batch_size: int, places: list[int]) -> np.ndarray:
        """Shard positions of the tokens of the windows at `places` of a batch; (len(places), S+1)."""
        sources, numbers = self._schedule.draws(step * batch_size, batch_size)
        # the schedule is nearly periodic: unshuffled, a rank might read the same few domains in every batch
        mixed = np.random.default_rng([self._seed, _BATCH_ORDER, step]).permutation(batch_size)[places]
        return np.stack([self._positions(int(sources[i]), int(numbers[i])) for i in mixed])

    def _positions(self, source: int, number: int) -> np.ndarray:
        stream = self._streams[source]
        epoch, index = divmod(number, stream.num_windows)
        return stream.positions(int(self._order(source, epoch)[index]))

    def _draw_order(self, source: int, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self._seed, _WINDOW_ORDER, source, epoch])
        count = self._streams[source].num_windows
        return random.integers(count, size=count) if self._replacement else random.permutation(count)


_BATCH_ORDER, _WINDOW_ORDER = 0x62617463, 0x77696E64  # keep these uses of the seed apart


class _DomainStream:
    """The concatenated documents of one domain, in windows."""

    def __init__(self, shard: TokenShard, domain: str, seq_len: int) -> None:
        documents = shard.documents_of(domain)
        lengths = shard.document_lengths[documents]
        self._starts = shard.document_starts[documents]  # (N,) in the shard
        self._ends = np.cumsum(lengths)  # (N,) in the stream
        self._shift = self._starts - (self._ends - lengths)  # (N,) from stream to shard
        self._seq_len = seq_len
        num_tokens = int(lengths.sum())
        self.num_windows = max(num_tokens - 1, 0) // seq_len
        if self.num_windows == 0:
            raise ValueError(
                f"the domain {domain} has {num_tokens} training tokens, fewer than one sequence needs: {seq_len} and "
                f"one more; give more of its text, leave it out, or lower data.seq_len"
            )

    def positions(self, window: int) -> np.ndarray:
        """Shard positions of the tokens of a window; (S+1,)."""
        index = window * self._seq_len + np.arange(self._seq_len + 1)
        return index + self._shift[np.searchsorted(self._ends, index, side="right")]


class EvaluationWindows:
    """All documents of one domain of a held-out split, in non-overlapping windows; every token is predicted once.

    The first document is preceded by the separator. The last window is padded and masked. With `max_tokens`, reading
    stops after the first document that reaches it, so `num_bytes`, the UTF-8 length of the documents read, always
    matches the tokens.
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
        self.document_lengths: list[int] = shard.document_lengths[self._documents].tolist()  # predicted tokens of each

    def __iter__(self) -> Iterator[TokenBatch]:
        capacity = self._batch_size * self._seq_len
        stream = np.empty(0, dtype=np.int64)  # inputs not yet used, and one more token
        ids = np.empty(0, dtype=np.int64)  # document index of each token of `stream`
        for number, index in enumerate(self._documents):
            tokens = self._shard.document(int(index)).astype(np.int64)
            if number == 0:
                tokens = np.concatenate([tokens[-1:], tokens])  # the last token is the separator
            stream = np.concatenate([stream, tokens])
            ids = np.concatenate([ids, np.full(len(tokens), number)])
            while len(stream) > capacity:
                yield self._make(stream[: capacity + 1], ids[:capacity])
                stream, ids = stream[capacity:], ids[capacity:]
        if len(stream) > 1:
            yield self._make(stream, ids[:-1])

    def _make(self, stream: np.ndarray, ids: np.ndarray) -> TokenBatch:
        """A batch of all windows that `stream` fills, the last one padded."""
        count = len(stream) - 1
        rows = -(-count // self._seq_len)
        padding = rows * self._seq_len - count

        def window(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.pad(values, (0, padding))).view(rows, self._seq_len)

        mask = window(np.ones(count, dtype=bool)) if padding else None
        # padding is a document of its own, so it attends to no real token
        documents = window(ids + 1) if self._within else None
        return TokenBatch(window(stream[:-1]), window(stream[1:]), mask, documents)
