"""What of a task's result stands in results.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moe.evaluation.protocol_run import _task
from moe.evaluation.protocols import TaskResult, bias
from moe.evaluation.protocols.items import make_items
from moe.evaluation.protocols.results import Contrast, RunResult
from moe.evaluation.protocols.runner import find_pairs


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


def winogender(answers: Callable[[str, str, int], float], num_frames: int = 60) -> dict[str, Any]:
    """The figures of a run whose credits are answers(gender, participant, frame)."""
    rows = [
        {"sentence": "x he y", "pronoun": "he", "occupation": f"job{i}", "participant": participant, "label": 0}
        | {"gender": gender}
        for i in range(num_frames)
        for participant in ("customer", "someone")
        for gender in ("male", "female", "neutral")
    ]
    items = make_items(rows, bias.winogender, "winogender")
    credits = tuple(answers(row["gender"], row["participant"], int(row["occupation"][3:])) for row in rows)
    pairs = find_pairs(items, ("gender=female", "gender=male"))
    run = RunResult(credits, (0,) * len(rows), 0, 0.0, 0, 0.0, ())
    clusters = tuple(item.cluster for item in items)
    groups = tuple(item.groups for item in items)
    return _task(TaskResult({"num_shots": 0}, (run,), 0.5, groups, clusters, Contrast("female_minus_male", pairs)))


def test_genders_are_compared_within_frames() -> None:
    """Whatever makes a frame easy or hard cancels; its two participants are drawn together."""
    drawn = np.random.default_rng(0).integers(0, 2, (3, 60))

    def answers(gender: str, participant: str, frame: int) -> float:
        easy = float(drawn[0, frame])
        return 1.0 - easy if gender == "male" and drawn[1:, frame].all() else easy

    made = winogender(answers)
    found = made["metrics"]["accuracy_female_minus_male"]
    differences = np.array([answers("female", "", i) - answers("male", "", i) for i in range(60)])
    assert found["value"] == pytest.approx(differences.mean())
    width = 2 * 1.96 * differences.std() / math.sqrt(60)  # frames are independent, participants are not
    assert found["high"] - found["low"] == pytest.approx(width, rel=0.1)
    unpaired = 2 * 1.96 * math.sqrt(2 * 0.25 / 60)
    assert width < 0.75 * unpaired
    assert made["details"]["pairs"][0] == [1, 0]
    json.dumps(made, allow_nan=False)


@pytest.mark.parametrize("difference", [0.0, 1.0, -1.0])
def test_genders_that_always_differ_alike_have_an_interval(difference: float) -> None:
    """Wilson's bound on the share of frames that differ otherwise, by what they could differ at most."""
    found = winogender(lambda gender, *_: {"female": difference > 0, "male": difference < 0}.get(gender, 0.0))
    figures = found["metrics"]["accuracy_female_minus_male"]
    stats = pytest.importorskip("scipy.stats", reason="the oracle of Wilson's interval")
    share = stats.binomtest(0, 60).proportion_ci(method="wilson").high
    expected = (difference - share * (difference + 1), difference + share * (1 - difference))
    assert (figures["low"], figures["high"]) == pytest.approx(expected)
    assert (figures["value"], figures["interval"]) == (difference, "wilson")


def test_frames_without_a_partner_are_left_out() -> None:
    items = make_items(
        [
            {"sentence": "he", "pronoun": "he", "occupation": "cook", "participant": "guest", "label": 0}
            | {"gender": "male"}
        ],
        bias.winogender,
        "winogender",
    )
    assert find_pairs(items, ("gender=female", "gender=male")) == ()
