"""Reading a checkpoint into a model of any sharding, whatever the writer's was."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from moe.checkpoint.agreement import agreement
from moe.checkpoint.consolidation import MODEL_FILE
from moe.checkpoint.folders import find_checkpoint, verify_checkpoint
from moe.checkpoint.state import TrainState, model_tensors, optimizer_tensors
from moe.checkpoint.storage import read_tensors, stored_shapes
from moe.compose import from_yaml
from moe.config import RunConfig
from moe.data.tokenizer import Tokenizer, open_tokenizer
from moe.distributed.world import World
from moe.model import Transformer


def load_checkpoint(
    path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, world: World | None = None
) -> TrainState:
    """Verify a checkpoint, load it into `model` and `optimizer`, in place, and return the counters.

    world: the ranks that share the model, all of which must call; each reads its part. Their number and axes may differ
    from the writer's. Raises ValueError, on all ranks alike, if a file is damaged or the tensors do not fit.
    """
    verify_checkpoint(path, world)
    with agreement(None if world is None else world.group):
        if is_consolidated(path):
            raise ValueError(
                f"{path} holds weights alone, from `moe convert`, and a run cannot continue from it; start another run "
                f"with init_from={path}"
            )
        state, stored = _read_state(path), stored_shapes(path)
        tensors = model_tensors(model)
        _require_same_tensors(path, tensors, {key: shape for key, shape in stored.items() if key.startswith("model.")})
        _make_room(model, optimizer, stored)
        tensors |= optimizer_tensors(model, optimizer)
        read_tensors(path, tensors)
        return state


def load_config(path: Path | str) -> RunConfig:
    """The configuration in the checkpoint at `path`. Raises ValueError naming the file if it is not valid."""
    file = find_checkpoint(Path(path)) / "config.yaml"
    try:
        return from_yaml(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer in the checkpoint at `path`, of any kind, with the text format it was trained with."""
    checkpoint = find_checkpoint(Path(path))
    return open_tokenizer(checkpoint, text_format=load_config(checkpoint).data.text_format, allow_lossy=True)


def load_model(path: Path | str, *, device: torch.device | str = "cpu") -> Transformer:
    """The model of a run folder or checkpoint, whole on one device, in evaluation mode.

    Raises ValueError if it is damaged.
    """
    checkpoint = find_checkpoint(Path(path))
    verify_checkpoint(checkpoint)  # including its configuration, before it is read
    config = load_config(checkpoint)
    model = Transformer(config.model, backend=config.backend, device="meta").to_empty(device=device)
    _read_weights(checkpoint, model)
    return model.eval()


def load_weights(path: Path | str, *, model: nn.Module, world: World | None = None) -> None:
    """Load the weights of a run folder or checkpoint into `model`, in place. Raises ValueError if they do not fit.

    world: as in `load_checkpoint`.
    """
    checkpoint = find_checkpoint(Path(path))
    verify_checkpoint(checkpoint, world)
    with agreement(None if world is None else world.group):
        _read_weights(checkpoint, model)


def _read_weights(checkpoint: Path, model: nn.Module) -> None:
    tensors, stored = model_tensors(model), stored_shapes(checkpoint)
    if is_consolidated(checkpoint):
        tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    else:
        stored = {key: shape for key, shape in stored.items() if key.startswith("model.")}
    _require_same_tensors(checkpoint, tensors, stored)
    read_tensors(checkpoint, tensors)


def _read_state(checkpoint: Path) -> TrainState:
    file = checkpoint / "state.json"
    values = json.loads(file.read_text())
    unknown = sorted(values.keys() - {field.name for field in fields(TrainState)})
    if unknown:
        raise ValueError(
            f"{file} is of another version: it has {', '.join(unknown)}. Continue with the version that wrote it, or "
            f"start another run with init_from={checkpoint}"
        )
    return TrainState(**values)


def is_consolidated(checkpoint: Path) -> bool:
    """Whether it is one file of weights, named as in the model's own state_dict."""
    return (checkpoint / MODEL_FILE).is_file()


def _make_room(model: nn.Module, optimizer: torch.optim.Optimizer, stored: dict[str, tuple[int, ...]]) -> None:
    """Replace the optimizer's state, in place, by unfilled tensors for exactly what the checkpoint has."""
    optimizer.state.clear()
    fused = {p for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for name, parameter in model.named_parameters():
        prefix = f"optim.{name}."
        for key in (key for key in stored if key.startswith(prefix) and "." not in key[len(prefix) :]):
            if key.endswith(".step"):  # the fused kernel reads it on the parameter's device, others on the host
                where = parameter.device if parameter in fused else torch.device("cpu")
                value: Tensor = torch.zeros((), dtype=torch.float32, device=where)
            else:
                value = torch.empty_like(parameter)
            optimizer.state[parameter][key[len(prefix) :]] = value


def _require_same_tensors(path: Path, model: dict[str, Tensor], stored: dict[str, tuple[int, ...]]) -> None:
    problems = [f"missing {key}" for key in model.keys() - stored.keys()]
    problems += [f"unused {key}" for key in stored.keys() - model.keys()]
    problems += [
        f"{key} is {stored[key]}, the model's is {tuple(model[key].shape)}"
        for key in model.keys() & stored.keys()
        if stored[key] != tuple(model[key].shape)
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise ValueError(f"{path} does not fit the model: {shown} ({len(problems)} differences)")
