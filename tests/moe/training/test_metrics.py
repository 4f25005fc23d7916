from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from moe.training.metrics import MetricsFile, read_metrics
from tests.moe.training.step_metrics import METRICS, ROUTER


def write_steps(path: Path, first: int, last: int) -> None:
    file = MetricsFile(path, after_step=first - 1)
    for step in range(first, last + 1):
        file.step(replace(METRICS, step=step))
    file.close()


def test_lines_come_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2)
    records = read_metrics(path)
    assert [record["step"] for record in records] == [1, 2]
    assert records[0]["routers"][0]["tokens_per_expert"] == [1, 3]


def test_a_resume_forgets_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 7)
    with path.open("a") as file:
        file.write('{"step": 8, "loss": 2.')  # torn by kill -9
    write_steps(path, 5, 6)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, after_step=0)
    file.step(replace(METRICS, loss=math.nan, grad_norm=math.inf, skipped=True))
    file.close()
    record = json.loads(path.read_text(), parse_constant=lambda name: 1 / 0)
    assert record["loss"] is None
    assert record["grad_norm"] is None


def test_numbers_that_are_not_finite_are_null_at_any_depth(tmp_path: Path) -> None:
    """A router that saw NaN, or a validation of a model that overflows, must not end the run that skips the step."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, after_step=0)
    file.step(replace(METRICS, routers=[replace(ROUTER, entropy=math.nan, load_cv=math.inf)]))
    file.validation(1, {"docs": {"cross_entropy": math.nan, "perplexity": math.inf, "num_tokens": 3}})
    file.close()
    step, validation = (json.loads(line, parse_constant=lambda name: 1 / 0) for line in path.open())
    assert step["routers"][0] | {"entropy": None, "load_cv": None} == step["routers"][0]
    assert step["routers"][0]["tokens_per_expert"] == [1, 3]
    assert validation["validation"] == {"docs": {"cross_entropy": None, "perplexity": None, "num_tokens": 3}}
    figures = read_metrics(path)[1]["validation"]["docs"]
    assert math.isnan(figures["cross_entropy"])
    assert figures["num_tokens"] == 3


@pytest.mark.parametrize("text", ["3", "{}", "[]", '{"step": null}', '{"step": 2, "validation": 1}'])
def test_a_line_that_is_json_and_no_record_is_named_too(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], text, *lines[2:]]) + "\n")
    for read in (read_metrics, lambda path: MetricsFile(path, after_step=3)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is damaged .* delete the line"):
            read(path)


def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + bytes(40) + b"\n" + lines[2])  # as blocks that never reached the disk
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is damaged .* delete the line"):
        MetricsFile(path, after_step=3)
    assert path.read_bytes() == before
    path.write_bytes(lines[0] + lines[2])
    assert [record["step"] for record in read_metrics(path)] == [1, 3]
