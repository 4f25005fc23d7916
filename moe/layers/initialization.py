"""Seeded draws: every parameter has its own generator, so no value depends on build order, device or rank count."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config.checks import require_choice


def parameter_generator(seed: int | None, *path: int | str) -> torch.Generator | None:
    """A CPU generator that depends on (seed, path) alone; `None` for seed None, meaning torch's own generator.

    `path` names the parameter, for instance (layer, "experts.w_in", expert).
    """
    if seed is None:
        return None
    digest = hashlib.blake2b("/".join(map(str, (seed, *path))).encode(), digest_size=8).digest()
    # manual_seed takes 64 bits but wraps negative numbers: keep 63
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def draw_normal(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill with N(0, std²). A seeded draw is made in float32 on the CPU, so it is equal on every device."""
    if generator is None:
        parameter.normal_(0.0, std)
        return
    _copy_own(parameter, torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator))


@torch.no_grad()
def draw_uniform(parameter: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fill with U(-bound, bound). A seeded draw is made in float32 on the CPU, so it is equal on every device."""
    if generator is None:
        parameter.uniform_(-bound, bound)
        return
    _copy_own(parameter, torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound, generator=generator))


@torch.no_grad()
def draw_whole(parameter: Tensor, draw: Callable[[Tensor], None]) -> None:
    """Fill a parameter with `draw`, which sees all of it; for a DTensor, this process keeps its shard."""
    if not hasattr(parameter, "device_mesh"):
        draw(parameter)
        return
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    draw(whole)
    _copy_own(parameter, whole)


@torch.no_grad()
def draw_stacked(stack: Tensor, draw: Callable[[int, Tensor], None]) -> None:
    """Fill `stack` (E, ...) with `draw(e, part)` for each e that this process holds a part of."""
    own, region = own_region(stack)
    whole = stack.shape[1:]
    for i, e in enumerate(range(stack.shape[0])[region[0]]):
        if own.shape[1:] == whole:
            draw(e, own[i])
            continue
        part = torch.empty(whole, dtype=own.dtype, device=own.device)
        draw(e, part)
        own[i].copy_(part[region[1:]])


def own_region(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """The part of a parameter that this process holds, and where it lies in the whole.

    All of it, unless it is a DTensor, of which each process holds a shard.
    """
    if not hasattr(parameter, "device_mesh"):
        return parameter, tuple(slice(0, size) for size in parameter.shape)
    from torch.distributed.tensor import DTensor  # imported here so that moe.layers does not load DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(parameter, DTensor)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    region = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    return parameter.to_local(), region


def _copy_own(parameter: Tensor, whole: Tensor) -> None:
    own, region = own_region(parameter)
    own.copy_(whole[region])


@dataclass(frozen=True)
class WeightInit:
    """How the weights of a model are drawn. Raises ValueError for an unknown kind."""

    kind: str = "normal"  # N(0, std²); "fairseq" is U(±bound) with the paper's bounds (Artetxe et al. 2021)
    std: float = 0.02
    output_scale: float = 1.0  # multiplies std for the projections that write to the residual stream

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, ("normal", "fairseq"))

    def draw(self, weight: Tensor, bound: float, generator: torch.Generator | None, *, output: bool = False) -> None:
        """Fill `weight`. bound: of "fairseq"'s uniform draw. output: whether it writes to the residual stream."""
        if self.kind == "fairseq":
            draw_uniform(weight, bound, generator)
        else:
            draw_normal(weight, self.std * (self.output_scale if output else 1.0), generator)


DEFAULT_INIT = WeightInit()
