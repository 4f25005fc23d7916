"""One training step of the default models, as `python train.py` takes it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe.compose import compose
from moe.model import Transformer
from moe.scaling.flops import flops_per_token
from moe.scaling.params import count_params
from moe.training.loss import compute_loss
from moe.training.optimizer import make_optimizer

from .conftest import Contender


def step(*overrides: str) -> Contender:
    config = compose(["model.vocab_size=4096", *overrides])
    model = Transformer(config.model)
    model.reset_parameters(0)
    optimizer = make_optimizer(model, config.optim)
    tokens = torch.randint(4096, (config.batch_size, config.seq_len))

    def call() -> None:
        optimizer.zero_grad()
        compute_loss(model(tokens, tokens), None, config.model.moe).loss.backward()
        optimizer.step()

    flops = flops_per_token(config.model, config.seq_len).training * config.train.batch_tokens
    # gradient written and read, weight and two moments read and written
    name = "dense" if config.model.moe is None else config.model.moe.name
    return Contender(name, call, flops, 32.0 * count_params(config.model).total)


def bench_step(compare: Callable[[str, list[Contender]], None]) -> None:
    compare("step, tiny, 4096 tokens", [step(), step("+moe=8e"), step("+moe=64e"), step("+moe=512e")])
