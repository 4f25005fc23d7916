"""One study that is really trained: two sizes of a few thousand parameters, by the command, to its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.scaling.report import read
from tests.conftest import Command

STUDY = """
name: real
design: matched
tokens: [2048]
width_multiple: 1
tolerance: 0.01
data_folder: {folder}
overrides:
  - data=text
  - data.path={{data_folder}}/sentences.jsonl
  - data.vocab_size=300
  - data.num_workers=1
  - data.validation_fraction=0.1
  - data.test_fraction=0.1
  - data.cache_dir={cache}
  - model.num_layers=2
  - model.num_heads=2
  - model.max_seq_len=32
  - train.batch_tokens=256
  - optim.warmup_steps=2
  - eval.every=null
  - eval.sample_tokens=1
sizes:
  small: {{overrides: [model.d_model=16, model.d_ff=96], experts: [4]}}
sparse_overrides: ["+moe=8e", "model.moe.name=4e", "model.moe.num_experts=4"]
"""
MOE = ("-c", "from moe.cli import main; main()")


@pytest.fixture
def study(corpus: Path, tmp_path: Path) -> Path:
    path = tmp_path / "real.yaml"
    path.write_text(STUDY.format(folder=corpus.parent, cache=tmp_path / "cache"))
    return path


def test_a_study_is_trained_and_reported(study: Path, command: Command, tmp_path: Path) -> None:
    said = command(*MOE, "scale", "run", str(study)).stdout
    assert "2 runs done now, 0 before" in said and "next: moe scale report" in said
    folder = tmp_path / "studies/real"
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("runs/*/results.json")}
    assert set(results) == {"small-dense-t2.048k-s0", "small-4e-t2.048k-s0"}
    dense, sparse = (results[f"small-{arm}-t2.048k-s0"] for arm in ("dense", "4e"))
    assert abs(sparse["training_flops"] / dense["training_flops"] - 1) <= 0.01  # as the trainer itself counts
    assert dense["tokens"] == sparse["tokens"] == 2048
    first = command(*MOE, "scale", "report", str(study), "--resamples", "100").stdout.strip()
    assert (tmp_path / first).read_text().startswith("<!DOCTYPE html>")
    found = read.study(folder)
    assert not found.missing
    for record in found.records:
        results_flops = results[record.name]["training_flops"]
        assert record.costs["flops"] == pytest.approx(results_flops, rel=1e-9)
        assert record.facts["commits"]
    report = json.loads((folder / "report/report.json").read_text())
    row = next(row for row in report["pair_differences"] if row["metric"] == "test/all")
    assert row["difference"] == pytest.approx(
        sum(record.metrics["test/all"] * (1 if record.num_experts else -1) for record in found.records)
    )
    again = command(*MOE, "scale", "run", str(study)).stdout
    assert "0 runs done now, 2 before" in again


def test_a_rate_that_diverges_loses_its_sweep(study: Path, command: Command, tmp_path: Path) -> None:
    sweep = "sweep: {size: small, tokens: 2048, grid: {optim.lr: [1.0e+30, 0.002]}}\n"
    text = study.read_text().replace("  - eval.every=null\n", "  - eval.every=null\n  - train.max_skipped_steps=0\n")
    study.write_text(text + sweep)
    said = command(*MOE, "scale", "run", str(study)).stdout
    assert "sweep-small-4e-c0-s0: diverged" in said and "6 runs done now, 0 before" in said
    assert "sweep: dense takes optim.lr=0.002" in said
    assert "0 runs done now, 6 before" in command(*MOE, "scale", "run", str(study)).stdout
    page = (tmp_path / command(*MOE, "scale", "report", str(study), "--resamples", "100").stdout.strip()).read_text()
    assert page.count("<td>diverged</td>") == 2


@pytest.mark.parametrize("plugin", ["basic", "joblib"])
def test_a_launcher_of_hydra_starts_the_runs(study: Path, command: Command, tmp_path: Path, plugin: str) -> None:
    """What they leave is what the harness's own processes leave; a run that fails is named with its reason."""
    launcher = ("--launcher", f"hydra/launcher={plugin}")
    folder = tmp_path / "studies/real"
    foreign = folder / "runs/small-dense-t2.048k-s0/notes.txt"  # a folder that is somebody else's: `moe train` refuses
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    done = command(*MOE, "scale", "run", str(study), *launcher, check=False)
    assert done.returncode == 1 and "1 runs failed" in done.stderr and "no config.yaml" in done.stderr
    assert [path.parent.name for path in folder.glob("runs/*/results.json")] == ["small-4e-t2.048k-s0"]
    foreign.unlink()
    assert "1 runs done now, 1 before" in command(*MOE, "scale", "run", str(study), *launcher).stdout
    started = json.loads((folder / "started/small-4e-t2.048k-s0.json").read_text())
    assert started[0]["command"][:2] == ["moe", "train"]


def test_mistakes_end_in_one_line(study: Path, command: Command) -> None:
    for arguments, words in (
        (("run", str(study), "--list", "--submit"), "exclude each other"),
        (("run", str(study), "--list", "--launcher", "hydra/launcher=basic"), "--launcher starts the runs"),
        (("run", "nothing"), "there is no study 'nothing'"),
        (("report", str(study)), "study.json"),
        (("run", str(study), "--launcher", "hydra/launcher=nothing"), "began no run"),
    ):
        done = command(*MOE, "scale", *arguments, check=False)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
