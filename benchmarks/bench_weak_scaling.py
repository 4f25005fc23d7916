"""Weak scaling: the same number of tokens per process, for any number of processes.

1, 2 and 4 processes train one MoE model whose experts they share; each brings its own tokens. With at least as many
cores as processes, a step would ideally take as long as with one process; beyond that they take turns.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

import pytest
import torch

from moe.checkpoint import TrainState
from moe.compose import compose
from moe.config import RunConfig
from moe.data.loader import TokenBatch
from moe.distributed.world import World
from moe.run import build_model
from moe.training.optimizer import make_optimizer
from moe.training.trainer import Trainer

from .processes import run_ranks
from .suite import Row, Suite

VOCABULARY = 4096
RANKS = (1, 2, 4)


class _RandomTokens:
    """Stands in for the loader: the same number of random tokens on every rank."""

    def __init__(self, config: RunConfig, rank: int, num_ranks: int) -> None:
        self._shape = (config.batch_size // num_ranks, config.seq_len + 1)
        self._rank = rank

    def batch(self, step: int) -> TokenBatch:
        generator = torch.Generator().manual_seed(step * 64 + self._rank)
        stream = torch.randint(VOCABULARY, self._shape, generator=generator)
        return TokenBatch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), None, None)


def _config(num_ranks: int, small: bool) -> RunConfig:
    tokens = 512 if small else 2048
    return compose(
        [
            f"+moe={'8e' if small else '64e'}",
            f"model.vocab_size={VOCABULARY}",
            f"train.batch_tokens={tokens * num_ranks}",
            f"parallel.ep_size={num_ranks}",
        ]
    )


def _program(world: World, small: bool, num_steps: int) -> list[dict[str, Any]]:
    """Seconds, loss and tokens of each step after the first."""
    alone = world.size == 1
    world = world._replace(group=None) if alone else world
    config = _config(world.size, small)
    model = build_model(config, world)
    trainer = Trainer(
        model=model,
        optimizer=make_optimizer(model, config.optim),
        loader=_RandomTokens(config, world.rank, world.size),
        config=config,
        state=TrainState(),
        flops_per_token=1.0,
        reporters=[],
        validate=dict,
        save=lambda state: None,
        world=world,
    )
    steps = [trainer.step() for _ in range(num_steps + 1)][1:]
    tokens = config.train.batch_tokens
    return [{"seconds": tokens / step.tokens_per_second, "loss": step.loss, "tokens": tokens} for step in steps]


def bench_weak_scaling(suite: Suite) -> None:
    if suite.device.type != "cpu":
        pytest.skip("needs a GPU for each rank: start train.py under torchrun there")
    options = suite.options
    num_steps = options.few_rounds if options.flops else 1
    sizes = RANKS if options.flops else RANKS[1:2]
    steps = {num_ranks: run_ranks(_program, num_ranks, options.small, num_steps)[0] for num_ranks in sizes}
    for taken in steps.values():
        assert all(step["loss"] == step["loss"] for step in taken)
    if not options.flops:
        return
    one = statistics.median(step["seconds"] for step in steps[1])
    cores = os.cpu_count() or 1
    for num_ranks, taken in steps.items():
        seconds = [step["seconds"] for step in taken]
        median = statistics.median(seconds)
        efficiency = one / median
        of_cores = efficiency * max(1.0, num_ranks / cores)
        suite.rows.append(
            Row(
                case=f"weak scaling, {taken[0]['tokens'] // num_ranks} tokens and one thread for each process, E=64",
                name=f"{num_ranks} processes, {taken[0]['tokens'] / median:,.0f} tokens/s",
                dtype="fp32",
                backend="",
                routing="",
                check=f"efficiency {efficiency:.0%}, of the {min(num_ranks, cores)} cores {of_cores:.0%}",
                seconds=median,
                spread=(max(seconds) - min(seconds)) / 2 / median,
                wall_seconds=median,
                rounds=len(seconds),
                to_first=median / one,
            )
        )
