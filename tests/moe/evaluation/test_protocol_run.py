"""What of a task's result stands in results.json."""

from __future__ import annotations

import json

import pytest

from moe.evaluation.protocol_run import _task
from moe.evaluation.protocols import TaskResult
from moe.evaluation.protocols.results import RunResult


def of_nats(*nats: float) -> TaskResult:
    run = RunResult((1.0,) * len(nats), (0,) * len(nats), 0, 0.0, 0, 0.0, nats)
    questions = range(len(nats))
    return TaskResult({"num_shots": 0}, (run,), 0.0, tuple(() for _ in questions), tuple(str(i) for i in questions))


@pytest.mark.parametrize("nats", [(800.0, 900.0), (1.0, 1400.0)])
def test_a_perplexity_beyond_what_a_float_holds_is_left_out(nats: tuple[float, float]) -> None:
    made = _task(of_nats(*nats))
    assert list(made["metrics"]) == ["accuracy"]
    json.dumps(made, allow_nan=False)


def test_a_perplexity_has_its_interval() -> None:
    made = _task(of_nats(1.0, 2.0))
    assert made["metrics"]["perplexity"]["value"] == pytest.approx(made["details"]["perplexity"])
