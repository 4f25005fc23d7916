"""Real processes for tests of what several ranks do together: gloo, one thread each, results brought home."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe.distributed.world import World, end_process

TIMEOUT_SECONDS = 60.0


def run_ranks(program: Callable[..., Any], num_ranks: int, *arguments: Any, start_method: str = "spawn") -> list[Any]:
    """program(world, *arguments) on each of `num_ranks` processes; what each returned, in rank order.

    `program` must be a function of a module, so that a fresh process can import it. An exception of a rank is raised
    here, with its traceback, and ends the others. start_method: of multiprocessing.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (num_ranks, folder, program, arguments), num_ranks, start_method=start_method)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def _rank(rank: int, num_ranks: int, folder: str, program: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # FSDP2 says at every view that it must not be changed in place, and nothing here does
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    store = dist.FileStore(f"{folder}/store", num_ranks)
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    world = World(rank, num_ranks, torch.device("cpu"), dist.group.WORLD, TIMEOUT_SECONDS)
    torch.save(program(world, *arguments), f"{folder}/{rank}.pt")
    world.close()
    end_process()
