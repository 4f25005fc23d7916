"""Which implementation of an op runs: chosen by one function, said once in the log, never silently changed."""

from __future__ import annotations

import logging
from functools import cache

import torch

BACKENDS = ("auto", "torch", "reference")

_log = logging.getLogger(__name__)


def choose_backend(op: str, requested: str, device_type: str) -> str:
    """ "torch" or "reference" for `op` on a device type ("cpu", "cuda", ...). "auto" is the fastest there is.

    Raises ValueError for a name that is no backend.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend ({requested!r}) of {op} must be one of: {', '.join(BACKENDS)}")
    if requested == "auto":
        _announce(op, device_type, "torch", "auto: the fast portable path, the only one for this op")
        return "torch"
    _announce(op, device_type, requested, "requested")
    return requested


def _announce(op: str, device_type: str, backend: str, reason: str) -> None:
    if not torch.compiler.is_compiling():  # a traced function has no business with the log
        _announce_once(op, device_type, backend, reason)


@cache
def _announce_once(op: str, device_type: str, backend: str, reason: str) -> None:
    _log.info("%s on %s runs on %s (%s)", op, device_type, backend, reason)
