"""How a Triton kernel is started: on which device, by how many programs, and what the ahead-of-time compiler records.

Knows no kernel and does not import Triton: each `triton_impl.py` passes its kernels in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERPRETED_PROGRAMS = 3  # of a persistent kernel: enough to test programs with several tiles, few enough to be quick
RECORDED_PROCESSORS = 132  # those of an H100, for launches that are recorded and not run


class Launch(NamedTuple):
    """One kernel launch: everything that decides what is compiled."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None


class _Recording(NamedTuple):
    note: Callable[[Launch], None]
    capability: int


_recorded: ContextVar[_Recording | None] = ContextVar("_recorded", default=None)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    max_registers: int | None = None,
    **arguments: Any,
) -> None:
    """Start `kernel` on the device of its tensors. A grid with a 0 starts nothing.

    max_registers: per thread, on the devices that `register_limit` names.
    """
    recorded = _recorded.get()
    if recorded is not None:
        recorded.note(Launch(kernel, grid, arguments, num_warps, num_stages, max_registers))
        return
    if 0 in grid:
        return
    device = next(value for value in arguments.values() if isinstance(value, Tensor)).device
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if device.type == "cuda" and torch.version.hip is None:
        options["maxnreg"] = register_limit(capability_of(device), num_warps, max_registers)
    with _on(device):
        if device.type == "cuda":
            # a copied context: Triton's allocator is a context variable, backward threads have other contexts, and
            # a program's own allocator must stay set
            copy_context().run(start_with_scratch, kernel, grid, device, arguments | options)
        else:
            kernel[grid](**arguments, **options)


def start_with_scratch(kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: dict[str, Any]) -> None:
    """Start a kernel with an allocator set: a kernel that makes tensor descriptors writes them to global memory.

    The allocator stays set in the caller's context, so run this in a context of its own.
    """
    import triton  # imported here, since this module is also used where Triton is not installed

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)  # the caching allocator aligns to 512 bytes

    triton.set_allocator(allocate)
    kernel[grid](**arguments)


@contextmanager
def recording(capability: int = 0) -> Iterator[list[Launch]]:
    """A context in which `launch` appends to the yielded list and starts nothing. Give the launchers meta tensors.

    capability: what `capability_of` returns inside, so that launchers choose as they would on that GPU.
    """
    launches: list[Launch] = []
    token = _recorded.set(_Recording(launches.append, capability))
    try:
        yield launches
    finally:
        _recorded.reset(token)


@contextmanager
def simulating(capability: int = 0) -> Iterator[Counter[str]]:
    """Like `recording`, for whole models of fake tensors: counts launches by kernel and keeps none of their tensors."""
    counts: Counter[str] = Counter()

    def note(launch: Launch) -> None:
        counts[launch.kernel.__name__] += 1

    token = _recorded.set(_Recording(note, capability))
    try:
        yield counts
    finally:
        _recorded.reset(token)


def is_recording() -> bool:
    """Whether launches are currently recorded or counted, so that nothing runs."""
    return not torch.compiler.is_compiling() and _recorded.get() is not None  # Dynamo cannot trace a ContextVar


def is_interpreted(kernel: Any) -> bool:
    """Whether the kernel was decorated under TRITON_INTERPRET=1, which Triton reads only at that moment."""
    return type(kernel).__name__ == "InterpretedFunction"


def num_programs(device: torch.device, per_processor: int) -> int:
    """How many programs of a persistent kernel fill the device if each processor holds `per_processor`."""
    if device.type == "cuda":
        return _num_processors(device) * per_processor
    return INTERPRETED_PROGRAMS if device.type == "cpu" else RECORDED_PROCESSORS * per_processor


def power_of_2(value: int, lowest: int, highest: int) -> int:
    """The smallest power of two that is at least `value`, clamped to [lowest, highest]. Tiles have such sizes."""
    return min(highest, max(lowest, 1 << (value - 1).bit_length() if value > 1 else 1))


def register_limit(capability: int, num_warps: int, max_registers: int | None) -> int:
    """The assembler's register limit per thread. Without one it may spill, to fit one more program on a processor.

    max_registers applies on sm_90, where it lets two programs fit and nothing spills; other GPUs get all registers.
    """
    if max_registers is not None and capability == 90:
        return max_registers
    return min(255, 65536 // (32 * num_warps))


def capability_of(device: torch.device) -> int:
    """90 on sm_90, and so on; 0 without an NVIDIA GPU. While launches are recorded, the recording's."""
    recorded = _recorded.get()
    if recorded is not None:
        return recorded.capability
    return _capability(device) if device.type == "cuda" and torch.version.hip is None else 0


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _num_processors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
