"""Draws a fixed number of records from a stream, independent of its order and length."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection

from moe.instruct.records import Record


class Sample:
    """Keeps the `limit` records that the seed ranks first, and no others in memory.

    A record's rank depends only on the seed and its content, so the same records are drawn whatever the order of the
    files, and a smaller limit draws a subset of a larger one's.
    """

    def __init__(self, limit: int | None, seed: int, *, by_template: bool = False) -> None:
        """`limit` None keeps all; `by_template` applies it per template, so that templates can be dropped later."""
        self._seen: dict[str, int] = {}
        self._limit = limit
        self._seed = seed
        self._by_template = by_template
        self._heaps: dict[str, list[tuple[int, int, Record]]] = {}  # the last-ranked record kept is on top
        self._examples: set[int] = set()

    @property
    def examples(self) -> int:
        """Raw examples seen: prompted versions of one count once."""
        return len(self._examples)

    def add(self, record: Record) -> None:
        number = self.seen()
        self._seen[record.template] = self._seen.get(record.template, 0) + 1
        self._examples.add(_hash(record.example or str(number)))
        place = _hash(f"{self._seed}\0{record.task}\0{record.template}\0{record.example}\0{record.input}")
        item = (-place, -number, record)
        heap = self._heaps.setdefault(record.template if self._by_template else "", [])
        if self._limit is None or len(heap) < self._limit:
            heapq.heappush(heap, item)
        elif item > heap[0]:
            heapq.heapreplace(heap, item)

    def seen(self, without: Collection[str] = ()) -> int:
        """Records added, not counting those of the templates in `without`."""
        return sum(count for template, count in self._seen.items() if template not in without)

    def drawn(self, limit: int | None = None, without: Collection[str] = ()) -> list[Record]:
        """The records kept, in order of rank: at most `limit`, none of the templates in `without`."""
        limit = self._limit if limit is None else limit
        items = [item for heap in self._heaps.values() for item in heap if item[2].template not in without]
        return [record for _, _, record in sorted(items, reverse=True)][:limit]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
