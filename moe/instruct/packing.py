"""Packs several whole examples into one sequence, and lays out what the model reads (Iyer et al. 2022).

An example never spans two sequences. It attends only to itself and its positions start at 0: `document_ids` encode this
as a block-triangular attention mask. Its last token is predicted but not read, so no example is predicted from the one
before it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from moe.data.loader import TokenBatch
from moe.instruct.examples import ExampleStore

FULL = 0.95  # a sequence filled less may wait for the next pool's examples
_CARRIED = 8  # at most one in this many sequences waits
_PACKING = 0x7061636B  # keeps this use of the seed apart from others


def best_fit(positions: Sequence[int], seq_len: int) -> list[list[int]]:
    """Group example indices into sequences of at most `seq_len` positions: longest first, each into the tightest fit.

    Best-fit decreasing needs at most 11/9 of the minimum number of sequences, and far less with hundreds of examples.
    Raises ValueError for an example longer than a sequence.
    """
    order = sorted(range(len(positions)), key=lambda i: (-positions[i], i))
    sequences: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # sequences by remaining positions
    rooms = 0  # bit r: by_room[r] is not empty. Shifting finds the tightest fit in a few machine words
    for i in order:
        length = positions[i]
        if length > seq_len:
            raise ValueError(f"an example takes {length} positions, but a sequence has {seq_len}: cut it first")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = seq_len, len(sequences)
            sequences.append([])
        sequences[number].append(i)
        by_room[room - length].append(number)
        rooms |= 1 << (room - length)
    return sequences


class Packer:
    """An endless list of packed sequences, a function of the seed and of the examples that `draw` returns.

    draw: (first, count) -> the examples at these places of an endless list, (count,). Examples are packed pool by pool.
    Sequences that stay much emptier than others are broken up and packed with the next pool. So sequence n needs all
    earlier pools: they are packed on first access, a million examples in seconds.
    """

    def __init__(
        self, draw: Callable[[int, int], np.ndarray], positions: np.ndarray, *, seq_len: int, pool: int, seed: int
    ) -> None:
        self._draw = draw
        self._positions = positions
        self._seq_len = seq_len
        self._pool = pool
        self._seed = seed
        # concatenated examples of all sequences, and where each begins: a list of lists takes five times the memory
        self._examples = array("q")
        self._starts = array("q", [0])
        self._carried: list[int] = []
        self._num_pools = 0

    def sequence(self, number: int) -> list[int]:
        """The examples of a sequence, in order."""
        while number >= len(self._starts) - 1:
            self._pack()
        return self._examples[self._starts[number] : self._starts[number + 1]].tolist()

    def _pack(self) -> None:
        drawn = self._draw(self._num_pools * self._pool, self._pool).tolist()
        examples = [*self._carried, *drawn]
        lengths = self._positions[examples].tolist()
        packed = best_fit(lengths, self._seq_len)
        filled = [sum(lengths[i] for i in sequence) for sequence in packed]
        emptiest = sorted(range(len(packed)), key=lambda n: (filled[n], n))[: len(packed) // _CARRIED]
        waiting = {n for n in emptiest if filled[n] < FULL * self._seq_len}
        self._carried = [examples[i] for n in sorted(waiting) for i in packed[n]]
        kept = [sequence for n, sequence in enumerate(packed) if n not in waiting]
        # best-fit puts the longest examples first: shuffle sequences, and the examples within them
        random = np.random.default_rng([self._seed, _PACKING, self._num_pools])
        for n in random.permutation(len(kept)).tolist():
            order = random.permutation(len(kept[n])).tolist()
            self._examples.extend(examples[kept[n][i]] for i in order)
            self._starts.append(len(self._examples))
        self._num_pools += 1


class PackedRows(NamedTuple):
    """Sequences before they become a batch. All (B, S)."""

    tokens: np.ndarray
    targets: np.ndarray
    token_mask: np.ndarray  # bool, False for padding
    document_ids: np.ndarray  # counting from 1 in each sequence; padding is 0
    loss_mask: np.ndarray  # bool
    examples: np.ndarray  # index of the example; -1 for padding

    def batch(self) -> TokenBatch:
        return TokenBatch(*(torch.from_numpy(field) for field in self[:5]))


def lay_out(store: ExampleStore, sequences: Sequence[Sequence[int]], seq_len: int) -> PackedRows:
    """Concatenate the examples of each sequence, padded on the right with token 0."""
    shape = (len(sequences), seq_len)
    rows = PackedRows(
        tokens=np.zeros(shape, dtype=np.int64),
        targets=np.zeros(shape, dtype=np.int64),
        token_mask=np.zeros(shape, dtype=bool),
        document_ids=np.zeros(shape, dtype=np.int64),
        loss_mask=np.zeros(shape, dtype=bool),
        examples=np.full(shape, -1, dtype=np.int64),
    )
    for row, sequence in enumerate(sequences):
        begin = 0
        for number, example in enumerate(sequence, start=1):
            tokens = store.tokens(example)
            end = begin + len(tokens) - 1
            rows.tokens[row, begin:end] = tokens[:-1]
            rows.targets[row, begin:end] = tokens[1:]
            rows.token_mask[row, begin:end] = True
            rows.document_ids[row, begin:end] = number
            # position p predicts token p + 1
            rows.loss_mask[row, begin + max(0, int(store.first_counted[example]) - 1) : end] = True
            rows.examples[row, begin:end] = example
            begin = end
    return rows
