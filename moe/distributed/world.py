"""The processes of a run: which one this is, and the few messages they exchange outside of the model."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe.distributed.rendezvous import agree_on_attempt

T = TypeVar("T")

# keys by which rank 0 tells the others, through their shared store, which ranks are missing
_ABSENT, _HEARD = "moe/absent", "moe/absent_heard"
_TELL_SECONDS = 5.0


class World(NamedTuple):
    """This process among those of a run. With only one, `group` is None and every exchange is the identity."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None
    timeout_seconds: float
    local_rank: int = 0  # among the processes of this machine

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, bit-identical on each. A new tensor unless there is only one rank."""
        if self.group is None:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each rank, in rank order; shapes must agree."""
        if self.group is None:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

    def from_first(self, value: Any) -> Any:
        """Rank 0's `value`, a plain Python value."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group, device=self.device)
        return box[0]

    def same_as_first(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` with rank 0's, of the same shape and dtype, and return it."""
        if self.group is not None:
            dist.broadcast(tensor, src=0, group=self.group)
        return tensor

    def on_first(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, a plain value; an error there is raised on every rank."""
        if self.group is None:
            return function()
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.rank == 0:
            outcome = _attempt(function)
        value, failure = self.from_first(outcome)
        if failure is not None:
            raise failure
        result: T = value
        return result

    def first_here_first(self, function: Callable[[], T]) -> T:
        """Run `function` on the first process of every machine, then on the others: its files are made once.

        An error in the first process of a machine is raised on every rank, so that none waits in vain.
        """
        if self.group is None:
            return function()
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.local_rank == 0:
            outcome = _attempt(function)
        self.meet()
        failures: list[Exception | None] = [None] * self.size
        dist.all_gather_object(failures, outcome[1], group=self.group)
        for failure in failures:
            if failure is not None:
                raise failure
        if self.local_rank > 0:
            return function()
        result: Any = outcome[0]
        return result

    def meet(self) -> None:
        """Wait for all ranks. On CPUs, after the timeout, each raises a TimeoutError that names the missing ranks.

        NCCL's own watchdog ends a rank that waits in vain; TORCH_FR_BUFFER_SIZE and TORCH_NCCL_DUMP_ON_TIMEOUT make its
        flight recorder say in which collective (docs/distributed.md).
        """
        if self.group is None:
            return
        if self.device.type != "cpu":
            dist.barrier(self.group, device_ids=[self.device.index])
            return
        try:
            dist.monitored_barrier(self.group, timeout=timedelta(seconds=self.timeout_seconds), wait_all_ranks=True)
        except RuntimeError as error:
            raise TimeoutError(
                f"rank {self.rank} waited for rank {self._absent(error)}, which did not come within "
                f"{self.timeout_seconds:g} seconds: it ended, hangs or is slower than that. Look at what it wrote "
                f"last; if it was only slow, raise parallel.timeout_seconds"
            ) from error

    def _absent(self, error: RuntimeError) -> str:
        """The ranks that `monitored_barrier` missed, such as "1, 2". It tells only rank 0, which tells the others."""
        assert self.group is not None
        store = self.group.get_group_store()
        if self.rank > 0:
            try:
                store.wait([_ABSENT], timedelta(seconds=_TELL_SECONDS))
                absent = store.get(_ABSENT).decode()
                store.add(_HEARD, 1)
            except RuntimeError:  # rank 0 did not tell, or the store's host is gone
                return "0 (or one that rank 0 waits for)"
            return absent
        named = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
        if named is None:
            raise error
        absent = named[1].strip()
        store.set(_ABSENT, absent)
        present = [rank for rank in range(1, self.size) if str(rank) not in absent.split(", ")]
        if present:
            # if ranks have ended, the others still wait for rank 0: a receive that times out closes all connections
            with contextlib.suppress(RuntimeError):
                request = dist.irecv(torch.zeros(1), src=present[0], group=self.group)
                assert request is not None
                request.wait(timedelta(milliseconds=1))
        until = time.monotonic() + _TELL_SECONDS
        while (
            store.add(_HEARD, 0) < len(present) and time.monotonic() < until
        ):  # if rank 0 hosts the store, leaving ends it
            time.sleep(0.01)
        return absent

    def explain(self, error: RuntimeError) -> Exception:
        """An error that names the ranks that are gone, or `error` itself if no collective failed or all ranks answer.

        Every rank that gets here says so in the store; those that do not within seconds are named.
        """
        if self.group is None or "gloo" not in str(error):
            return error
        store = self.group.get_group_store()
        silent = list(range(self.size))
        try:
            store.set(f"moe/cut_off/{self.rank}", "")
            until = time.monotonic() + _TELL_SECONDS
            while silent and time.monotonic() < until:
                time.sleep(0.05)
                silent = [rank for rank in silent if not store.check([f"moe/cut_off/{rank}"])]
        except RuntimeError:  # rank 0 hosted the store (torchrun did not) and is gone
            silent = [0]
        if not silent:
            return error
        return TimeoutError(
            f"rank {self.rank} was cut off in a collective ({_first_line(error)}) and rank "
            f"{', '.join(map(str, silent))} does not answer: it ended, or hangs for longer than "
            f"parallel.timeout_seconds ({self.timeout_seconds:g}). Look at what it wrote last"
        )

    def close(self) -> None:
        """Leave the group, after the last exchange."""
        if self.group is not None:
            dist.destroy_process_group()


def open_world(device: str, *, timeout_seconds: float) -> World:
    """Join the processes that torchrun or srun started, or run alone. device: "auto", "cpu" or "cuda".

    Raises ValueError if a run cannot start in this environment, and for another device.
    """
    size = check_environment(os.environ, device)
    device = choose_device(device)
    if size == 1:
        return World(0, 1, torch.device(device), None, timeout_seconds)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    here = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    backend = "nccl" if device == "cuda" else "gloo"
    try:
        timeout = timedelta(seconds=timeout_seconds)
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            backend,
            store=agree_on_attempt(store, rank, size, timeout_seconds),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=here if device == "cuda" else None,
        )
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"rank {rank} cannot meet the others at {where} ({_first_line(error)}); if the port is in use by another "
            f"run, give torchrun another --master-port or --rdzv-endpoint; if ranks are missing, look at what they "
            f"wrote last"
        ) from error
    return World(rank, size, here, dist.group.WORLD, timeout_seconds, local_rank)


def end_process(status: int = 0) -> NoReturn:
    """End this process at once, after flushing its output.

    For the last line of a program of several ranks. A gloo thread that releases a collective's tensor this late needs
    the interpreter, and aborts the process if that is shutting down: "terminate called without an active exception"
    (docs/log.md). Such threads outlive destroy_process_group, because DTensor's caches keep every mesh and its groups.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def choose_device(device: str) -> str:
    """Resolve "auto" to "cpu" or "cuda". Raises ValueError for an unknown device, and for "cuda" without a GPU."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device ({device!r}) must be one of: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda but torch sees no GPU; use device=auto or device=cpu")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def check_environment(environment: Mapping[str, str], device: str) -> int:
    """The number of processes according to the environment. Raises ValueError naming the variable that is wrong."""
    device = choose_device(device)
    size = _number(environment, "WORLD_SIZE")
    if size is None:
        _check_alone(environment)
        return 1
    if size == 0:
        raise ValueError("WORLD_SIZE is 0; it is the number of processes, at least 1")
    if size == 1:
        return 1
    local_rank = _check_ranks(environment, size)
    if device == "cuda":
        _check_gpus(local_rank)
    elif not dist.is_gloo_available():
        raise ValueError("this torch has no gloo, through which CPU processes talk; install a build that has it")
    return size


def _check_ranks(environment: Mapping[str, str], size: int) -> int:
    """The local rank, after checking all variables that place this process among `size`."""
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {size} but {', '.join(missing)} is not set: start the processes with torchrun, or with the "
            f"script that `moe launch --slurm` prints"
        )
    rank, local_rank = _number(environment, "RANK"), _number(environment, "LOCAL_RANK")
    assert rank is not None
    assert local_rank is not None
    if rank >= size:
        raise ValueError(f"RANK ({rank}) must be below WORLD_SIZE ({size}); ranks count from 0")
    local_size = _number(environment, "LOCAL_WORLD_SIZE") or size
    if local_rank >= local_size:
        raise ValueError(
            f"LOCAL_RANK ({local_rank}) must be below the number of processes on this machine ({local_size}, "
            f"LOCAL_WORLD_SIZE or WORLD_SIZE)"
        )
    port = _number(environment, "MASTER_PORT")
    assert port is not None
    if not 0 < port < 65536:
        raise ValueError(f"MASTER_PORT ({port}) must be between 1 and 65535")
    return local_rank


def _check_alone(environment: Mapping[str, str]) -> None:
    """Without WORLD_SIZE: refuse to be one of many processes that would all train one model into one folder."""
    if "RANK" in environment:
        raise ValueError(f"RANK is {environment['RANK']} but WORLD_SIZE is not set; torchrun sets both")
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if (_number(environment, name) or 1) > 1:
            raise ValueError(
                f"{name} is {environment[name]} but WORLD_SIZE is not set: so many processes were started, and none "
                f"knows of the others. Start one torchrun on each machine, as the script does that `moe launch "
                f"--slurm` prints; if they are separate runs, unset {name}"
            )


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What `function` returned, or the ValueError or OSError it raised."""
    try:
        return function(), None
    except (ValueError, OSError) as error:
        return None, error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"the environment has {name}={text!r}, which is not a count; torchrun and srun set it")
    return int(text)


def _check_gpus(local_rank: int) -> None:
    if not dist.is_nccl_available():
        raise ValueError("this torch has no NCCL, through which GPUs talk; install a CUDA build or use device=cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK is {local_rank} but this machine has {torch.cuda.device_count()} GPUs; start at most one "
            f"process per GPU (torchrun --nproc_per_node)"
        )
