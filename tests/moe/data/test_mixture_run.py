"""A run over a mixture: what it says beforehand, and that it continues exactly where it was stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe.compose import compose
from moe.run import train

LANGUAGES = {"en": ("the cat sat on a mat", 300), "ru": ("кошка сидела на коврике", 120)}


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, (words, count) in LANGUAGES.items():
        lines = [f"{words} {number}, {words[: number % 9 + 3]}.\n" for number in range(count)]
        (corpus / f"{name}.txt").write_text("".join(lines))
    return [
        "experiment=multilingual/dense",
        f"data.path={corpus}/@domain.txt",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.piece_bytes=300",
        "data.vocab_size=300",
        "data.seq_len=16",
        "data.mixture.alpha=0",
        "data.validation_fraction=0.2",
        "data.test_fraction=0.2",
        "model.d_model=16",
        "model.num_heads=2",
        "model.num_layers=1",
        "train.num_steps=6",
        "train.batch_tokens=64",
        "train.checkpoint_every=2",
        "train.keep_last=3",
        "eval.every=3",
        "eval.sample_tokens=4",
    ]


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["cross_entropy"] for row in rows if "grad_norm" in row]


def test_it_reports_its_epochs_and_measures_each_language(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = train(compose([*overrides, f"run_dir={tmp_path / 'run'}"]))
    rows = json.loads((run_dir / "mixture.json").read_text())
    assert [(row["name"], row["share"], row["drawn"]) for row in rows] == [("en", 0.5, 192.0), ("ru", 0.5, 192.0)]
    assert [row["epochs"] for row in rows] == [192 / row["size"] for row in rows]
    said = capfd.readouterr().err
    assert "epochs" in said
    assert said.index("epochs") < said.index("en  ")
    results = json.loads((run_dir / "results.json").read_text())
    for split in ("validation", "test"):
        assert results["splits"][split]["domains"].keys() == LANGUAGES.keys()


def test_it_continues_bit_by_bit(overrides: list[str], tmp_path: Path) -> None:
    whole = train(compose([*overrides, f"run_dir={tmp_path / 'whole'}"]))
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for name in ("results.json", "checkpoints/step_00000006", "checkpoints/step_00000004"):
        path = stopped / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert train(compose([*overrides, f"run_dir={stopped}"])) == stopped
    assert len(losses(whole)) == 6
    assert losses(stopped) == losses(whole)
