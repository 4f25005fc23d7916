"""A tokenizer and a run configuration that cost nothing, for tests of what is saved and read."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from moe.data.tokenizer import Tokenizer, train_tokenizer


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
