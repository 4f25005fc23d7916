"""Raise an error of one rank on all, so that none goes on and none waits for a rank that has left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from moe.checkpoint.divergence import DivergedError

# the first that fits
_KINDS: dict[str, type[Exception]] = {"OSError": OSError, "DivergedError": DivergedError, "ValueError": ValueError}


def gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's `value`, a plain Python value, in rank order."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def agreement(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Leave the block together: normally if no rank failed in it, otherwise with the first failure on every rank.

    Raises OSError, DivergedError or ValueError if a rank did, RuntimeError for anything else. Without a group, errors
    pass unchanged.
    """
    if group is None:
        yield
        return
    failure: BaseException | None = None
    report: tuple[str, str] | None = None
    try:
        yield
    except CheckpointException as error:  # torch's own, derived from BaseException: raised alike on all ranks
        rank, (failure, _) = min(error.failures.items())
        report = (_kind(failure), f"rank {rank}: {failure}")
    except Exception as error:  # whatever it is: the others are waiting
        failure, report = error, (_kind(error), str(error))
    told = gather(report, group)
    failed = [(rank, *each) for rank, each in enumerate(told) if each is not None]
    if not failed:
        return
    rank, kind, text = failed[0]
    if len(set(told)) > 1:  # the ranks did not all fail alike
        text = f"rank {rank}: {text}"
    raise _KINDS.get(kind, RuntimeError)(text) from failure


def _kind(error: BaseException) -> str:
    fitting = [name for name, kind in _KINDS.items() if isinstance(error, kind)]
    return fitting[0] if fitting else type(error).__name__
