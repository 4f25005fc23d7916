"""Which implementation of an op runs: chosen by one function, logged once, never silently changed."""

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

# find_spec looks at the file system and imports nothing; a constant, so that a compiler can trace `choose_backend`
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def choose_backend(op: str, requested: str, device_type: str, *, has_triton: bool = False) -> str:
    """ "triton", "torch" or "reference" for `op` on a device type ("cpu", "cuda", ...). "auto" is the fastest there is.

    "auto" is Triton on a GPU if Triton is installed and the op has Triton kernels, torch elsewhere. On a CPU Triton
    runs only in its interpreter, which the environment must request (TRITON_INTERPRET=1) and "auto" never chooses:
    it exists to test the kernels. Raises ValueError for an unknown backend or a request that cannot be met.
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
            f"backend ('reference') of {op} reads values, which tensors on the meta device lack; use backend='auto'"
        )
    _announce(op, device_type, requested, "requested")
    return requested


def is_traced(tensor: Tensor) -> bool:
    """Whether a compiler, or a tensor that holds no numbers, must see one opaque op.

    Otherwise the op's function is called directly: the dispatcher's detour through Python costs 60 µs per call.
    """
    return torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.is_meta


def is_watched() -> bool:
    """Whether a dispatch mode watches each operation, as torch's FLOP and memory counters do.

    It must see every operation, and only ones it knows, so fast paths that bypass the dispatcher or use a library's
    own operation are not taken.
    """
    return _get_current_dispatch_mode() is not None


def _require_triton(op: str, device_type: str, has_triton: bool) -> None:
    if not has_triton:
        raise ValueError(f"backend ('triton') of {op}: this op has no Triton kernels; use backend='auto'")
    if not _TRITON_INSTALLED:
        raise ValueError(
            f"backend ('triton') of {op} needs the triton package, which is not installed; use backend='auto'"
        )
    if is_recording():
        return  # nothing runs, so no GPU is needed
    if device_type != "cuda" and not (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"backend ('triton') of {op} needs tensors on a GPU, but these are on {device_type!r}; use backend='auto', "
            "or "
            "set TRITON_INTERPRET=1 before the program starts to run the kernels in Triton's interpreter"
        )


def _announce(op: str, device_type: str, backend: str, reason: str) -> None:
    if not torch.compiler.is_compiling():  # a traced function must not log
        _announce_once(op, device_type, backend, reason)


@cache
def _announce_once(op: str, device_type: str, backend: str, reason: str) -> None:
    _log.info("%s on %s runs on %s (%s)", op, device_type, backend, reason)
