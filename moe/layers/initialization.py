"""Seeded draws: every parameter has its own generator, so no value depends on build order, device or rank count."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


def parameter_generator(seed: int | None, *path: int | str) -> torch.Generator | None:
    """A CPU generator that depends on (seed, path) alone; `None` for seed None, which draws from torch's own.

    `path` names the parameter, for instance (layer, "experts.w_in", expert).
    """
    if seed is None:
        return None
    digest = hashlib.blake2b("/".join(map(str, (seed, *path))).encode(), digest_size=8).digest()
    # manual_seed takes 64 bits but folds negative numbers: keep 63
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def draw_normal(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill with N(0, std²). A seeded draw is made in float32 on the CPU, so it is equal on every device."""
    if generator is None:
        parameter.normal_(0.0, std)
        return
    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


@torch.no_grad()
def draw_uniform(parameter: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fill with U(-bound, bound). A seeded draw is made in float32 on the CPU, so it is equal on every device."""
    if generator is None:
        parameter.uniform_(-bound, bound)
        return
    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


class WeightInit(NamedTuple):
    """How the weights of a model are drawn."""

    kind: str = "normal"  # N(0, std²); "fairseq" is U(±bound) with the paper's bounds (moe_lm.md 4.6)
    std: float = 0.02
    output_scale: float = 1.0  # multiplies std for the projections that write to the residual stream

    def draw(self, weight: Tensor, bound: float, generator: torch.Generator | None, *, output: bool = False) -> None:
        """Fill `weight`. bound: what "fairseq" draws within. output: whether it writes to the residual stream."""
        if self.kind == "fairseq":
            draw_uniform(weight, bound, generator)
        else:
            draw_normal(weight, self.std * (self.output_scale if output else 1.0), generator)


DEFAULT_INIT = WeightInit()
