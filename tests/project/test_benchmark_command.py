"""What the benchmarks leave and how they are started: pages, plots, the command and its options."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import conftest, peers, plots, report
from benchmarks.loads import ROUTINGS, Shape
from benchmarks.suite import REFERENCE_SHAPES, Held, Options, Row, Suite

ROOT = Path(__file__).parents[2]
SHAPE = Shape(T=96, D=16, F=24, K=2, E=6)


def row(name: str, to_dense: float | None) -> Row:
    return Row(plots.CASE, name, "fp32", "torch", "uniform", "ok", seconds=0.5, to_dense=to_dense)


def test_a_page_is_written_between_its_marks_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nof another day\n{report.END}\nafter\n")
    suite = Suite(Options(), rows=[row("ours", 1.5)], held=[Held("a / b", 1.5, 1.2, None)])
    report.write_files(suite, tmp_path / "out.json", page, ["benchmarks/", "--flops"])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "of another day" not in text
    assert "`python -m pytest benchmarks/ --flops`" in text
    assert "| a / b | 1.500 | 1.200 |  | MISSED |" in text
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["ratios"] == {"a / b": 1.5}
    assert written["rows"][0]["seconds"] == 0.5
    report.write_files(suite, None, page, [])
    assert page.read_text().count(report.BEGIN) == 1


@pytest.mark.parametrize("text", ["no marks", f"{report.END}\n{report.BEGIN}", report.BEGIN * 2 + report.END])
def test_a_page_without_its_marks_is_left_alone(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="each once"):
        report.rewrite(page, "section")
    assert page.read_text() == text


def test_the_committed_page_takes_the_section() -> None:
    report.require_page(ROOT / "docs/performance.md")


def test_the_plot_has_one_point_for_each_measured_load(tmp_path: Path) -> None:
    loads = {f"load, {SHAPE}, {routing}": float(i) for i, routing in enumerate(ROUTINGS)}
    rows = [row(f"ours {SHAPE} {routing}", 1.0 + i) for i, routing in enumerate(ROUTINGS)]
    rows += [row(f"ours {SHAPE} zipf", None), row("dense", 1.0)]
    assert plots.points(rows, loads) == [plots.Point(6, r, float(i), 1.0 + i) for i, r in enumerate(ROUTINGS)]
    assert "not run" in str(plots.draw([], {}, tmp_path / "plot.svg"))
    missing = plots.draw(rows, loads, tmp_path / "plot.svg")
    if importlib.util.find_spec("matplotlib") is None:
        assert "matplotlib" in str(missing)
    else:
        assert missing is None
        assert "<svg" in (tmp_path / "plot.svg").read_text()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "240"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    shape = "T=64,D=8,F=16,K=2,E=4"
    done = run(
        "--flops", "--quick", "--rounds", "1", "--shapes", shape, "--dtype", "fp32", "--peers", "grouped_mm",
        "-k", "bench_layer or bench_load", "--json", str(tmp_path / "out.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    cases = [each["case"] for each in written["rows"]]
    assert cases[0].startswith("layer, default memory")  # before the setting is made that cannot be undone
    assert plots.CASE in cases
    assert all(each["seconds"] > 0 and each["dtype"] == "fp32" for each in written["rows"])
    assert any("E=4" in line and "ours" in line for line in done.stdout.splitlines())


class CommandLine:
    """What pytest hands to the options' reader: the defaults, and what a test sets."""

    def __init__(self, **given: object) -> None:
        self.given = given

    def getoption(self, name: str) -> object:
        defaults = {"--device": "cpu", "--dtype": "fp32,bf16", "--backend": "auto", "--peers": "all", "--threads": 1}
        return self.given.get(name.removeprefix("--").replace("-", "_"), defaults.get(name))


def read(**given: object) -> Options:
    return conftest.parse_options(CommandLine(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "fp8"}, r"--dtype \('fp8'\)"),
        ({"device": "tpu"}, r"--device \('tpu'\) must be cpu or cuda"),
        ({"backend": "cuda"}, r"--backend \('cuda'\)"),
        ({"peers": "nobody"}, r"peer \('nobody'\)"),
        ({"shapes": ["large"]}, r"shape \('large'\)"),
        ({"threads": 0}, r"--threads \(0\)"),
        ({"rounds": 0}, r"--rounds \(0\)"),
        ({"markdown": ROOT / "README.md"}, "each once"),
        ({"flops": False, "compare": True}, "--compare needs --flops"),
        ({"flops": False, "full": True}, "--full needs --flops"),
    ],
)
def test_options_that_do_not_fit_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(pytest.UsageError, match=message):
        read(**({"flops": True} | given))


def test_options_are_read() -> None:
    options = read(flops=True, quick=True, peers="loop, fairscale", dtype="bf16")
    assert options == Options(flops=True, quick=True, peers=("loop", "fairscale"), dtypes=("bf16",))
    assert (options.num_rounds, options.small) == (3, True)
    full = read(flops=True)
    assert (full.num_rounds, full.layer_shapes, full.peers) == (7, REFERENCE_SHAPES, tuple(peers.PEERS))
    assert Options().small  # without --flops
    assert (full.few_rounds, full.all_rows) == (3, False)
    every = read(flops=True, full=True)
    assert (every.few_rounds, every.all_rows, every.layer_shapes) == (7, True, REFERENCE_SHAPES)
    assert Options().all_rows  # to show that each works
    assert read(flops=True, rounds=2).few_rounds == 2


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped rows would look like a run that had nothing to say."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.UsageError, match="--device cuda needs a GPU"):
        read(flops=True, device="cuda")
