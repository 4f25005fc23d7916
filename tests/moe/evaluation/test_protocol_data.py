"""Every task whose public files are at hand, from those files to an accuracy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from moe.config import ModelConfig
from moe.evaluation.datasets import read
from moe.evaluation.protocol_run import _task
from moe.evaluation.protocols import PROTOCOLS, Setting, TaskResult, prepare_task, run_task
from moe.evaluation.protocols.bias import HATECHECK_LANGUAGES
from moe.evaluation.protocols.multilingual import XCOPA_LANGUAGES
from moe.evaluation.results import table
from moe.model import Transformer
from tests.shared_data import shared_data


class Bytes:
    """A token for each byte; 0 separates."""

    eos_id = begin_id = 0

    def encode(self, text: str) -> list[int]:
        return [1 + byte for byte in text.encode()]


Run = Callable[..., TaskResult]


@pytest.fixture
def run(model_config: Callable[..., ModelConfig]) -> Run:
    """Evaluates a little random model on files."""
    model = Transformer(model_config(vocab_size=257, num_layers=1, max_seq_len=1024))
    model.reset_parameters(seed=0)
    data = shared_data(".")

    def of(protocol: str, task: str, **options: Any) -> TaskResult:
        change = options.pop("change", list)
        setting = Setting(protocol, task, **{"limit": 6, **options})
        return run_task(model, Bytes(), prepare_task(setting, lambda *where: change(read(*where, data))))

    return of


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("blimp", {"subsets": ("adjunct_island", "causative")}),
        ("balanced_copa", {}),
        ("lambada", {"split": "validation"}),
        ("crows_pairs", {}),
        ("winogender", {"limit": None}),
        ("mnli", {}),
        ("piqa", {}),
        ("winogrande", {}),
        ("openbookqa", {"num_shots": 2, "num_runs": 2}),
        ("arc_easy", {"split": "test", "num_shots": 2, "num_runs": 2}),
        ("arc_challenge", {"split": "test", "num_shots": 2, "num_runs": 2}),
        ("boolq", {}),
        ("copa", {"num_shots": 4, "num_runs": 2}),
    ],
)
def test_english_tasks_run_on_files(run: Run, task: str, options: dict[str, Any]) -> None:
    result = run("artetxe2021", task, **options)
    assert len(result.groups) == {"winogender": 720, "blimp": 12}.get(task, 6)
    assert all(len(each.credits) == len(result.groups) for each in result.runs)
    assert result.settings["prompt_on_record"] == PROTOCOLS["artetxe2021"].tasks[task].on_record
    if task == "blimp":
        assert {"UID=adjunct_island", "UID=causative"} <= set(result.group_accuracies)
    if task == "winogender":
        assert list(result.group_accuracies) == ["gender=female", "gender=male", "gender=neutral"]
        assert len(set(result.clusters)) == 120
        metrics = _task(result)["metrics"]
        difference = metrics["accuracy_female_minus_male"]
        female, male = (result.group_accuracies[f"gender={name}"] for name in ("female", "male"))
        assert difference["value"] == pytest.approx(female - male, abs=1e-12)
        assert difference["num_samples"] == 240
        assert difference["low"] <= difference["value"] <= difference["high"]
        assert f"| accuracy_female_minus_male | {difference['value']:.4f} |" in table({"tasks": {"w": _task(result)}})


@pytest.mark.parametrize("template_language", ["en", "same"])
def test_xcopa_runs_in_eleven_languages(run: Run, template_language: str) -> None:
    chosen = {}
    for language in XCOPA_LANGUAGES:  # not all test files are at hand
        options = {"split": "validation", "template_language": template_language, "limit": 3}
        result = run("xglm", "xcopa", language=language, **options)
        chosen[language] = result.settings["language"], len(result.groups)
    assert chosen == {language: (language, 3) for language in XCOPA_LANGUAGES}


def test_xcopa_crosses_languages(run: Run) -> None:
    for demo_language in ("en", "sw", "th"):
        languages = {"language": "tr", "demo_language": demo_language, "template_language": "same"}
        assert run("xglm", "xcopa", num_shots=2, num_runs=1, limit=2, **languages).runs[0].mean_shots == 2.0


@pytest.mark.parametrize("language", ["en", "fr", "jp", "pt", "ru"])
def test_xwinograd_runs(run: Run, language: str) -> None:
    assert len(run("xglm", "xwinograd", language=language, num_shots=2, num_runs=1).groups) == 6


def test_hate_speech_runs_in_ten_languages(run: Run) -> None:
    for language in HATECHECK_LANGUAGES:
        result = run("xglm", "hatecheck", language=language, limit=2)
        assert all(name.startswith(("label=", "functionality=")) for name in result.group_accuracies)


def test_swapped_copa_flips_and_shuffled_labels_are_chance(run: Run) -> None:
    def swap(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"choice1": row["choice2"], "choice2": row["choice1"]} for row in rows]

    def shuffle(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rng = random.Random(5)
        return [row | {"label": rng.randrange(2)} for row in rows]

    there, back, shuffled = (
        run("artetxe2021", "balanced_copa", limit=None, change=change).runs[0] for change in (list, swap, shuffle)
    )
    assert len(there.chosen) == 500
    assert [1 - choice for choice in there.chosen] == list(back.chosen)
    assert abs(shuffled.accuracy - 0.5) < 4 * 0.5 / math.sqrt(500)
