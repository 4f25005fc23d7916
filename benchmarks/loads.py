"""Tokens that a real router sends to chosen experts: uniform, Zipf and one-hot loads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUTINGS = ("uniform", "zipf", "one-hot")
_SECOND = 0.05  # decrease in strength per further expert, so that the order of a token's choices is unambiguous
_NOISE = 0.5  # root mean square of a token's component besides its experts' directions, which have 1


class Shape(NamedTuple):
    """Sizes of one MoE layer."""

    T: int
    D: int
    F: int
    K: int
    E: int

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._asdict().items())

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Parse "T=2048,D=256,F=1024,K=2,E=8", in any order. Raises ValueError for another form."""
        try:
            fields = {name.strip(): int(value) for name, value in (part.split("=") for part in text.split(","))}
        except ValueError as error:
            raise ValueError(f"shape ({text!r}) must read like T=2048,D=256,F=1024,K=2,E=8") from error
        if set(fields) != set(cls._fields) or min(fields.values()) < 1 or fields["K"] > fields["E"]:
            raise ValueError(f"shape ({text!r}) must give T, D, F, K and E once, all at least 1, K at most E")
        return cls(**fields)


def choose(routing: str, shape: Shape, generator: torch.Generator) -> Tensor:
    """Choose distinct experts for each token. -> (T, K) int64.

    "uniform": every expert equally likely, drawn token by token. "zipf": expert e with weight 1/(e+1), drawn without
    replacement. "one-hot": the same K experts for every token. Raises ValueError for another name.
    """
    if routing == "one-hot":
        return torch.arange(shape.K).expand(shape.T, shape.K)
    if routing not in ROUTINGS:
        raise ValueError(f"routing ({routing!r}) must be one of: {', '.join(ROUTINGS)}")
    exponent = 1.0 if routing == "zipf" else 0.0
    log_weights = -exponent * torch.arange(1, shape.E + 1).log()
    gumbel = -torch.empty(shape.T, shape.E).exponential_(generator=generator).log()
    return (log_weights + gumbel).topk(shape.K, dim=1).indices  # Gumbel top-k draws without replacement


def make_router_weight(shape: Shape, generator: torch.Generator) -> Tensor:
    """(E, D) unit rows in random directions."""
    return torch.nn.functional.normalize(torch.randn(shape.E, shape.D, generator=generator), dim=1)


def make_tokens(routing: str, shape: Shape, router_weight: Tensor, generator: torch.Generator) -> Tensor:
    """(T, D) tokens that point at their experts' router rows, plus noise: top-k of x · router_weightᵀ chooses them.

    With hundreds of rows in few dimensions a few tokens choose differently: read the load from the routing.
    """
    experts = choose(routing, shape, generator)  # (T, K)
    strength = 1.0 - _SECOND * torch.arange(shape.K)  # (K,)
    direction = (router_weight[experts] * strength[:, None]).sum(dim=1)  # (T, D)
    direction = torch.nn.functional.normalize(direction, dim=1) * shape.D**0.5
    return direction + _NOISE * torch.randn(shape.T, shape.D, generator=generator)
