"""One expert per thread: small matrix products beside each other, where threads inside each of them gain little.

Threads that share a product wait for each other at the end of each of E products, and a core that another process
uses meanwhile stops both. Here each thread has experts of its own, and every product runs on one thread: so its result
is bit for bit that of a program with one thread. On two threads of a busy machine (512 experts, D=128, F=512, 4,096
rows) the three kinds of product took 22, 23 and 20 ms instead of 90, 41 and 24, the fastest calls of both compared;
with 64 experts of 64 rows (D=256, F=1024) 34, 37 and 29 instead of 344, 168 and 157. Where each takes below 2 ms in
all, both ways are level when nothing else runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from .backend import is_watched

Span = tuple[int, int, int]  # expert, first row, end row

FEWEST_EXPERTS = 16  # with rows: fewer cannot be shared out evenly
MOST_ROWS = 256  # of an expert in the mean: from 512 on a product keeps two threads as busy by itself
PARTS_PER_THREAD = 4  # so that a thread which another process interrupts gets fewer experts
_ROWS_OF_A_MATRIX = 16  # what reading a matrix costs, in rows

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}  # by process, which a fork changes, and number of threads


def wins(spans: Sequence[Span]) -> bool:
    """Whether an expert per thread is the faster way on a CPU: more threads than one, many experts and an even load."""
    num_threads = torch.get_num_threads()
    if num_threads < 2 or len(spans) < FEWEST_EXPERTS or is_watched():  # who watches is in one thread alone
        return False
    loads = [end - start for _, start, end in spans]
    num_rows = sum(loads)
    # the thread that has the busiest expert would be waited for if that is more than a thread's share
    return num_rows <= MOST_ROWS * len(spans) and max(loads) * num_threads <= num_rows


def over_experts(work: Callable[[Sequence[Span]], None], spans: Sequence[Span]) -> None:
    """Call `work` with parts of `spans`, in order, on as many threads as torch has; return when all are done.

    `work` may only write what belongs to its spans. It runs without autograd, with one thread for each operation, and
    in inference mode where the caller is. What it raises is raised here. The threads are made at the first call and
    kept; a forked process makes its own.
    """
    inference = torch.is_inference_mode_enabled()

    def run(part: Sequence[Span]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(part)

    num_threads = torch.get_num_threads()
    # map() cancels what has not begun when a part fails, and leaves none running: the results are all asked for
    futures = [_pool(num_threads).submit(run, part) for part in split(spans, PARTS_PER_THREAD * num_threads)]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise errors[0]


def split(spans: Sequence[Span], num_parts: int) -> list[Sequence[Span]]:
    """Neighbouring spans in at most `num_parts` parts of about equal work, none of them empty."""
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
    if pool is None:  # no lock: one that is held while another thread forks would stay held in the child
        made = _start(num_threads)
        pool = _pools.setdefault(key, made)
        if pool is not made:
            made.shutdown()
    return pool


def _become_single() -> None:
    """One thread for each operation of this thread."""
    torch.get_num_threads()  # a thread's first use of its count would overwrite it with the program's
    torch.set_num_threads(1)


def _start(num_threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(num_threads, "experts", initializer=_become_single)
    everyone = threading.Barrier(num_threads)
    for each in [pool.submit(everyone.wait) for _ in range(num_threads)]:
        each.result()
    # the count is each thread's own, but torch gives the last one that was set to threads that start later
    torch.set_num_threads(num_threads)
    return pool
