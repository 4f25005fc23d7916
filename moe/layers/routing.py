"""What a router decides: the Routing of T tokens, and its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_FORMAT = "moe.routings"
_VERSION = "1"


class Routing(NamedTuple):
    """The decision for T tokens. Losses, statistics and replays are functions of it alone."""

    router_logits: Tensor  # (T, E)
    router_probs: Tensor  # (T, E), before the top-k choice; sigmoid scores need not sum to 1
    expert_indices: Tensor  # (T, K) int64, best first
    expert_weights: Tensor  # (T, K), zero where not kept
    chosen: Tensor  # (T, K) bool: the router's choices; false for masked tokens and second choices left out
    kept: Tensor  # (T, K) bool: the chosen pairs that found room
    token_mask: Tensor | None  # (T,) bool, false for padding; None means all tokens are valid
    sequence_ids: Tensor | None  # (T,) int64, the sequence each token belongs to; None means one sequence
    tokens_per_expert: Tensor  # (E,) int64, how often each expert is chosen


class Load(Protocol):
    """Anything that counts how often each expert was chosen: a Routing or its statistics."""

    @property
    def tokens_per_expert(self) -> Tensor: ...


def valid_choices(expert_indices: Tensor, token_mask: Tensor | None) -> Tensor:
    """(T, K) bool: true except for masked tokens."""
    if token_mask is None:
        return torch.ones_like(expert_indices, dtype=torch.bool)
    return token_mask[:, None].expand_as(expert_indices)


def count_assignments(expert_indices: Tensor, chosen: Tensor, num_experts: int) -> Tensor:
    """How often each expert is chosen. (T, K) int64, (T, K) bool -> (E,) int64."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=expert_indices.device)
    return counts.scatter_add_(0, expert_indices.flatten(), chosen.flatten().to(torch.int64))


def detach_routings(routings: Sequence[Routing]) -> tuple[Routing, ...]:
    """The same routings without their graphs, so that keeping them keeps no activations alive."""
    return tuple(
        Routing._make(field.detach() if isinstance(field, Tensor) else field for field in routing)
        for routing in routings
    )


def save_routings(path: str | Path, routings: Sequence[Routing]) -> None:
    """Write the routings of one forward pass, in layer order, to one safetensors file.

    For replay (`layer(x, routing=recorded)`), for instance of a sampler's choices in the training step that follows.
    """
    from safetensors.torch import save_file  # imported here so that moe.layers loads only torch

    tensors = {
        f"{i}.{name}": field.detach().cpu().clone(memory_format=torch.contiguous_format)  # fields may share memory
        for i, routing in enumerate(routings)
        for name, field in routing._asdict().items()
        if field is not None
    }
    save_file(tensors, str(path), {"format": _FORMAT, "version": _VERSION, "count": json.dumps(len(routings))})


def load_routings(path: str | Path, device: torch.device | str = "cpu") -> tuple[Routing, ...]:
    """Read what `save_routings` wrote. Raises ValueError if the file is of another kind or lacks a tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
                raise ValueError(f"{path} holds no routings in this version's format: write it with save_routings")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    routings = [
        {name: tensors.get(f"{i}.{name}") for name in Routing._fields} for i in range(json.loads(metadata["count"]))
    ]
    for i, fields in enumerate(routings):
        missing = [n for n, field in fields.items() if field is None and n not in ("token_mask", "sequence_ids")]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)} of routing {i}")
    return tuple(Routing(**fields) for fields in routings)  # type: ignore[arg-type]
