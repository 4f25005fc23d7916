"""Random draws for routers, only from a generator or a seed that the caller passes.

Either is the whole state of a draw, so a step can be repeated and recomputation can see the same noise. A seed is an
int64 tensor of one element: unlike a generator it passes through torch.compile, so the router has no graph break.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Randomness = torch.Generator | Tensor


def require_generator(generator: Randomness | None, what: str) -> Randomness:
    """Raise ValueError unless there is a generator, or a valid seed, for `what`."""
    if generator is None:
        raise ValueError(f"{what} draws random numbers: pass generator=torch.Generator(x.device).manual_seed(...)")
    if isinstance(generator, Tensor) and (generator.dtype != torch.int64 or generator.numel() != 1):
        raise ValueError(f"a seed ({generator.dtype}, {tuple(generator.shape)}) must be one int64 number")
    return generator


def uniform(shape: torch.Size | tuple[int, ...], like: Tensor, generator: Randomness) -> Tensor:
    """U(0, 1) in the dtype and on the device of `like`."""
    if isinstance(generator, Tensor):
        return _seeded_draw(generator, like.detach(), shape, False)
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


def gumbel(shape: torch.Size | tuple[int, ...], like: Tensor, generator: Randomness) -> Tensor:
    """Gumbel(0, 1): -log of an exponential draw. The argmax of logits plus this is a sample from their softmax."""
    if isinstance(generator, Tensor):
        return -_seeded_draw(generator, like.detach(), shape, True).log()
    return -torch.empty(shape, dtype=like.dtype, device=like.device).exponential_(generator=generator).log()


@torch.library.custom_op(
    "moe::seeded_draw",
    mutates_args=(),
    schema="(Tensor seed, Tensor like, SymInt[] shape, bool exponential) -> Tensor",
)
def _seeded_draw(seed: Tensor, like: Tensor, shape: Sequence[int], exponential: bool) -> Tensor:
    """What a generator with that seed would draw. Reads the seed: on a GPU the host waits for it."""
    generator = torch.Generator(like.device).manual_seed(int(seed))
    drawn = torch.empty(list(shape), dtype=like.dtype, device=like.device)
    return drawn.exponential_(generator=generator) if exponential else drawn.uniform_(generator=generator)


@_seeded_draw.register_fake
def _(seed: Tensor, like: Tensor, shape: Sequence[int], exponential: bool) -> Tensor:
    return like.new_empty(list(shape))
