"""Memory for weight gradients that outlives the gradients, so that a step causes no page faults.

A fresh block above 32 MiB costs eleven times as much as filling it: glibc maps it anew and every page is faulted in.
The gradients of 64 experts are such blocks, and so are their weights in autocast's dtype. What is handed out is an
ordinary tensor that autograd may keep, add to or give away: memory is reused only once nothing else holds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GradientMemory:
    """One block of memory per name, lent to one gradient at a time.

    While a lent gradient is alive anywhere (in `.grad`, in a second use of the layer in the same graph, in a caller's
    list), the next one gets memory of its own.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._users: dict[str, int] = {}  # of the storage, while it is not lent

    def empty_like(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor of `dtype` with the shape and device of `like`."""
        held = self._held.get(name)
        fits = held is not None and (held.shape, held.dtype, held.device) == (like.shape, dtype, like.device)
        if held is None or not fits:
            held = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
            self._held[name], self._users[name] = held, _users(held)
        elif _users(held) > self._users[name]:
            return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        return held.detach()  # another tensor on the same storage: autograd takes it over instead of copying it

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientMemory:
        """A copied module gets memory of its own."""
        return GradientMemory()

    def __reduce__(self) -> tuple[type[GradientMemory], tuple[()]]:
        """Saves that there is such memory, not its contents."""
        return GradientMemory, ()


def _users(tensor: Tensor) -> int:
    """How many tensors share the storage, plus a constant."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
