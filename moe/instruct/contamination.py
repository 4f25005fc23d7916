"""How much of each evaluation task is contained in each training task: 13-gram overlap of all pairs (Iyer et al. 2022).

Words are lower-cased runs of letters and digits. An evaluation example overlaps with a training task if any 13
consecutive words of its text or of one of its targets occur in a training record, instruction included.

Prompts of different tasks share template words without sharing data. So whatever many records of one template have in
common (any 4 consecutive words) is wording, and 13 words count only if none of them is wording. Data of fewer than 13
words cannot overlap; the number of such examples is reported.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.instruct.records import Record

NGRAM = 13
# WORDING_NGRAM consecutive words are wording if at least this many of a template's records, and this share, have them
WORDING_NGRAM = 4
WORDING_RECORDS = 10
WORDING_SHARE = 0.4  # a template with an `if` puts half of its records under each of two wordings
_BATCH_RECORDS = 512
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_WORDS = re.compile(r"\w+")

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]


class Overlap(NamedTuple):
    """One training task's overlap with one evaluation task."""

    train: str
    evaluation: str
    examples: int  # raw examples of the evaluation task that overlap
    of: int  # all of its raw examples
    words: str  # a shared 13-gram

    @property
    def share(self) -> float:
        return self.examples / self.of


class EvaluationCoverage(NamedTuple):
    """What the filter can see of an evaluation task."""

    examples: int
    too_short: int  # without any 13 consecutive words of data
    wording: int  # distinct 4-grams treated as wording


class OverlapFilter:
    """The 13-grams of all evaluation tasks; training tasks are streamed past it one by one.

    Memory: about 40 bytes per 13-gram of the evaluation text, plus the vocabulary. Hashes have 64 bits: for 1e8
    distinct 13-grams against 1e7, one false match is expected in 20,000 builds.
    """

    def __init__(self, evaluation: Iterable[tuple[str, Iterable[Record]]]) -> None:
        """`evaluation` yields each task's name and its records, which are read once."""
        self._words = _WordHashes()
        self.coverage: dict[str, EvaluationCoverage] = {}
        self._tasks: list[str] = []
        self._task_of_example: list[int] = []
        pairs = [self._index(name, records) for name, records in evaluation]
        hashes = np.concatenate([p[0] for p in pairs]) if pairs else np.empty(0, np.uint64)
        owners = np.concatenate([p[1] for p in pairs]) if pairs else np.empty(0, np.int64)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._starts = np.unique(hashes[order], return_index=True)  # (U,) distinct 13-grams
        self._starts = np.append(self._starts, len(hashes))
        self._owners = owners[order]  # examples containing the 13-gram u: owners[starts[u] : starts[u + 1]]

    def overlaps(self, train: str, records: Iterable[Record]) -> list[Overlap]:
        """The evaluation tasks that share any 13-gram with a training task, largest share first."""
        found: dict[int, str] = {}  # index into self._hashes -> the words
        for batch in _batches(records):
            segments = [
                _words(text) for record in batch for text in (record.instruction, record.input, *record.targets)
            ]
            hashes, where, _ = self._words.windows(segments, NGRAM)
            if not len(hashes) or not len(self._hashes):
                continue
            places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
            flat = [word for segment in segments for word in segment]
            for i in np.flatnonzero(self._hashes[places] == hashes):
                if places[i] not in found:
                    found[int(places[i])] = " ".join(flat[where[i] : where[i] + NGRAM])
        examples: dict[int, str] = {}
        for place, words in found.items():
            for owner in self._owners[self._starts[place] : self._starts[place + 1]]:
                examples.setdefault(int(owner), words)
        counts: dict[int, list[str]] = {}
        for owner, words in examples.items():
            counts.setdefault(self._task_of_example[owner], []).append(words)
        pairs = [
            Overlap(train, self._tasks[task], len(words), self.coverage[self._tasks[task]].examples, words[0])
            for task, words in counts.items()
        ]
        return sorted(pairs, key=lambda pair: (-pair.share, pair.evaluation))

    def _index(self, name: str, records: Iterable[Record]) -> tuple[Hashes, Indices]:
        """The distinct (13-gram, example) pairs of an evaluation task, excluding wording."""
        first, task = len(self._task_of_example), len(self._tasks)
        self._tasks.append(name)
        numbers: dict[str, int] = {}
        templates: dict[str, _Texts] = {}
        for record in records:
            number = numbers.setdefault(record.example or f"record {len(numbers)}", len(numbers))
            templates.setdefault(record.template, _Texts()).add(number, (record.body, *record.targets))
        self._task_of_example += [task] * len(numbers)
        kept, wording = [np.empty((0, 2), np.uint64)], 0
        for texts in templates.values():
            pairs, common = texts.data_windows(self._words)
            kept.append(pairs)
            wording += common
        pairs = _different(np.concatenate(kept))
        self.coverage[name] = EvaluationCoverage(len(numbers), len(numbers) - len(np.unique(pairs[:, 1])), wording)
        return pairs[:, 0], pairs[:, 1].astype(np.int64) + first


