"""A whole training step: the presets, and OLMoE's shape next to transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from moe.compose import compose

from . import counts, models
from .contender import Contender
from .suite import Ratio, Suite


def bench_step_of_presets(suite: Suite) -> None:
    """One step of the default model and its sparse twins, as in `python train.py`."""
    names = ["dense", "64e" if suite.options.small else "512e"]
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
    suite.run(f"training step, tiny, {'512' if suite.options.small else '4096'} tokens", contenders, few=True)


@pytest.mark.default_memory
def bench_step_of_olmoe_with_default_memory(default_memory: Suite) -> None:
    """Both as in a program that sets nothing; ours with persistent_grad."""
    # eager's single sample, at five times grouped_mm's time, would take 17 of the default run's 300 seconds
    implementations = ("grouped_mm", "eager") if default_memory.options.all_rows else ("grouped_mm",)
    _compare_olmoe(default_memory, "default memory, ", implementations)


def bench_step_of_olmoe(suite: Suite) -> None:
    """Both with the trainer's memory settings. Limits apply to default memory only."""
    if not suite.options.all_rows:
        pytest.skip("with --full: the same step with default memory is above")
    _compare_olmoe(suite, "", ("grouped_mm",))


def _compare_olmoe(suite: Suite, memory: str, implementations: Sequence[str]) -> None:
    """Ours and transformers' with each of its expert implementations, both with fused AdamW, which is its fastest."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    small = suite.options.small
    config = models.small_olmoe(small=small)
    assert config.moe is not None
    config = replace(config, moe=replace(config.moe, router_z_loss_weight=0.0))  # transformers' model has none
    batch, length = (2, 64) if small else (4, 256)
    tokens = torch.randint(config.vocab_size or 0, (batch, length), device=suite.device)
    targets = tokens.roll(-1, dims=1)
    model = models.our_model(config, suite.device)
    cost = counts.step_cost(config, tokens.numel(), length)
    contenders = []
    # mixed precision, as with train.precision=bf16: float32 weights, matrix products in bfloat16 by autocast
    for dtype in [dtype for dtype in (torch.float32, torch.bfloat16) if dtype in suite.options.torch_dtypes]:
        ours = model if dtype == torch.float32 else models.our_model(config, suite.device)
        step = models.mixed(models.our_step(ours, models.optim_config(), tokens, targets), dtype, suite.device)
        contenders.append(Contender("ours", step[0], cost, step[1], dtype, outcome=models.our_cross_entropy))
        for implementation in implementations if dtype == torch.float32 else ("grouped_mm",):  # eager is even slower
            theirs = models.transformers_olmoe(model, implementation)
            step = models.transformers_step(theirs, models.adamw(theirs.parameters(), fused=True), tokens, targets)
            step = models.mixed(step, dtype, suite.device)
            name, outcome = f"transformers {implementation}", models.their_cross_entropy(theirs)
            contenders.append(Contender(name, step[0], cost, step[1], dtype, peer=True, outcome=outcome))
    if not contenders:
        pytest.skip("needs --dtype fp32 or bf16")
    reference = next(c for c in contenders if c.peer)
    contenders = [
        replace(c, unchecked="the reference") if c is reference else replace(c, reference=reference) for c in contenders
    ]
    limit = None if small else 0.5
    peers = [c for c in contenders if c.peer]
    suite.run(
        f"training step, {memory}OLMoE in small, {tokens.numel()} tokens, E=64 K=8",
        contenders,
        ratios=[Ratio(f"ours {c.label[c.label.index('[') :]}", c.label, limit) for c in peers],
        few=True,  # the limit is far away
    )
