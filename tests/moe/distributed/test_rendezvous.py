"""Ranks agree on an attempt over a store that an earlier attempt has written to."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from moe.distributed.rendezvous import agree_on_attempt

RANKS = 3


def join(store: dist.Store, late: dict[int, float], size: int = RANKS, timeout: float = 20.0) -> list[dist.Store]:
    """All ranks, each in a thread, some of them `late` seconds after the others."""

    def one(rank: int) -> dist.Store:
        time.sleep(late.get(rank, 0.0))
        return agree_on_attempt(store, rank, RANKS, timeout)

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(one, range(size)))


@pytest.mark.parametrize("late", [{}, {0: 0.2}, {2: 0.2}, {1: 0.1, 2: 0.3}], ids=str)
def test_an_earlier_attempt_is_never_joined(late: dict[int, float]) -> None:
    """The dead of the first attempt have left everything: their names, a welcome, answers and the word to go."""
    store = dist.HashStore()
    first = join(store, {})
    first[1].set("address", "of a process that has died")
    second = join(store, late)
    assert not any(found.check(["address"]) for found in second)
    second[2].set("address", "alive")
    assert [found.get("address") for found in second] == [b"alive"] * RANKS
    assert first[0].get("address") == b"of a process that has died"


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(ValueError, match=r"rank 2 did not come before the timeout"):
        join(dist.HashStore(), {}, size=2, timeout=0.5)


def test_a_welcome_without_ones_own_name_is_not_ones_own() -> None:
    store = dist.HashStore()
    store.set("moe/welcome", json.dumps(["old", ["a", "b", "c"]]))
    store.set("moe/go", "old")
    with pytest.raises(ValueError, match="rank 0, or one that it waits for"):
        agree_on_attempt(store, 1, RANKS, 0.3)
