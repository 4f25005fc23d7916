"""A whole training step: the presets, and OLMoE's shape beside transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.compose import compose
from moe.model import Transformer

from . import counts, models
from .contender import Contender
from .suite import FASTEST_PEER, Ratio, Suite


def bench_step_of_presets(suite: Suite) -> None:
    """One step of the default model and its sparse twins, as `python train.py` takes it."""
    names = ["dense", "8e", "64e", "512e"][: 3 if suite.options.small else 4]
    contenders = []
    for name in names:
        overrides = ["model.vocab_size=4096"] + ([] if name == "dense" else [f"+moe={name}"])
        config = compose(overrides)
        model = models.our_model(config.model, suite.device)
        batch = 2 if suite.options.small else config.batch_size
        tokens = torch.randint(4096, (batch, config.seq_len), device=suite.device)
        forward, backward = models.our_step(model, models.optim_config(), tokens, tokens)
        cost = counts.step_cost(config.model, tokens.numel(), config.seq_len)
        contenders.append(Contender(name, forward, cost, backward, backend="auto", unchecked="tests compare the model"))
    suite.run(f"training step, tiny, {'512' if suite.options.small else '4096'} tokens", contenders)


def _loss_alone(loss: Tensor, _: Any) -> Mapping[str, Tensor]:
    return {"loss": loss.detach()}


def _contender(
    name: str, cost: counts.Cost, step: tuple[Callable[[], Tensor], Callable[[Tensor], None]], **options: Any
) -> Contender:
    forward, backward = step
    return Contender(name, forward, cost, backward, outcome=_loss_alone, **options)


def bench_step_of_olmoe(suite: Suite) -> None:
    """Ours and transformers' with its experts' implementations and AdamW fused, its best, and in a loop of foreach."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    small = suite.options.small
    config = models.small_olmoe(small=small)
    assert config.moe is not None
    config = replace(config, moe=replace(config.moe, router_z_loss_weight=0.0))  # transformers' model has none
    batch, length = (2, 64) if small else (8, 256)
    tokens = torch.randint(config.vocab_size or 0, (batch, length), device=suite.device)
    targets = tokens.roll(-1, dims=1)
    model: Transformer = models.our_model(config, suite.device)
    cost = counts.step_cost(config, tokens.numel(), length)
    contenders = [_contender("ours", cost, models.our_step(model, models.optim_config(), tokens, targets))]
    for implementation, fused in (("grouped_mm", True), ("grouped_mm", False), ("eager", True)):
        theirs = models.transformers_olmoe(model, implementation)
        kind = {"fused": True} if fused else {"foreach": True}
        step = models.transformers_step(theirs, models.adamw(theirs.parameters(), **kind), tokens, targets)
        name = f"transformers {implementation}, {'fused' if fused else 'foreach'} AdamW"
        contenders.append(_contender(name, cost, step, peer=True))
    reference = replace(contenders[1], name="transformers")
    contenders = [replace(c, reference=reference) for c in contenders]
    contenders[1] = replace(contenders[1], reference=None, unchecked="the reference")
    limit = None if small else 0.5
    suite.run(
        f"training step, OLMoE in small, {tokens.numel()} tokens, E=64 K=8",
        contenders,
        ratios=[Ratio("ours [fp32]", FASTEST_PEER, limit)],
    )
