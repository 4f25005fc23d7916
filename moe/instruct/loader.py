"""Batches of packed examples and sequences of text. A batch is a function of (seed, step), as in pretraining."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from moe.data.loader import TokenBatch, TrainLoader, own_places
from moe.data.sampling import Schedule
from moe.instruct.examples import ExampleStore
from moe.instruct.mixing import ExampleDraws, Sampled, sampled_shares
from moe.instruct.packing import Packer, lay_out

_BATCH_ORDER = 0x74756E65  # keeps this use of the seed apart from others
_POOL_SEQUENCES = 256  # examples worth this many sequences are packed together


class PackingReport(NamedTuple):
    """What some steps read."""

    sequences: int
    used: float  # share of all positions that hold a token
    counted: float  # share of all positions whose loss counts
    examples: int
    examples_per_sequence: float  # over the sequences that are not text
    text_sequences: int
    text_counted: float  # share of all counted tokens that are text
    benchmarks: list[Sampled]
    tasks: list[Sampled]


class InstructionLoader:
    """Fixed-length sequences, each of whole examples or, for `text_share` of them, a window of text.

    Tasks are drawn with `shares`; every batch holds nearly its share of text sequences, in random order. Ranks read
    parts of one global batch, divided as in `TrainLoader`. text: with batch_size 1; its windows are read in its own
    order, once per epoch.
    """

    def __init__(
        self,
        store: ExampleStore,
        shares: list[float],
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        text: TrainLoader | None = None,
        text_share: float = 0.0,
        micro_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if (text is None) != (text_share == 0.0):
            raise ValueError(f"text_share ({text_share}) must be above 0 with `text`, and 0 without it")
        self.store = store
        self.shares = shares
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._text = text
        self._own = own_places(batch_size, micro_batch_size, rank, world_size)
        self._schedule = Schedule([1.0 - text_share, text_share] if text is not None else [1.0], seed)
        mean = float(np.dot(shares, _mean_positions(store)))
        pool = max(64, round(_POOL_SEQUENCES * seq_len / max(mean, 1.0)))
        draws = ExampleDraws(store.bounds, shares, seed)
        self._packer = Packer(draws.draw, store.positions, seq_len=seq_len, pool=pool, seed=seed)

    def batch(self, step: int) -> TokenBatch:
        """This rank's part of batch `step`, counting from 0."""
        kinds, numbers = self._places(step)
        packed = [self._packer.sequence(int(numbers[i])) for i in self._own if kinds[i] == 0]
        rows = lay_out(self.store, packed, self._seq_len).batch()
        if self._text is None:
            return rows
        windows = [_whole_window(self._text.batch(int(numbers[i]))) for i in self._own if kinds[i] == 1]
        # back to batch order
        order = np.argsort(np.argsort([kinds[i] for i in self._own], kind="stable"), kind="stable")
        parts = [rows, *windows]
        fields = [torch.cat([field for part in parts if (field := part[n]) is not None]) for n in range(len(rows))]
        return TokenBatch(*(field[torch.from_numpy(order)] for field in fields))

    def report(self, num_steps: int) -> PackingReport:
        """What the first `num_steps` batches hold, over all ranks, computed from lengths alone."""
        tasks = self.store.tasks
        counts, positions, targets = (np.zeros(len(tasks)) for _ in range(3))
        num_text = 0
        for step in range(num_steps):
            kinds, numbers = self._places(step)
            num_text += int((kinds == 1).sum())
            read = [i for n in numbers[kinds == 0] for i in self._packer.sequence(int(n))]
            of = self.store.task_of[read]
            counts += np.bincount(of, minlength=len(tasks))
            positions += np.bincount(of, self.store.positions[read], minlength=len(tasks))
            targets += np.bincount(of, self.store.num_counted[read], minlength=len(tasks))
        sequences = num_steps * self._batch_size
        whole = num_text * self._seq_len
        return PackingReport(
            sequences=sequences,
            used=float(positions.sum() + whole) / (sequences * self._seq_len),
            counted=float(targets.sum() + whole) / (sequences * self._seq_len),
            examples=int(counts.sum()),
            examples_per_sequence=float(counts.sum()) / max(1, sequences - num_text),
            text_sequences=num_text,
            text_counted=whole / max(1.0, float(targets.sum()) + whole),
            benchmarks=sampled_shares([t.benchmark for t in tasks], self.shares, counts, positions, targets),
            tasks=sampled_shares([t.name for t in tasks], self.shares, counts, positions, targets),
        )

    def _places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place in a batch: 0 for examples, 1 for text, and the number within that kind; (batch_size,)."""
        kinds, numbers = self._schedule.draws(step * self._batch_size, self._batch_size)
        mixed = np.random.default_rng([self._seed, _BATCH_ORDER, step]).permutation(self._batch_size)
        return kinds[mixed], numbers[mixed]


def _mean_positions(store: ExampleStore) -> np.ndarray:
    """Mean over each task's examples, 0 for a task without any; (number of tasks,)."""
    totals = np.bincount(store.task_of, store.positions, minlength=len(store.tasks))
    return totals / np.maximum(store.sizes, 1)


def _whole_window(text: TokenBatch) -> TokenBatch:
    """A window of text in the form of packed examples: every position counts."""
    every = torch.ones_like(text.tokens, dtype=torch.bool)
    ids = torch.ones_like(text.tokens) if text.document_ids is None else text.document_ids
    return TokenBatch(text.tokens, text.targets, every, ids, every)
