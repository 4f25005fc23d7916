"""Derivatives of derivatives: a backward that is itself to be differentiated goes through the specification.

The fast backward passes are written by hand and autograd cannot look inside them. Under `create_graph=True`, and so
under every torch.func transformation, gradients come from differentiating the specification instead: slower, of any
order, and the same numbers up to rounding. The torch.library ops, for compilers and the Triton path, raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .autocast import without_autocast


def wanted() -> bool:
    """Whether the running backward is itself to be differentiated. Call it inside a backward."""
    return torch.is_grad_enabled()


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` for upstream `grad`, None where `needs` is False; with their own graph."""
    taken = [index for index, needed in enumerate(needs) if needed]

    def of_the_needed(*values: Tensor) -> Tensor:
        arguments: list[Any] = list(inputs)
        for index, value in zip(taken, values, strict=True):
            arguments[index] = value
        with without_autocast(grad.device.type):
            return function(*arguments)

    # not autograd.grad: by now the tensors may have outlived their transformation, as those of a `vjp` do
    pull_back = torch.func.vjp(of_the_needed, *(inputs[index] for index in taken))[1]
    found = iter(pull_back(grad))
    return [next(found) if needed else None for needed in needs]
