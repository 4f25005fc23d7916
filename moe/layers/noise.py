"""Random draws of routers: in training alone, and only from a generator that the caller brings.

A generator is a draw's whole state, so that a step can be repeated, and recomputation can see the same noise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def require_generator(generator: torch.Generator | None, what: str) -> torch.Generator:
    """Raise ValueError unless there is a generator for `what`."""
    if generator is None:
        raise ValueError(f"{what} draws random numbers: pass generator=torch.Generator(x.device).manual_seed(...)")
    return generator


def uniform(shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """U(0, 1) in the dtype and on the device of `like`."""
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


def gumbel(shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Gumbel(0, 1): -log of an exponential draw. The argmax of logits plus it is a sample of their softmax."""
    return -torch.empty(shape, dtype=like.dtype, device=like.device).exponential_(generator=generator).log()
