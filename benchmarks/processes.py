"""Processes that measure together: those of `tests.ranks`, forked from one that has already loaded torch."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from tests import ranks

LOADED = ["benchmarks.bench_all_to_all", "benchmarks.bench_weak_scaling"]  # once, instead of once per process


def run_ranks(program: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """Run program(world, *arguments) on `num_ranks` single-threaded gloo processes; return the results by rank.

    The first call starts a process that loads LOADED, of which all ranks are forks: it computes nothing itself, so it
    has no threads that a fork would lose.
    """
    multiprocessing.set_forkserver_preload(LOADED)
    return ranks.run_ranks(program, num_ranks, *arguments, start_method="forkserver")
