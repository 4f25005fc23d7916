"""A run that is killed or stopped and continued leaves exactly what an undisturbed one leaves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe.checkpoint import find_checkpoint
from moe.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
NOT_COMPARED = {"seconds", "tokens_per_second"}  # wall-clock


def losses(run_dir: Path) -> list[dict]:
    return [
        {key: value for key, value in record.items() if key not in NOT_COMPARED}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    merged = {}
    for file in find_checkpoint(run_dir).glob("*.safetensors"):
        merged |= load_file(file)
    return merged


def assert_same_run(actual: Path, expected: Path) -> None:
    assert losses(actual) == losses(expected)
    a, e = tensors(actual), tensors(expected)
    assert a.keys() == e.keys()
    assert all(torch.equal(a[key], e[key]) for key in e)
    assert (actual / "samples.txt").read_text() == (expected / "samples.txt").read_text()
    scores = [json.loads((run / "results.json").read_text())["splits"] for run in (actual, expected)]
    assert scores[0] == scores[1]


def start(overrides: list[str], run_dir: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *overrides, f"run_dir={run_dir}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def undisturbed(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(overrides, run_dir)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return run_dir


def test_killed_at_random_moments(overrides: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """kill -9 after random delays, each from the first sign of the run's folder on; checkpoints come every step."""
    run_dir, rng, kills = tmp_path / "run", random.Random(0), 0
    for _ in range(3):
        process = start(overrides, run_dir)
        while not (run_dir / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills > 0
    process = start(overrides, run_dir)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert_same_run(run_dir, undisturbed)


def test_killed_while_a_checkpoint_is_written(overrides: list[str], undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(overrides, run_dir)
    partial = run_dir / "checkpoints" / ".partial_step_00000005"
    while not partial.exists() and process.poll() is None:
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    process = start(overrides, run_dir)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert_same_run(run_dir, undisturbed)


def test_stopped_by_sigterm(overrides: list[str], undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start([*overrides, "train.checkpoint_every=1000"], run_dir)
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "SIGTERM: saved step" in output
    assert not (run_dir / "results.json").exists()
    process = start([*overrides, "train.checkpoint_every=1000"], run_dir)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "continuing" in output
    assert_same_run(run_dir, undisturbed)
