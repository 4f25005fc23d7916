"""What every test relies on, and a corpus and a run small enough to be started many times."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe.config import ModelConfig, MoEConfig

ROOT = Path(__file__).parents[1]
WORDS = [
    "the",
    "of",
    "expert",
    "token",
    "routes",
    "gate",
    "a",
    "small",
    "dense",
    "layer",
    "reads",
    "every",
    "second",
    "word",
    "and",
    "learns",
    "from",
    "it",
    "slowly",
]


def pytest_configure() -> None:
    """One thread per process: tensors here are small, and threads that share them wait longer than they compute."""
    torch.set_num_threads(1)
    os.environ.pop("PYTEST_ADDOPTS", None)  # the pytest runs that tests start have options of their own


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents of made-up sentences in one jsonl file."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "sentences.jsonl"
    with path.open("w") as file:
        for _ in range(120):
            text = " ".join(rng.choice(WORDS) for _ in range(60))
            file.write(f'{{"text": "{text}."}}\n')
    return path


@pytest.fixture(scope="session")
def overrides(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A sparse model of a few thousand parameters, ten steps, with dropout so that random state matters."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        "+moe=8e",
        "data=text",
        f"data.path={corpus}",
        "data.vocab_size=300",
        "data.num_workers=1",
        "data.validation_fraction=0.1",
        "data.test_fraction=0.1",
        f"data.cache_dir={cache}",
        "model.d_model=16",
        "model.d_ff=32",
        "model.expert_d_ff=8",
        "model.num_layers=2",
        "model.num_heads=2",
        "model.max_seq_len=32",
        "model.dropout=0.1",
        "train.num_steps=10",
        "train.batch_tokens=256",
        "train.micro_batch_size=4",
        "train.checkpoint_every=1",
        "train.histogram_every=2",
        "optim.warmup_steps=2",
        "eval.every=4",
        "eval.sample_tokens=16",
    ]


Command = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run a Python program of the checkout from an empty folder, as a user would."""

    def run(*arguments: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    return run


@pytest.fixture
def moe_config() -> MoEConfig:
    return MoEConfig(
        name="5e",
        num_experts=5,
        top_k=2,
        moe_every=2,
        router="topk",
        scores="softmax",
        normalize_weights=True,
        weight_scale=1.0,
        num_groups=None,
        top_groups=None,
        bias_balance_rate=None,
        jitter=None,
        second_policy="all",
        shared_d_ff=None,
        shared_gate=False,
        capacity_factor=None,
        eval_capacity_factor=None,
        load_balance_weight=0.01,
        load_balance_choices="all",
        load_balance_scope="local",
        load_balance_reduction="mean",
        router_z_loss_weight=0.001,
    )


@pytest.fixture
def model_config(moe_config: MoEConfig) -> Callable[..., ModelConfig]:
    """A factory of odd little models; `sparse=True` puts experts into every second layer."""

    def make(*, sparse: bool = False, **changes: object) -> ModelConfig:
        base = ModelConfig(
            name="test",
            d_model=12,
            d_ff=20,
            num_layers=3,
            num_heads=3,
            max_seq_len=24,
            vocab_size=37,
            norm="rmsnorm",
            position="rope",
            bias=False,
            moe=moe_config if sparse else None,
        )
        return replace(base, **changes)

    return make


@pytest.fixture(autouse=True)
def _fresh_random_state() -> None:
    """A test that draws from torch's own generator draws the same numbers alone and in company."""
    torch.manual_seed(0)
