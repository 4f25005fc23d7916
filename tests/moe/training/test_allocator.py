from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from moe.training import allocator

FAULTS = """
import resource, torch
from moe.training.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
weight = torch.ones(2**24, requires_grad=True)  # 64 MiB, far above what malloc keeps by itself
def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    (weight * weight).sum().backward()
    weight.grad = None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# the best of ten: the heap grows until the blocks of a step have found their places, and now and then once more
print(min(faults_of_a_step() for _ in range(10)))
"""


def faults(*, keep: bool) -> int:
    result = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


def test_freed_memory_is_not_faulted_in_again() -> None:
    if platform.libc_ver()[0] != "glibc":
        assert not allocator.keep_freed_memory()
        return
    plain, kept = faults(keep=False), faults(keep=True)
    assert plain >= 3 * 2**26 // 2**21  # three blocks, at least one fault per 2 MiB page; with 4 KiB pages 49,152
    assert kept < plain / 10


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert allocator.keep_freed_memory() is False
