"""The memory that a simulated process would hold. The only module that uses torch's private tools for it.

torch's FSDP memory tracker follows the lifetime of every storage. Under fake tensors an op of `moe.kernels` is one step
with a known output; what its Triton launchers allocate in between is measured separately, on meta tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary


class PeakMemory(NamedTuple):
    """Bytes by kind of content, at the moment of the highest total."""

    by_kind: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())

    @property
    def activations(self) -> int:
        """Everything except a rank's own shards of parameters and gradients, its buffers and its inputs."""
        own = ("Sharded Param", "Sharded Grad", "Buffer", "Inputs")
        return self.total - sum(self.by_kind.get(kind, 0) for kind in own)


@contextmanager
def simulated_group(num_ranks: int) -> Iterator[dist.ProcessGroup]:
    """Make this process rank 0 of `num_ranks` simulated ones: collectives return at once, without data."""
    if dist.is_initialized():
        raise ValueError("this process belongs to a process group already; simulate ranks in a process of its own")
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    group = dist.group.WORLD
    assert group is not None
    try:
        yield group
    finally:
        dist.destroy_process_group()


def fake_tensors() -> FakeTensorMode:
    """A mode in which tensors have shapes but no memory. Tensors made outside may take part."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class _Tracker(FSDPMemTracker):
    """torch's tracker, except that it looks away while a DTensor infers shapes on full-size tensors."""

    looks_away = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.looks_away:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Lock:
    """Replaces the lock that a DTensor holds while it infers shapes."""

    def __init__(self, tracker: _Tracker) -> None:
        self._tracker = tracker
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(self._tracker.looks_away)
        self._tracker.looks_away = True

    def __exit__(self, *error: Any) -> None:
        self._tracker.looks_away = self._before.pop()


class MemoryTracker:
    """While active, tracks the memory of `model`, which FSDP2 shards, through forward and backward passes."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._tracker = _Tracker(model)
        self._tracker.track_inputs(inputs)
        self._kernels = _Workspaces()

    def __enter__(self) -> MemoryTracker:
        lock: Any = _Lock(self._tracker)
        self._lock, ShardingPropagator._fake_mode_lock = ShardingPropagator._fake_mode_lock, lock
        self._tracker.__enter__()
        self._kernels.__enter__()  # above the tracker, which sees what it allocates
        return self

    def __exit__(self, *error: Any) -> None:
        self._kernels.__exit__(*error)
        self._tracker.__exit__(*error)
        ShardingPropagator._fake_mode_lock = self._lock

    def next_pass(self) -> None:
        """Call before another forward pass."""
        self._tracker.reset_mod_stats()

    @property
    def peak(self) -> PeakMemory:
        """The highest memory use so far."""
        snapshot = self._tracker.get_tracker_snapshot("peak").get(torch.device("cpu"), {})
        return PeakMemory(
            {str(getattr(kind, "value", kind)): size for kind, size in snapshot.items() if kind != "Total"}
        )


class _Workspaces(TorchDispatchMode):
    """Runs the launchers behind each op of `moe.kernels` on meta tensors, and briefly holds what they allocate."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # called again with local tensors
        result = func(*args, **(kwargs or {}))
        if func.namespace == "moe":
            workspace = _workspace_bytes(OPDEFS[func._schema.name]._init_fn, args, result)
            if workspace > 0:
                torch.empty(workspace, dtype=torch.int8)  # the tracker, below, sees it come and go
        return result


def _workspace_bytes(launcher: Any, args: Any, result: Any) -> int:
    """The most bytes that `launcher` holds at once beyond its inputs and results."""
    with _disable_current_modes():
        inputs = tree_map_only(Tensor, _on_meta, args)
        with _Allocations() as allocations:
            returned = launcher(*inputs)
        shapes = [
            [tuple(leaf.shape) for leaf in tree_leaves(each) if isinstance(leaf, Tensor)] for each in (returned, result)
        ]
        if shapes[0] != shapes[1]:
            raise AssertionError(f"{launcher.__name__} returns {shapes[0]} and its fake {shapes[1]}")
        own = {id(leaf.untyped_storage()): leaf.untyped_storage().nbytes() for leaf in tree_leaves(returned)}
    return max(0, allocations.peak - sum(own.values()))


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Allocations(TorchDispatchMode):
    """Tracks the most bytes that storages created while active hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._known[storage] = True
                    self.held += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return result

    def _free(self, num_bytes: int) -> None:
        self.held -= num_bytes