class _Texts:
    """The texts of all records of one template, as words."""

    def __init__(self) -> None:
        self._records = 0
        self._segments: list[list[str]] = []
        self._record: list[int] = []  # per segment
        self._example: list[int] = []

    def add(self, example: int, texts: Iterable[str]) -> None:
        for text in texts:
            self._segments.append(_words(text))
            self._record.append(self._records)
            self._example.append(example)
        self._records += 1

    def data_windows(self, words: _WordHashes) -> tuple[NDArray[np.uint64], int]:
        """(13-gram, example) pairs (N, 2) that contain no wording, and the number of distinct wording 4-grams."""
        short, place, segment = words.windows(self._segments, WORDING_NGRAM)
        pairs = _different(np.stack([short, np.array(self._record, np.uint64)[segment]], axis=1))
        different, counts = np.unique(pairs[:, 0], return_counts=True)
        common = different[(counts >= WORDING_RECORDS) & (counts > WORDING_SHARE * self._records)]
        is_wording = np.zeros(sum(map(len, self._segments)) + 1, np.int64)  # shifted by one: an empty sum is 0
        for offset in range(WORDING_NGRAM):
            is_wording[place[np.isin(short, common)] + offset + 1] = 1
        before = np.cumsum(is_wording)
        hashes, place, segment = words.windows(self._segments, NGRAM)
        data = before[place + NGRAM] == before[place]
        return np.stack([hashes, np.array(self._example, np.uint64)[segment]], axis=1)[data], len(common)


class _WordHashes:
    """Memoised 64-bit word hashes, and hashes over windows of words."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def windows(self, segments: list[list[str]], size: int) -> tuple[Hashes, Indices, Indices]:
        """Hash, first word and segment of every window of `size` words within one segment: (N,) each."""
        known = self._known
        for segment in segments:
            for word in segment:
                if word not in known:
                    digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
                    known[word] = int.from_bytes(digest, "big")
        words = np.array([known[word] for segment in segments for word in segment], np.uint64)
        owner = np.repeat(np.arange(len(segments)), [len(segment) for segment in segments])
        count = len(words) - size + 1
        if count < 1:
            return np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64)
        hashes = np.zeros(count, np.uint64)
        for offset in range(size):  # Horner's scheme modulo 2^64
            hashes = hashes * _MULTIPLIER + words[offset : offset + count]
        inside = np.flatnonzero(owner[:count] == owner[size - 1 :])
        return hashes[inside], inside, owner[:count][inside]


def _different(pairs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The distinct rows of (N, 2). np.unique(axis=0) does the same, ten times slower."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return pairs[np.append(True, (pairs[1:] != pairs[:-1]).any(axis=1))] if len(pairs) else pairs


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    iterator = iter(records)
    while batch := list(islice(iterator, _BATCH_RECORDS)):
        yield batch
