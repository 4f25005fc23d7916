"""How glibc returns memory to the kernel, and why a training process should prevent it."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1  # from glibc's malloc.h
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Make this process reuse freed memory instead of returning it. Returns False if the C library is not glibc.

    By default a block above 32 MiB is mapped afresh and its pages are faulted in one by one: 90,000 faults a step for
    the gradients of 2 x 512 experts. Keeping them cut a step from 642 to 582 ms and from 701 to 562 ms (two threads,
    docs/log.md). The setting is process-wide, so a program may choose it, never a library.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
