"""Which implementation of an op runs: chosen by one function, said once in the log, never silently changed."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .launch import is_recording

BACKENDS = ("auto", "triton", "torch", "reference")

_log = logging.getLogger(__name__)

# a look at the file system, no import: as a constant, a compiler that traces `choose_backend` can read it
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def choose_backend(op: str, requested: str, device_type: str, *, has_triton: bool = False) -> str:
    """ "triton", "torch" or "reference" for `op` on a device type ("cpu", "cuda", ...). "auto" is the fastest there is.

    "auto" is Triton on a GPU where Triton is installed and the op has such kernels, torch elsewhere. On a CPU Triton
    runs only in its interpreter, which is asked for by the environment (TRITON_INTERPRET=1) and never chosen by
    "auto": it is there to test the kernels. Raises ValueError for a name that is no backend and a request that
    cannot be met.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend ({requested!r}) of {op} must be one of: {', '.join(BACKENDS)}")
    if requested == "auto":
        on_gpu = device_type == "cuda"
        if on_gpu and has_triton and _TRITON_INSTALLED:
            _announce(op, device_type, "triton", "auto: a GPU, and triton is installed")
            return "triton"
        reason = "the only path for this op" if not has_triton else "triton is not installed" if on_gpu else "no GPU"
        _announce(op, device_type, "torch", f"auto: {reason}")
        return "torch"
    if requested == "triton":
        _require_triton(op, device_type, has_triton)
    if requested == "reference" and device_type == "meta":
        raise ValueError(
            f"backend ('reference') of {op} reads numbers, and tensors on the meta device have none; use backend='auto'"
        )
    _announce(op, device_type, requested, "requested")
    return requested


def is_traced(tensor: Tensor) -> bool:
    """Whether something looks on that must see one opaque op: a compiler, or a tensor that holds no numbers.

    Elsewhere the op's function is called itself: the dispatcher's way round through Python costs 60 µs a call.
    """
    return torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.is_meta


def is_watched() -> bool:
    """Whether a program looks at each operation, as torch's counters of FLOPs and of memory do.

    They are to see operations they know, all of them: what is faster because it goes past the dispatcher, or by an
    operation of a library's own, stands back.
    """
    return _get_current_dispatch_mode() is not None


def _require_triton(op: str, device_type: str, has_triton: bool) -> None:
    if not has_triton:
        raise ValueError(f"backend ('triton') of {op}: this op has no Triton kernels; use backend='auto'")
    if not _TRITON_INSTALLED:
        raise ValueError(f"backend ('triton') of {op} needs the triton package, which is not installed; use 'auto'")
    if is_recording():
        return  # nothing runs, so nothing needs to be there
    if device_type != "cuda" and not (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"backend ('triton') of {op} needs tensors on a GPU, these are on {device_type!r}; use backend='auto', or "
            "set TRITON_INTERPRET=1 before the program starts to run the kernels in Triton's interpreter"
        )


def _announce(op: str, device_type: str, backend: str, reason: str) -> None:
    if not torch.compiler.is_compiling():  # a traced function has no business with the log
        _announce_once(op, device_type, backend, reason)


@cache
def _announce_once(op: str, device_type: str, backend: str, reason: str) -> None:
    _log.info("%s on %s runs on %s (%s)", op, device_type, backend, reason)
