"""Texts to token ids as the papers' models read them, preceded by demonstrations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from moe.evaluation.protocols.rules import common_prefix

RESERVED = 2  # positions the papers' harness keeps free: the beginning token and one special token


class TextEncoder(Protocol):
    """The part of a tokenizer that is needed here."""

    @property
    def eos_id(self) -> int: ...

    @property
    def begin_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


class Prompt(NamedTuple):
    """A query with each of its candidates, ready to score."""

    sequences: list[list[int]]  # one per candidate: beginning token, demonstrations, query
    num_shots: int  # demonstrations that fit
    cut: bool  # whether the query lost tokens on the left


def encode(tokenizer: TextEncoder, text: str) -> list[int]:
    """The tokens of each non-empty line, joined by the separator, with none at the beginning or end.

    The papers' training text ended each line with the separator, so their models never saw a line break.
    """
    tokens: list[int] = []
    for line in text.split("\n"):  # splitlines() would also split at U+2028, which some texts contain
        if line.strip():
            tokens += [*([tokenizer.eos_id] if tokens else []), *tokenizer.encode(line)]
    return tokens


def build_prompt(
    tokenizer: TextEncoder, queries: Sequence[Sequence[int]], demonstrations: Sequence[Sequence[int]], max_seq_len: int
) -> Prompt:
    """Fit demonstrations and query into `max_seq_len` positions, with a separator after each demonstration.

    The sequence starts with `begin_id`: the separator, as in the papers, unless the tokenizer's makers chose another
    token.

    queries: the tokens of the query with each candidate. Demonstrations are added in order until one does not fit;
    later ones are left out even if they would fit. A query too long on its own loses its first tokens, in every
    candidate's sequence as many as in the longest; a candidate that alone exceeds the room keeps its last tokens.
    """
    room = max_seq_len - RESERVED
    if room < 1:
        raise ValueError(
            f"model.max_seq_len ({max_seq_len}) leaves no room for a prompt: it must be above the {RESERVED} positions "
            f"that are reserved"
        )
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
    # cut all sequences only within their common prefix; beyond it, only those that are still too long
    shared = min(excess, common_prefix(queries))
    return [query[max(shared, len(query) - room) :] for query in queries]


def draw_demonstrations(pool_size: int, num_shots: int, trial: int, *, own_row: bool) -> list[int]:
    """Draw the rows of the pool that a trial shows, without replacement, from NumPy's generator seeded by `trial`.

    own_row: the pool contains the questions, so one more is drawn in case a question is among its own demonstrations.
    Raises ValueError if the pool is too small.
    """
    wanted = num_shots + 1 if own_row else num_shots
    if wanted > pool_size:
        raise ValueError(
            f"num_shots ({num_shots}) needs {wanted} examples to show, and the demonstration split has {pool_size}: "
            f"lower it"
        )
    return np.random.RandomState(trial).choice(pool_size, wanted, replace=False).tolist()


def shuffled(drawn: Sequence[int], num_shots: int, num_queries: int, *, own_row: bool) -> Iterator[list[int]]:
    """For each query yield the rows to show, in an order of its own, from one generator seeded by 0.

    own_row: leave out the query's own row.
    """
    generator = np.random.RandomState(0)
    for query in range(num_queries):
        order = generator.permutation(len(drawn))
        rows = [drawn[i] for i in order]
        if own_row:
            rows = [row for row in rows if row != query][:num_shots]
        yield rows
