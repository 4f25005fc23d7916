"""Processes that measure together: those of `tests.ranks`, forked from one that has torch loaded already."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from tests import ranks

LOADED = ["benchmarks.bench_all_to_all", "benchmarks.bench_weak_scaling"]  # once, in place of once for each process


def run_ranks(program: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """program(world, *arguments) on each of `num_ranks` gloo processes of one thread; what each returned, by rank.

    The first call starts a process that loads LOADED, and all ranks are forks of it: it computes nothing itself, so it
    has no threads that a fork would lose.
    """
    multiprocessing.set_forkserver_preload(LOADED)
    return ranks.run_ranks(program, num_ranks, *arguments, start_method="forkserver")
