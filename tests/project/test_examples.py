"""The examples run as a reader would run them, learn something, and stay short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = {  # name: steps that it prints
    "plain_pytorch": 30,
    "replace_mlps_in_transformers": 15,
}
LONGEST_EXAMPLE = 60
FALL = 0.5  # the last loss is below this part of the first: 0.001 and 0.18 when written
EXPERTS, LAYERS, TOKENS, TOP_K = 8, 2, 16 * 32, 2


def output_of(name: str) -> str:
    """What the example prints in a process and a folder of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    path = ROOT / "examples" / f"{name}.py"
    result = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def losses(output: str) -> list[tuple[float, float]]:
    """(loss, load balance) of every step."""
    lines = re.findall(r"^step \d+: loss ([\d.]+), load balance ([\d.]+)$", output, re.MULTILINE)
    return [(float(loss), float(balance)) for loss, balance in lines]


def check_losses(name: str, output: str) -> None:
    steps = losses(output)
    assert len(steps) == EXAMPLES[name]
    assert steps[-1][0] < FALL * steps[0][0]
    for _, balance in steps:
        assert 0.0 < balance <= EXPERTS  # 1 is balance


def test_plain_pytorch() -> None:
    output = output_of("plain_pytorch")
    check_losses("plain_pytorch", output)
    pattern = r"busiest expert ([\d.]+) times the mean, (\d+) without tokens, entropy ([\d.]+) nats, dropped ([\d.]+)%"
    statistics = re.findall(pattern, output)
    assert len(statistics) == LAYERS
    for load, dead, entropy, dropped in statistics:
        assert 1.0 <= float(load) <= EXPERTS / TOP_K  # no expert can have more than one row of each token
        assert int(dead) < EXPERTS
        assert 0.0 < float(entropy) <= 2.08  # ln 8
        assert float(dropped) == 0.0  # dropless


def test_replace_mlps_in_transformers() -> None:
    pytest.importorskip("transformers", reason="the example gives a transformers model experts")
    output = output_of("replace_mlps_in_transformers")
    check_losses("replace_mlps_in_transformers", output)
    rows = [[int(n) for n in line.split(", ")] for line in re.findall(r"rows of each expert \[(.*)\]", output)]
    assert [len(layer) for layer in rows] == [EXPERTS] * LAYERS
    assert [sum(layer) for layer in rows] == [TOKENS * TOP_K] * LAYERS


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short(name: str) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= LONGEST_EXAMPLE


def test_a_loss_that_does_not_fall_is_seen() -> None:
    flat = "".join(f"step {step}: loss 4.000, load balance 1.000\n" for step in range(1, 31))
    with pytest.raises(AssertionError):
        check_losses("plain_pytorch", flat)
