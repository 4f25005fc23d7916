"""Means over equals at each step, intervals against known answers, draws that are paired."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe.evaluation.results import Estimate
from moe.instruct.evaluation.aggregation import Leaf, SameTask, Series, aggregate, draw, mean_of, verdict


def leaf(task: str, values: list[float], *, level: int | None = 1, category: str = "QA", shots: int = 0) -> Leaf:
    series = {"accuracy": Series(values, [1.0] * len(values), [str(i) for i in range(len(values))])}
    return Leaf(task, task.split("/")[0], category, level, shots, "accuracy", series, {"accuracy": 0.5}, {})


def figures(leaves: list[Leaf]) -> dict[tuple[str, str, int | None], float]:
    groups = aggregate(leaves, SameTask().of, resamples=10)
    return {(group.kind, group.name, group.num_shots): group.figures["score"].value for group in groups}


def test_every_mean_is_over_equals() -> None:
    found = figures(
        [
            leaf("mmlu/history", [1.0] * 9 + [0.0]),  # sub-tasks count alike, whatever their size
            leaf("mmlu/law", [0.0]),
            leaf("ni/task9_mmlu_x", [1.0]),  # the same task in another benchmark: (0.45 + 1) / 2
            leaf("b/other", [0.0]),  # a task of the category: 0.725 / 2
            leaf("b/third", [1.0], category="Other"),
            leaf("b/apart", [0.25], level=2),
            leaf("b/alone", [0.75], level=None),
        ]
    )
    assert found["task", "MMLU", 0] == pytest.approx((0.45 + 1.0) / 2)
    assert found["category", "Other", 0] == 1.0
    assert found["level", "held-out category", 0] == pytest.approx((0.3625 + 1.0) / 2)
    assert found["level", "held-out task", 0] == 0.25
    assert found["level", "no level", 0] == 0.75


def test_shots_are_apart_and_then_together() -> None:
    found = figures([leaf("b/x", [1.0]), leaf("b/x", [0.0, 0.0], shots=5), leaf("b/y", [0.5])])
    assert found["task", "x", 0] == 1.0
    assert found["task", "x", 5] == 0.0
    assert found["task", "x", None] == 0.5
    assert ("task", "y", None) not in found  # it was not asked with five


def test_intervals_of_a_mean_of_tasks() -> None:
    rng = np.random.default_rng(0)
    leaves = [leaf(f"b/{i}", rng.integers(0, 2, 400).astype(float).tolist()) for i in range(4)]
    level = next(group for group in aggregate(leaves, SameTask().of) if group.kind == "level")
    estimate = level.figures["score"].estimate()
    # independent tasks: the standard error of the mean of four is that of 1,600 items
    values = np.concatenate([each.series["accuracy"].sums for each in leaves])
    expected = 1.96 * np.sqrt(values.var() / len(values))
    assert estimate.num_samples == 1600
    assert (estimate.high - estimate.low) / 2 == pytest.approx(expected, rel=0.1)
    assert estimate.low < estimate.value < estimate.high


def width(leaves: list[Leaf], kind: str) -> float:
    (group,) = (group for group in aggregate(leaves, SameTask().of) if group.kind == kind)
    estimate = group.figures["score"].estimate()
    return estimate.high - estimate.low


def test_copies_of_a_task_are_drawn_together() -> None:
    """The same examples in four benchmarks say as much as in one; other examples under one name say more."""
    values = np.random.default_rng(2).integers(0, 2, 200).astype(float).tolist()
    one = leaf("a/x", values)
    copies = [leaf(f"{benchmark}/x", values) for benchmark in "abcd"]
    for kind in ("task", "category", "level"):
        assert width(copies, kind) == pytest.approx(width([one], kind))
    backwards = Series(values[::-1], [1.0] * 200, one.series["accuracy"].examples[::-1])  # the order says nothing
    assert width([one, copies[1]._replace(series={"accuracy": backwards})], "task") == pytest.approx(
        width([one], "task")
    )
    others = [
        one._replace(benchmark=b, series={"accuracy": Series(values, [1.0] * 200, [f"{b}{i}" for i in range(200)])})
        for b in "abcd"
    ]
    assert width(others, "task") == pytest.approx(width([one], "task") / 2, rel=0.1)
    half = Series(values, [1.0] * 200, [*one.series["accuracy"].examples[:100], *(f"b{i}" for i in range(100))])
    shared = width([one, one._replace(benchmark="b", series={"accuracy": half})], "task")
    assert shared == pytest.approx(width([one], "task") * (3 / 4) ** 0.5, rel=0.1)  # half of the examples are common


def test_the_width_of_one_task() -> None:
    """Student's error of a mean, as an ordinary bootstrap has it."""
    values = np.random.default_rng(3).random(100)
    assert width([leaf("a/x", values.tolist())], "task") == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.08)


