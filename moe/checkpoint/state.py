"""The content of a checkpoint, taken from a model and its optimizer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.checkpoint.divergence import DivergedError
from moe.checkpoint.folders import list_checkpoints
from moe.data.tokenizer import Tokenizer
from moe.distributed.mesh import local_tensor


@dataclass
class TrainState:
    """The progress of a run: all that is not a tensor. The data order follows from `step` alone."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0  # useful training FLOPs
    seconds: float = 0.0  # spent in steps
    skipped_steps: int = 0  # updates skipped because loss or gradient was not finite
    skipped_in_a_row: int = 0
    loss_scale: float | None = None  # only with train.precision=fp16
    steps_since_overflow: int = 0


class Snapshot(NamedTuple):
    """The content of one checkpoint: this rank's part of the tensors, and what is the same on all ranks."""

    tensors: dict[str, Tensor]  # DTensors if the model is sharded across ranks
    step: int
    state_json: str
    config_yaml: str
    tokenizer: Tokenizer


def take_snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: TrainState,
    *,
    config_yaml: str,
    tokenizer: Tokenizer,
) -> Snapshot:
    """The content to save now. The tensors are the model's own, not copies."""
    tensors = model_tensors(model)
    if optimizer is not None:
        tensors |= optimizer_tensors(model, optimizer)
    return Snapshot(tensors, state.step, json.dumps(asdict(state)), config_yaml, tokenizer)


def copy_to_host(snapshot: Snapshot, earlier: Snapshot | None = None) -> Snapshot:
    """A copy with tensors in host memory that nobody else changes, reusing those of an `earlier` copy that fit."""
    copies: dict[str, Tensor] = {}
    for key, tensor in snapshot.tensors.items():
        copy = None if earlier is None else earlier.tensors.get(key)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copies[key] = tensor.detach().to("cpu", copy=True)
        else:
            local_tensor(copy).copy_(local_tensor(tensor))
            copies[key] = copy
    return snapshot._replace(tensors=copies)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under `model.<name>`; tied ones once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[f"model.{name}"] = tensor.detach()
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under `optim.<parameter>.<key>`; empty before the first update."""
    return {
        f"optim.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def refuse_non_finite(snapshot: Snapshot, folder: Path) -> None:
    """Raise DivergedError naming the first tensor whose part on this rank holds NaN or infinity.

    folder: the run's earlier checkpoints; the error advises to continue from the newest.
    """
    poisoned = [key for key, tensor in snapshot.tensors.items() if not _is_finite(local_tensor(tensor))]
    if poisoned:
        earlier = list_checkpoints(folder)
        source = f"from the last checkpoint, run_dir=NEW init_from={earlier[-1]}," if earlier else "in another run_dir"
        raise DivergedError(
            f"step {snapshot.step} is not saved: {poisoned[0]} ({len(poisoned)} tensors in all) is not finite; "
            f"start another run {source} with a lower optim.lr or with optim.clip_norm"
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:  # a shard may be empty and then has no maximum
        return True
    numbers = tensor if tensor.is_floating_point() else tensor.float()
    # the infinity norm is the largest magnitude and passes a NaN on, without a mask the size of the tensor
    return bool(torch.linalg.vector_norm(numbers, float("inf")).isfinite())
