"""A tokenizer and a run configuration that cost nothing, for tests of what is saved and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe.checkpoint import TrainState, save_checkpoint
from moe.compose import to_yaml
from moe.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from moe.data.tokenizer import Tokenizer, train_tokenizer
from moe.model import Transformer

STATE = TrainState(step=3, tokens=96, flops=1.5, seconds=0.25, skipped_steps=1)
Save = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat. " * 20, "a dog ran to the red log. " * 20], 300)


@pytest.fixture
def config(model_config: Callable[..., ModelConfig]) -> RunConfig:
    return RunConfig(
        model=model_config(sparse=True),
        data=DataConfig(name="python", seq_len=8),
        optim=OptimConfig(lr=0.01),
        train=TrainConfig(num_steps=6, batch_tokens=32, micro_batch_size=4),
        eval=EvalConfig(),
    )


@pytest.fixture
def tight_model(model_config: Callable[..., ModelConfig]) -> Callable[..., Transformer]:
    """A factory of models whose experts have room for half of their mean rows in evaluation: batch mates compete."""

    def make(vocab_size: int, **changes: object) -> Transformer:
        config = model_config(sparse=True, vocab_size=vocab_size, **changes)
        assert config.moe is not None
        model = Transformer(replace(config, moe=replace(config.moe, eval_capacity_factor=0.5)), dtype=torch.float64)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return model

    return make


@pytest.fixture
def save(tmp_path: Path, config: RunConfig, tokenizer: Tokenizer) -> Save:
    def call(
        model: Transformer, optimizer: torch.optim.Optimizer, state: TrainState = STATE, **options: int | None
    ) -> Path:
        return save_checkpoint(
            tmp_path / "checkpoints",
            model=model,
            optimizer=optimizer,
            state=state,
            config_yaml=to_yaml(config),
            tokenizer=tokenizer,
            **({"keep_last": 2} | options),
        )

    return call
