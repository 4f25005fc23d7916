"""Derivatives of derivatives: a backward that is to be differentiated itself goes through the specification.

The fast backward passes are written by hand and autograd cannot look inside them. What `create_graph=True` asks for,
and with it every transformation of torch.func, is computed by differentiating the specification instead: slower, of
any order, and the same numbers up to rounding. The ops of torch.library, of compilers and the Triton path, raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .autocast import without_autocast


def wanted() -> bool:
    """Whether the backward that runs now is itself to be differentiated. To be asked inside a backward."""
    return torch.is_grad_enabled()


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` under `grad`, None where `needs` is False; with a graph of their own."""
    taken = [index for index, needed in enumerate(needs) if needed]

    def of_the_needed(*values: Tensor) -> Tensor:
        arguments: list[Any] = list(inputs)
        for index, value in zip(taken, values, strict=True):
            arguments[index] = value
        with without_autocast(grad.device.type):
            return function(*arguments)

    # not autograd.grad: by then a transformation's tensors may have outlived it, as those of a `vjp` do
    pull_back = torch.func.vjp(of_the_needed, *(inputs[index] for index in taken))[1]
    found = iter(pull_back(grad))
    return [next(found) if needed else None for needed in needs]
