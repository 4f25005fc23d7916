"""One expert per thread: small matrix products run side by side where threads inside each of them gain little.

Threads that share a product wait for each other at the end of each of E products, and a core that another process
takes meanwhile stalls them all. Here each thread has its own experts and every product runs on one thread, so its
result is bit for bit that of a single-threaded program. On two threads of a busy machine (512 experts, D=128, F=512,
4,096 rows) the three kinds of product took 22, 23 and 20 ms instead of 90, 41 and 24, comparing the fastest calls;
with 64 experts of 64 rows (D=256, F=1024) 34, 37 and 29 instead of 344, 168 and 157. Where each takes less than 2 ms
in total, both ways are equally fast on an otherwise idle machine.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from .backend import is_watched

Span = tuple[int, int, int]  # expert, first row, end row

FEWEST_EXPERTS = 16  # with rows: fewer cannot be divided evenly
MOST_ROWS = 256  # per expert on average: from 512 on, one product keeps two threads as busy by itself
PARTS_PER_THREAD = 4  # so that a thread interrupted by another process gets fewer experts
_ROWS_OF_A_MATRIX = 16  # the cost of reading a matrix, in rows

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}  # by process id, which a fork changes, and number of threads


def wins(spans: Sequence[Span]) -> bool:
    """Whether one expert per thread is faster on a CPU: with several threads, many experts and an even load."""
    num_threads = torch.get_num_threads()
    if num_threads < 2 or len(spans) < FEWEST_EXPERTS or is_watched():  # a watcher sees only its own thread
        return False
    loads = [end - start for _, start, end in spans]
    num_rows = sum(loads)
    # all would wait for the thread with the busiest expert if that expert exceeds one thread's share
    return num_rows <= MOST_ROWS * len(spans) and max(loads) * num_threads <= num_rows


def over_experts(work: Callable[[Sequence[Span]], None], spans: Sequence[Span]) -> None:
    """Call `work` with parts of `spans`, in order, on as many threads as torch has; return when all are done.

    `work` may write only what belongs to its spans. It runs without autograd, with one thread per operation, and in
    inference mode if the caller does. Its exceptions are raised here. The threads are started at the first call and
    kept; a forked process starts its own.
    """
    inference = torch.is_inference_mode_enabled()

    def run(part: Sequence[Span]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(part)

    num_threads = torch.get_num_threads()
    # not map(), which does not wait for running parts when one fails: asking for every result leaves none running
    futures = [_pool(num_threads).submit(run, part) for part in split(spans, PARTS_PER_THREAD * num_threads)]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise errors[0]


def split(spans: Sequence[Span], num_parts: int) -> list[Sequence[Span]]:
    """Consecutive spans in at most `num_parts` parts of about equal work, none of them empty."""
    costs = [end - start + _ROWS_OF_A_MATRIX for _, start, end in spans]
    share = sum(costs) / num_parts
    parts: list[Sequence[Span]] = []
    first, done = 0, 0.0
    for index, cost in enumerate(costs, 1):
        done += cost
        if done >= share * (len(parts) + 1) or index == len(spans):
            parts.append(spans[first:index])
            first = index
    return parts


def _pool(num_threads: int) -> ThreadPoolExecutor:
    key = (os.getpid(), num_threads)
    pool = _pools.get(key)
    if pool is None:  # no lock: if held while another thread forks, it would stay held in the child
        made = _start(num_threads)
        pool = _pools.setdefault(key, made)
        if pool is not made:
            made.shutdown()
    return pool


def _become_single() -> None:
    """Let operations of this thread use one thread each."""
    torch.get_num_threads()  # first, since a thread's first use of its count overwrites it with the program's
    torch.set_num_threads(1)


def _start(num_threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(num_threads, "experts", initializer=_become_single)
    everyone = threading.Barrier(num_threads)
    for each in [pool.submit(everyone.wait) for _ in range(num_threads)]:
        each.result()
    # the count is per thread, but threads that start later inherit the last one set
    torch.set_num_threads(num_threads)
    return pool
