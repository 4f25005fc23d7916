"""From texts to token ids as the papers' models read them, with demonstrations in front (moe_lm.md 7.2, xglm.md 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from moe.evaluation.protocols.rules import common_prefix

RESERVED = 2  # positions that the papers' harness keeps free: what begins a text and one special token


class TextEncoder(Protocol):
    """What of a tokenizer is needed here."""

    @property
    def eos_id(self) -> int: ...

    @property
    def begin_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


class Prompt(NamedTuple):
    """A query with each of its candidates, ready to be scored."""

    sequences: list[list[int]]  # one per candidate: what begins a text, demonstrations, query
    num_shots: int  # demonstrations that found room
    cut: bool  # whether the query lost tokens on the left


def encode(tokenizer: TextEncoder, text: str) -> list[int]:
    """The tokens of each line that is not empty, the separator between them. None stands in front or at the end.

    The papers' training text ended each line in the separator, so their models have never seen a line break.
    """
    tokens: list[int] = []
    for line in text.split("\n"):  # not splitlines: some texts hold U+2028
        if line.strip():
            tokens += [*([tokenizer.eos_id] if tokens else []), *tokenizer.encode(line)]
    return tokens


def build_prompt(
    tokenizer: TextEncoder, queries: Sequence[Sequence[int]], demonstrations: Sequence[Sequence[int]], max_seq_len: int
) -> Prompt:
    """Demonstrations and query in at most `max_seq_len` positions, a separator behind each demonstration.

    In front stands `begin_id`: the separator, as in the papers, unless the tokenizer's makers put another token there.

    queries: the tokens of the query with each candidate. Demonstrations are added in their order until one does not
    fit; the later ones are left out even where they would. A query that alone is too long loses its first tokens, each
    candidate's text as many as the longest one has to; a candidate that is longer than the room keeps its last tokens.
    """
    room = max_seq_len - RESERVED
    if room < 1:
        raise ValueError(f"model.max_seq_len ({max_seq_len}) leaves no room: {RESERVED} positions are reserved")
    excess = max(map(len, queries)) - room
    if excess > 0:
        kept = _cut(queries, excess, room)
        return Prompt([[tokenizer.begin_id, *query] for query in kept], 0, True)
    room -= max(map(len, queries))
    front = [tokenizer.begin_id]
    num_shots = 0
    for demonstration in demonstrations:
        if len(demonstration) + 1 > room:
            break
        front += [*demonstration, tokenizer.eos_id]
        room -= len(demonstration) + 1
        num_shots += 1
    return Prompt([[*front, *query] for query in queries], num_shots, False)


def _cut(queries: Sequence[Sequence[int]], excess: int, room: int) -> list[Sequence[int]]:
    # no further than the common prefix for all: beyond it, only those that are too long themselves
    shared = min(excess, common_prefix(queries))
    return [query[max(shared, len(query) - room) :] for query in queries]


def draw_demonstrations(pool_size: int, num_shots: int, trial: int, *, own_row: bool) -> list[int]:
    """The rows, of `pool_size`, that a trial shows, without replacement, from NumPy's generator seeded by `trial`.

    own_row: the pool is what is evaluated, so one more is drawn, for a query that is among the others.
    Raises ValueError where there are too few.
    """
    wanted = num_shots + 1 if own_row else num_shots
    if wanted > pool_size:
        raise ValueError(
            f"num_shots ({num_shots}) needs {wanted} examples to show, and the demonstration split has {pool_size}"
        )
    return np.random.RandomState(trial).choice(pool_size, wanted, replace=False).tolist()


def shuffled(drawn: Sequence[int], num_shots: int, num_queries: int, *, own_row: bool) -> Iterator[list[int]]:
    """For each query the rows to show, in an order of its own, from one generator seeded by 0.

    own_row: leave the query's own row out.
    """
    generator = np.random.RandomState(0)
    for query in range(num_queries):
        order = generator.permutation(len(drawn))
        rows = [drawn[i] for i in order]
        if own_row:
            rows = [row for row in rows if row != query][:num_shots]
        yield rows