def test_a_ratio_is_resampled_by_raw_example() -> None:
    """Ten versions of one example say as much as one: the interval of four examples is wide however many versions."""
    one = leaf("b/x", [1.0, 0.0, 1.0, 0.0])
    series = Series([10.0, 0.0, 10.0, 0.0], [10.0] * 4, list("0123"))
    ten = one._replace(series={"accuracy": series})
    assert draw(one, "accuracy", "x").estimate() == pytest.approx(draw(ten, "accuracy", "x").estimate())
    tokens = Series([6.0, 2.0], [3.0, 1.0], ["a", "b"])  # nats and target tokens
    assert draw(one._replace(series={"loss": tokens}), "loss", "x").estimate() == pytest.approx(
        Estimate(2.0, 2.0, 2.0, 2)
    )
    with pytest.raises(ValueError, match="task b/x has no scored example for accuracy"):
        draw(leaf("b/x", []), "accuracy", "x")


def test_draws_of_two_models_are_paired() -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2, 200).astype(float)
    first, second = (draw(leaf("b/x", v.tolist()), "accuracy", "x") for v in (values, 0.5 * values + 0.25))
    assert np.allclose(second.draws, 0.5 * first.draws + 0.25)
    other = draw(leaf("b/y", values.tolist()), "accuracy", "y")
    assert not np.array_equal(other.draws, first.draws)  # tasks are resampled independently
    assert np.var(mean_of([first, other]).draws) < 0.7 * np.var(first.draws)


def test_names_of_one_task(tmp_path: Path) -> None:
    assert [SameTask().of(name) for name in ("flan/bool_q", "promptsource/super_glue/boolq")] == ["BoolQ", "BoolQ"]
    assert SameTask().of("flan/piqa") == SameTask().of("promptsource/piqa") == "piqa"
    path = tmp_path / "same.yaml"
    path.write_text("Physics: ['*/piqa', 'x/*']\n")
    names = SameTask.load(path)
    assert (names.of("flan/piqa"), names.of("mmlu/law")) == ("Physics", "MMLU")
    path.write_text("Physics: piqa\n")
    with pytest.raises(ValueError, match="must map names of tasks to lists of patterns"):
        SameTask.load(path)


def test_verdicts() -> None:
    half = leaf("b/x", [1.0, 0.0] * 50)
    chances = (0.3, 0.45, 0.5, 0.7, None)
    found = [verdict(draw(half._replace(chance={"accuracy": chance}), "accuracy", "x")) for chance in chances]
    assert found == ["above", "not above", "not above", "below", ""]


def test_a_few_lucky_answers_are_not_above_chance() -> None:
    """Four of four right at chance 1/2 happen once in 16; eight of eight once in 256. Their intervals have no width."""
    found = {n: verdict(draw(leaf("b/x", [1.0] * n), "accuracy", "x")) for n in (4, 8)}
    assert found == {4: "not above", 8: "above"}
    wrong = leaf("b/x", [0.0] * 4)._replace(chance={"accuracy": 1 / 3})  # once in 5
    assert verdict(draw(wrong, "accuracy", "x")) == "not above"
    shots = [leaf("b/x", [1.0] * 4, shots=shots) for shots in (0, 1, 2)]  # the same four examples thrice
    mean = next(group for group in aggregate(shots, SameTask().of) if group.num_shots is None)
    assert (mean.figures["score"].num_samples, verdict(mean.figures["score"])) == (4, "not above")
    # three such tasks: once in 4,096
    three = [leaf(f"b/{i}", [1.0] * 4) for i in range(3)]
    level = next(group for group in aggregate(three, SameTask().of) if group.kind == "level")
    assert verdict(level.figures["score"]) == "above"
