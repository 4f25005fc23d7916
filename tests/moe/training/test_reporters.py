from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moe.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from moe.training.metrics import read_metrics
from moe.training.reporters import open_reporters
from tests.moe.training.step_metrics import METRICS


@pytest.fixture
def config(model_config: Callable[..., ModelConfig]) -> RunConfig:
    return RunConfig(
        model=model_config(sparse=False),
        data=DataConfig(name="python", seq_len=8),
        optim=OptimConfig(lr=0.01, warmup_steps=5),
        train=TrainConfig(num_steps=6, batch_tokens=8),
        eval=EvalConfig(),
    )


def started(config: RunConfig, run_dir: Path, *, after_step: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said where reporters begin; they log two steps."""
    capsys.readouterr()
    reporters = open_reporters(config, run_dir, after_step=after_step)
    said = capsys.readouterr().err
    for reporter in reporters:
        for step in (1, 2):
            reporter.step(replace(METRICS, step=after_step + step))
        reporter.close()
    return said


def test_steps_that_no_checkpoint_has_are_said_to_be_lost(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started(config, tmp_path, after_step=0, capsys=capsys) == ""
    assert started(config, tmp_path, after_step=2, capsys=capsys) == ""
    said = started(config, tmp_path, after_step=0, capsys=capsys)
    assert said.startswith(
        f"4 logged steps are lost, and {tmp_path} begins again: no checkpoint was saved; set train.c"
    )
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_warm_up_without_an_end_is_said(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, optim=replace(config.optim, warmup_steps=12))
    said = started(config, tmp_path, after_step=0, capsys=capsys)
    assert said.startswith("warning: optim.warmup_steps (12) is not below train.num_steps (6)")
    assert "to 0.5 of optim.lr" in said
    assert len(said.splitlines()) == 1
