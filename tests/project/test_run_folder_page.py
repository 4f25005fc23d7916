"""docs/run_folder.md against a run: every file and every field that it leaves is described there, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe.compose import compose
from moe.run import train
from moe.training.metrics import RouterMetrics, StepMetrics
from moe.training.over_ranks import RankMetrics

PAGE = (Path(__file__).parents[2] / "docs" / "run_folder.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([^`\n]+)`", PAGE))


@pytest.fixture(scope="module")
def finished(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("page") / "run"
    return train(compose([*overrides, f"run_dir={run_dir}", "train.num_steps=4", "eval.every=2"]))


def keys(value: Any) -> set[str]:
    """All names in a record, but for those of domains and splits, which are the data's."""
    if isinstance(value, list):
        return set().union(*(keys(part) for part in value))
    if not isinstance(value, dict):
        return set()
    own = {name for name in value if name not in ("sentences", "train", "validation", "test")}
    return own.union(*(keys(part) for part in value.values()))


def is_described(name: str) -> bool:
    return any(name in named.split(".") for named in NAMED)


def test_every_file_is_described(finished: Path) -> None:
    for path in finished.iterdir():
        assert any(named.split("/")[0] == path.name for named in NAMED), path.name


@pytest.mark.parametrize("name", ["results.json", "documents.json"])
def test_every_field_of_the_results_is_described(finished: Path, name: str) -> None:
    found = keys(json.loads((finished / name).read_text()))
    assert found and not {key for key in found if not is_described(key)}


def test_every_field_of_the_metrics_is_described(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert any("validation" in record for record in records)
    assert not {key for key in keys(records) if not is_described(key)}
    fields = {field.name for of in (StepMetrics, RouterMetrics, RankMetrics) for field in dataclasses.fields(of)}
    assert not {name for name in fields if not is_described(name)}


def test_no_field_is_described_that_is_not_there(finished: Path) -> None:
    """Rows of the tables of metrics.jsonl and results.json."""
    found = keys(json.loads((finished / "results.json").read_text())) | {
        field.name for of in (StepMetrics, RouterMetrics, RankMetrics) for field in dataclasses.fields(of)
    }
    rows = re.findall(r"^\| ((?:`[\w.<>]+`(?:, )?)+) \|", PAGE.split("## metrics.jsonl")[1], re.MULTILINE)
    named = {name.rpartition(".")[2] for row in rows for name in re.findall(r"`([\w.<>]+)`", row)}
    assert len(named) > 40 and not named - found
