from __future__ import annotations

import math
import random

import pytest

from moe.evaluation.protocols.results import RunResult, TaskResult, t_interval
from moe.evaluation.protocols.rules import RULES, apply_rule, choose, common_prefix, common_suffix, credit

# separator, "a b", then "c d" or "e", then "f g"
SEQUENCES = [[0, 1, 2, 3, 4, 6, 7], [0, 1, 2, 5, 6, 7]]
LOG_PROBS = [[-1.0, -2.0, -4.0, -8.0], [-3.0, -5.0, -6.0]]  # from index 3 on


def test_prefix_and_suffix() -> None:
    assert common_prefix(SEQUENCES) == 3
    assert common_suffix(SEQUENCES) == 2
    # a suffix ends where the prefix begins: "x x x" and "x x" share two tokens once, not twice
    assert (common_prefix([[0, 1, 1, 1], [0, 1, 1]]), common_suffix([[0, 1, 1, 1], [0, 1, 1]])) == (2, 1)
    assert common_suffix([[0, 1, 2], [0, 1, 3]]) == 0


def test_the_prefix_is_the_longest_one() -> None:
    rng = random.Random(0)
    for _ in range(300):
        base = [rng.randrange(3) for _ in range(rng.randint(2, 20))]
        sequences = [base[: rng.randint(1, len(base))] + [rng.randrange(3) for _ in range(3)] for _ in range(3)]
        columns = [len(set(column)) == 1 for column in zip(*sequences, strict=False)]
        length = [*columns, False].index(False)
        assert common_prefix(sequences) == min(length, min(map(len, sequences)) - 1)


@pytest.mark.parametrize(
    "sequences", [[[0, 1, 2], [0, 1, 2, 3]], [[0, 1, 2, 3], [0, 1, 2]], [[0, 1, 2], [0, 1, 2]], [[0, 1], [0]]]
)
def test_a_candidate_that_begins_another_keeps_a_token(sequences: list[list[int]]) -> None:
    shortest = min(map(len, sequences))
    assert common_prefix(sequences) == shortest - 1
    if shortest == 1:
        return
    log_probs = [[-1.0] * (len(sequence) - shortest + 1) for sequence in sequences]
    for rule in RULES:
        assert not any(map(math.isnan, apply_rule(rule, sequences, log_probs, shortest - 1)))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("mean", [-15 / 4, -14 / 3]),
        ("sum", [-15.0, -14.0]),
        ("suffix", [-12.0, -11.0]),
        ("unconditional", [-15.0, -14.0]),
    ],
)
def test_rules_on_numbers_by_hand(rule: str, expected: list[float]) -> None:
    assert apply_rule(rule, SEQUENCES, LOG_PROBS, 3) == pytest.approx(expected)
    longer = [[-100.0, *values] for values in LOG_PROBS]  # as if more had been asked for
    assert apply_rule(rule, SEQUENCES, longer, 2) == pytest.approx(expected)


def test_without_a_suffix_the_candidates_are_scored() -> None:
    assert apply_rule("suffix", [[0, 1, 2], [0, 1, 3, 4]], [[-1.0], [-2.0, -3.0]], 2) == [-1.0, -5.0]


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match="'median' must be one of: mean, sum, suffix, unconditional"):
        apply_rule("median", SEQUENCES, LOG_PROBS, 3)


def test_ties_favour_no_place() -> None:
    assert choose([-2.0, -1.0, -3.0]) == [1]
    assert choose([-1.0, -2.0, -1.0]) == [0, 2]
    assert [credit([0, 2], gold) for gold in ([0], [1], [2], [0, 2])] == [0.5, 0.0, 0.5, 1.0]
    assert credit([1], (0, 1)) == 1.0
    with pytest.raises(ValueError, match="hold NaN"):
        choose([math.nan, -1.0])


def run_of(*credits: float) -> RunResult:
    return RunResult(credits, (0,) * len(credits), 0, 2.0, 0, 0.0, ())


def test_task_results_by_hand() -> None:
    groups = (("a=x",), ("a=x", "b=1"), ("a=y", "b=1"))
    result = TaskResult({"task": "t"}, (run_of(1.0, 0.0, 0.5), run_of(1.0, 1.0, 0.0)), 0.5, groups, tuple("abc"))
    assert result.accuracy == pytest.approx((0.5 + 2 / 3) / 2)
    assert result.group_accuracies == pytest.approx({"a=x": 0.75, "a=y": 0.25, "b=1": 0.375})
    assert result.perplexity is None
    saved = result.as_dict()
    assert saved["num_examples"] == 3
    assert [run["credits"] for run in saved["runs"]] == [[1.0, 0.0, 0.5], [1.0, 1.0, 0.0]]
    words = run_of(1.0)._replace(nats=(math.log(4.0), math.log(16.0)))
    assert TaskResult({}, (words,), 0.0, ((), ()), ("a", "b")).perplexity == pytest.approx(8.0)


@pytest.mark.parametrize("n", [2, 5, 25, 31, 32, 100])
def test_the_interval_is_students(n: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="the oracle of Student's t")
    values = [0.3 + 0.01 * (i * 7 % 11) for i in range(n)]
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    expected = stats.t.interval(0.95, n - 1, loc=mean, scale=deviation / math.sqrt(n))
    interval = t_interval(values)
    assert interval is not None
    assert [edge - mean for edge in interval] == pytest.approx([edge - mean for edge in expected], rel=3e-4)


def test_one_run_has_no_interval_over_runs() -> None:
    assert t_interval([0.5]) is None
