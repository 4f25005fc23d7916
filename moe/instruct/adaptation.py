"""The model to tune: the checkpoint's, with the changes that tuning may make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.checkpoint import find_checkpoint, load_config
from moe.config import ModelConfig, MoEConfig, RunConfig, TuneConfig
from moe.layers.experts import Experts
from moe.layers.router import Router
from moe.model import Transformer

_SPARSE = (
    *("expert_dropout", "freeze_router", "load_balance_weight", "router_z_loss_weight"),
    *("dropless", "capacity_factor", "eval_capacity_factor"),
)


def tuned_config(config: RunConfig) -> RunConfig:
    """The configuration with the model, tokenizer and text format of the checkpoint in `init_from`.

    `model=` is ignored. Raises ValueError without a checkpoint or examples, and for options that the model does not
    have.
    """
    tune = config.tune
    assert tune is not None
    tune.require_source()
    if config.init_from is None:
        raise ValueError(
            "init_from must name the model to tune: a run folder, a checkpoint, or a folder from `moe convert`"
        )
    checkpoint = find_checkpoint(Path(config.init_from))
    stored = load_config(checkpoint)
    data = replace(
        config.data, tokenizer=str(checkpoint), text_format=stored.data.text_format, allow_lossy_tokenizer=True
    )
    return replace(config, model=tuned_model(stored.model, tune), data=data)


def tuned_model(model: ModelConfig, tune: TuneConfig) -> ModelConfig:
    """The model's shape, unchanged, with the tuning run's dropout and balancing."""
    named = {"dropout": tune.dropout, "attention_dropout": tune.attention_dropout}
    changes: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if model.moe is not None:
        return replace(model, moe=_tuned_experts(model.moe, tune), **changes)
    # `in (None, False)` would also skip a requested weight of 0
    given = [name for name in _SPARSE if getattr(tune, name) is not None and getattr(tune, name) is not False]
    if given:
        raise ValueError(f"tune.{given[0]} is for models with experts, and {model.name} is dense: leave it out")
    return replace(model, **changes)


def _tuned_experts(moe: MoEConfig, tune: TuneConfig) -> MoEConfig:
    if tune.freeze_router and moe.bias_balance_rate is not None:
        raise ValueError(
            "tune.freeze_router=true would not stop the updates of this model's balancing biases "
            "(model.moe.bias_balance_rate): set tune.freeze_router=false"
        )
    if tune.dropless and moe.router == "gshard":
        raise ValueError("tune.dropless=true: this model's routers (gshard) always have a capacity; set it to false")
    names = ("load_balance_weight", "router_z_loss_weight", "capacity_factor", "eval_capacity_factor")
    changes = {name: getattr(tune, name) for name in names if getattr(tune, name) is not None}
    if tune.dropless:
        changes |= {"capacity_factor": None, "eval_capacity_factor": None}
    return replace(moe, **changes)


def adapt_modules(model: Transformer, tune: TuneConfig) -> None:
    """Freeze the routers and set the experts' dropout, in place; call before the optimizer is created."""
    for module in model.modules():
        if tune.freeze_router and isinstance(module, Router):
            module.requires_grad_(False)
        if tune.expert_dropout is not None and isinstance(module, Experts):
            module.dropout = tune.expert_dropout
