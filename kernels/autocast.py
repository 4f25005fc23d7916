"""Autocast as an op meets it. The meta device, which torch's own functions refuse to be asked about, has none."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants `x` in, as of nn.Linear's input; None where it is off and for float64."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A region in which operations on that device type take their inputs in the dtype that they have."""
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
