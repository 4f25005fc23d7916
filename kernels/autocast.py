"""Autocast as an op sees it. The meta device has none, and torch's own functions raise when asked about it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts `x` to, as for nn.Linear's input; None if it is off or `x` is float64."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A context in which operations on that device type take their inputs in the dtype they have."""
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
