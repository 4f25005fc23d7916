"""Count what a block of code sends through process groups: calls and bytes of each kind of collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe.scaling.communication import Collective


def _first(*args: Any) -> Tensor:
    tensor: Tensor = args[0]
    return tensor


def _second(*args: Any) -> Tensor:
    tensor: Tensor = args[1]
    return tensor


def _first_of_list(*args: Any) -> Tensor:
    tensor: Tensor = args[0][0]
    return tensor


def _gathered(*args: Any) -> list[Tensor]:
    tensors: list[Tensor] = args[0][0]
    return tensors


# torch.distributed's op -> the kind, and the tensors whose bytes count
_KINDS: dict[str, tuple[str, Callable[..., Tensor | list[Tensor]]]] = {
    "_allgather_base_": ("all_gather", _first),  # the gathered output
    "allgather_": ("all_gather", _gathered),
    "_reduce_scatter_base_": ("reduce_scatter", _second),  # the input to sum
    "allreduce_": ("all_reduce", _first_of_list),
    "alltoall_base_": ("all_to_all", _second),  # what is sent
    "broadcast_": ("broadcast", _first_of_list),
}


class CollectiveCounter(TorchDispatchMode):
    """While active, counts this process's collectives by kind (`Collective` says which bytes), backward included.

    Works on any backend, including torch's fake one. `counts` holds the kinds that were called. Raises ValueError at an
    unknown collective, because an incomplete count would be wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Collective] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # DTensor then calls what it needs on local tensors
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Any) -> None:
        name = func._opname
        if func.namespace != "c10d" or name not in _KINDS:
            if name in ("barrier", "monitored_barrier_", "wait_tensor"):
                return
            raise ValueError(f"the collective {func} is not counted yet; add it to moe.distributed.collectives")
        kind, tensors = _KINDS[name]
        sent = tensors(*args)
        num_bytes = sum(t.numel() * t.element_size() for t in ([sent] if isinstance(sent, torch.Tensor) else sent))
        calls, total = self.counts.get(kind, Collective(0, 0))
        self.counts[kind] = Collective(calls + 1, total + num_bytes)
