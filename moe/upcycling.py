"""Turn a dense model's checkpoint into its sparse twin's, which computes the same function at step 0."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import torch

from moe.checkpoint import TrainState, load_config, load_model, load_tokenizer, save_checkpoint
from moe.compose import overrides_for, to_yaml
from moe.config import ModelConfig, MoEConfig
from moe.layers.feed_forward import FeedForward
from moe.layers.initialization import DEFAULT_INIT
from moe.layers.moe import MoE
from moe.layers.upcycle import upcycle
from moe.model import Transformer


@torch.no_grad()
def upcycle_model(model: Transformer, moe: MoEConfig, *, granularity: int = 1, seed: int = 0) -> Transformer:
    """The sparse twin of a dense model: experts where `moe` places them, everything else copied bit for bit.

    The router's `weight_scale` becomes `granularity` and the experts' width d_ff / granularity (moe.layers.upcycle has
    the mathematics). Raises ValueError for a model that already has experts, and for options of `moe` that would not
    preserve the function.
    """
    config = upcycled_config(model.config, moe, granularity)
    weight = model.embedding.weight
    sparse = Transformer(config, backend=model.backend, device=weight.device, dtype=weight.dtype)
    dense_tensors = model.state_dict()
    for name, tensor in sparse.state_dict().items():
        if name in dense_tensors:
            tensor.copy_(dense_tensors[name])
    for i in config.moe_layers:
        dense, target = model.layers[i].feed_forward, sparse.layers[i].feed_forward
        assert isinstance(dense, FeedForward)
        assert isinstance(target, MoE)
        made = upcycle(
            dense, moe.num_experts, moe.top_k, granularity=granularity, seed=seed, layer=i, init=DEFAULT_INIT
        )
        target.experts.load_state_dict(made.experts.state_dict())
        target.router.reset_parameters(seed, i)
        target.router.weight.copy_(made.router.weight)
    return sparse.train(model.training)


def upcycled_config(dense: ModelConfig, moe: MoEConfig, granularity: int) -> ModelConfig:
    """The sparse model's shape. Raises ValueError as `upcycle_model` does."""
    if dense.moe is not None:
        raise ValueError(
            f"model {dense.name} has experts ({dense.moe.name}) already: upcycling starts from a dense one"
        )
    if granularity < 1 or dense.d_ff % granularity != 0:
        raise ValueError(f"granularity ({granularity}) must be at least 1 and divide model.d_ff ({dense.d_ff})")
    wrong = {
        "router": (moe.router, "topk"),
        "normalize_weights": (moe.normalize_weights, True),
        "capacity_factor": (moe.capacity_factor, None),
        "eval_capacity_factor": (moe.eval_capacity_factor, None),
        "shared_d_ff": (moe.shared_d_ff, None),
    }
    for name, (value, needed) in wrong.items():
        if value != needed:
            raise ValueError(
                f"model.moe.{name} ({value}) must be {'null' if needed is None else str(needed).lower()} to upcycle: "
                f"with another value the sparse model does not compute what the dense one does"
            )
    return replace(dense, moe=replace(moe, weight_scale=float(granularity)), expert_d_ff=dense.d_ff // granularity)


def upcycle_checkpoint(source: Path, destination: Path, moe: MoEConfig, *, granularity: int = 1, seed: int = 0) -> Path:
    """Write the sparse twin of the dense checkpoint at `source`; returns the new checkpoint's folder.

    It holds weights, configuration and tokenizer but no optimizer state, for `init_from=`, `load_model` or
    `moe generate`. Raises ValueError if `destination` is not empty.
    """
    if destination.exists() and any(destination.iterdir()):
        raise ValueError(f"{destination} is not empty: name a new folder")
    config = load_config(source)
    model = upcycle_model(load_model(source), moe, granularity=granularity, seed=seed)
    return save_checkpoint(
        destination / "checkpoints",
        model=model,
        optimizer=None,
        state=TrainState(),
        config_yaml=to_yaml(replace(config, model=model.config)),
        tokenizer=load_tokenizer(source),
        keep_last=1,
    )


def train_command(made: Path, preset: str) -> str:
    """The command that continues training from what `upcycle_checkpoint` made with a preset of configs/moe.

    Its model fits the weights and its tokenizer is the same; the text is the dense run's, or the default for an
    imported checkpoint.
    """
    config, tokenizer = load_config(made), load_tokenizer(made)
    if config.model.vocab_size == tokenizer.vocab_size:  # a run would set it itself
        config = replace(config, model=replace(config.model, vocab_size=None))
    if config.data.tokenizer is None and config.data.vocab_size != tokenizer.vocab_size:  # a run would train another
        config = replace(config, data=replace(config.data, tokenizer=str(made)))
    config = replace(config, data=replace(config.data, num_workers=None))
    parts = ("model", "data", "train.batch_tokens", "train.micro_batch_size")
    return shlex.join(["python", "train.py", f"init_from={made}", *overrides_for(config, parts, f"+moe={preset}")])
