"""One of the implementations compared, with its costs and the check that it computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {  # relative to the reference's largest magnitude; the reference is in float32
    torch.float32: 2e-5,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}


@dataclass(frozen=True)
class Cost:
    """What one call needs, forward and backward together."""

    flops: float  # useful
    bytes: float  # minimum that must move: weights in use, inputs, outputs and their gradients
    forward_flops: float | None = None
    executed_flops: float | None = None  # with padding; None if equal to useful
    padded_share: float | None = None  # of the rows multiplied; None if there are no expert rows
    saved_formula: int | None = None  # activation bytes kept for the backward, in closed form
    note: str = ""


@dataclass(frozen=True)
class Contender:
    """An implementation. `outcome` picks from a call's result the named tensors that must match the reference's."""

    name: str
    forward: Callable[[], Any]
    cost: Cost
    backward: Callable[[Any], Any] | None = None
    dtype: torch.dtype = torch.float32
    backend: str = ""  # of ours: what "auto" resolved to, or the one requested
    routing: str = ""
    peer: bool = False
    few: bool = False  # no close limit applies to it, so fewer rounds suffice
    outcome: Callable[[Any, Any], Mapping[str, Tensor]] | None = None
    reference: Contender | None = None  # whose outcome it must match
    unchecked: str = ""  # why there is no reference: it differs on purpose, or is the reference
    parameters: tuple[Tensor, ...] = ()  # not counted as saved activations

    @property
    def label(self) -> str:
        """The name with the dtype: unique within a case."""
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return f"{self.name} [{short[self.dtype]}]"


def mismatch(outcome: Mapping[str, Tensor], reference: Mapping[str, Tensor], tolerance: float) -> str | None:
    """How the outcome differs from the reference by more than `tolerance` of its largest magnitude, or None.

    Tensors are compared in float32 (float64 if the reference is). An all-zero reference compares nothing and is itself
    a failure, as is a missing tensor.
    """
    for name, expected in reference.items():
        actual = outcome.get(name)
        if actual is None:
            return f"{name} is missing"
        if actual.shape != expected.shape:
            return f"{name} has shape {tuple(actual.shape)}, the reference {tuple(expected.shape)}"
        scale = float(expected.detach().abs().max())
        if scale == 0:
            return f"{name}: a reference of zeros compares nothing"
        error = float((actual.detach().to(expected.dtype) - expected.detach()).abs().max())
        if not error <= tolerance * scale:  # NaN fails too
            return f"{name} differs by {error / scale:.2g} of the largest value (at most {tolerance:g})"
    return None


def saved_bytes(contender: Contender) -> int:
    """Bytes of all storages that autograd keeps from forward to backward, without parameters, each counted once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in contender.parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output held by its own node would never be freed, nor would the weights behind it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = contender.forward()
    del output
    return sum(kept.values())
