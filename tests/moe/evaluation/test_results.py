from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.cli import app
from moe.evaluation.results import (
    Estimate,
    bootstrap,
    bootstrap_crossed,
    plot,
    read_results,
    require_writable,
    table,
    versions,
    write_results,
)

RESULTS: dict[str, Any] = {
    "tasks": {
        "copa": {"num_fewshot": 0, "metrics": {"acc": Estimate(0.61, 0.52, 0.7, 100)._asdict()}},
        "lambada": {"num_fewshot": 5, "metrics": {"perplexity": Estimate(1234.5678, 1100.0, 1400.0, 4869)._asdict()}},
    },
    "confidence": 0.95,
}


def test_the_interval_of_a_mean_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the oracle of the bootstrap")
    values = np.random.default_rng(5).random(200) ** 2
    ours = bootstrap(values.tolist(), resamples=4000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert ours.value == pytest.approx(values.mean(), rel=1e-12)
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.05 * width
    assert abs(ours.high - theirs.high) < 0.05 * width
    assert ours.num_samples == 200


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap((generator.random(80) < 0.3).tolist(), resamples=400, seed=trial)[1:3]
        hits += low <= 0.3 <= high
    assert abs(hits / 200 - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / 200)


def test_an_aggregate_that_is_no_mean() -> None:
    values = [0.5, 1.0, 2.0, 4.0, 0.1]

    def perplexity(nats: Any) -> float:
        return math.exp(sum(nats) / len(nats))

    found = bootstrap(values, perplexity, resamples=500)
    assert found.value == perplexity(values)
    assert found.low < found.value < found.high
    plain = bootstrap(values, resamples=500)
    assert found.low == pytest.approx(math.exp(plain.low), rel=0.3)
    assert bootstrap(values, perplexity, resamples=500) == found  # seeded
    assert bootstrap(values, perplexity, resamples=500, seed=1) != found


def test_runs_and_items_are_drawn_together() -> None:
    """Runs that agree say nothing about other items; runs that differ add to the width."""
    generator = np.random.default_rng(4)
    values = generator.integers(0, 2, 80).astype(float)
    alone = bootstrap(values.tolist())
    agreeing = bootstrap_crossed([values.tolist()] * 5)
    assert agreeing.value == alone.value
    assert agreeing.high - agreeing.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert bootstrap_crossed([values.tolist()]) == alone
    # effects of items and runs, both normal: their variances add
    items, runs = generator.normal(size=400), generator.normal(size=40) / 5
    found = bootstrap_crossed((runs[:, None] + items).tolist())
    expected = 2 * 1.96 * math.sqrt(items.var() / 400 + runs.var() / 40)
    assert found.high - found.low == pytest.approx(expected, rel=0.1)
    assert found.num_samples == 400


def test_items_that_depend_on_each_other_are_drawn_together() -> None:
    values = np.random.default_rng(6).integers(0, 2, 60).astype(float).tolist()
    names = [str(i) for i in range(60)]
    alone, thrice = bootstrap(values), bootstrap_crossed([values * 3], names * 3)
    assert thrice.value == alone.value
    assert thrice.num_samples == 180
    assert thrice.high - thrice.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert bootstrap_crossed([values], names) == alone


def test_all_right_and_all_wrong_have_the_width_of_wilson() -> None:
    """20 of 20: 1 / (1 + z^2 / 20) to 1; a bootstrap would give 1 to 1."""
    stats = pytest.importorskip("scipy.stats", reason="the oracle of Wilson's interval")
    for right in (0, 20):
        theirs = stats.binomtest(right, 20).proportion_ci(method="wilson")
        expected = pytest.approx((theirs.low, theirs.high), abs=1e-12)
        share = float(right > 0)
        runs, clusters = [[share] * 60] * 2, [str(i % 20) for i in range(60)]
        for found in (bootstrap([share] * 20), bootstrap_crossed(runs, clusters)):
            assert found.value == share
            assert (found.low, found.high) == expected
            assert found.interval == "wilson"
    assert bootstrap([0.5] * 20).interval == bootstrap([1.0, 0.0]).interval == "bootstrap"
    lines = table({"tasks": {"copa": {"metrics": {"acc": bootstrap([1.0] * 20)._asdict()}}}}).splitlines()
    assert lines[2] == "| copa |  | acc | 1.0000 | 0.8389 to 1.0000 (Wilson) | 20 |"


def test_chunks_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).random(50).tolist()
    whole = bootstrap(values, resamples=100)
    monkeypatch.setattr("moe.evaluation.results._CHUNK", 7 * 50)
    assert bootstrap(values, resamples=100) == whole


def test_no_values_and_no_confidence_are_refused() -> None:
    with pytest.raises(ValueError, match="no item was scored"):
        bootstrap([])
    with pytest.raises(ValueError, match=r"confidence \(1\.5\) must be between 0 and 1"):
        bootstrap([1.0], confidence=1.5)


def test_a_folder_that_cannot_be_written_is_refused_in_time(tmp_path: Path) -> None:
    """By the commands too, before they load a model: tests of each have it where results.json exists."""
    require_writable(tmp_path / "new" / "er")
    require_writable(tmp_path)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"cannot be made: .*file is a file; choose another --out"):
            require_writable(folder)
        for command in (["eval", "nowhere", "--tasks", "copa"], ["translate", "nowhere", "no", "--languages", "a,b"]):
            with pytest.raises(ValueError, match="is a file; choose another --out"):
                app([*command, "--out", str(folder)], standalone_mode=False)
    write_results(tmp_path / "results.json", {})
    with pytest.raises(ValueError, match="holds the results of an evaluation; choose another --out"):
        require_writable(tmp_path)


def test_results_are_written_whole_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_results(path, RESULTS)
    assert read_results(path)["tasks"]["copa"]["metrics"]["acc"] == Estimate(0.61, 0.52, 0.7, 100)
    before = path.read_text()
    with pytest.raises(ValueError, match="Out of range float"):
        write_results(path, {"tasks": {}, "loss": float("nan")})
    assert path.read_text() == before
    other = tmp_path / "other.json"
    other.write_text('{"steps": 3}')
    with pytest.raises(ValueError, match=r"other\.json has no field 'tasks'"):
        read_results(other)


def test_the_table_has_a_line_for_each_figure(tmp_path: Path) -> None:
    lines = table(RESULTS).splitlines()
    assert lines[0] == "| task | shots | metric | value | 95% interval | items |"
    assert lines[2:] == [
        "| copa | 0 | acc | 0.6100 | 0.5200 to 0.7000 | 100 |",
        "| lambada | 5 | perplexity | 1234.6 | 1100 to 1400 | 4869 |",
    ]
    write_results(tmp_path / "results.json", RESULTS)
    assert table(read_results(tmp_path / "results.json")) == table(RESULTS)


def test_the_table_names_the_interval_over_demonstrations() -> None:
    figure = {"accuracy": Estimate(0.5, 0.4, 0.6, 20)._asdict()}
    few = {"num_fewshot": 4, "metrics": figure, "interval_over_demonstrations": [0.49, 0.51]}
    lines = table({"tasks": {"copa": few, "piqa": {"num_fewshot": 0, "metrics": figure}}}).splitlines()
    assert lines[0] == "| task | shots | metric | value | 95% interval | over demonstrations alone | items |"
    assert lines[2] == "| copa | 4 | accuracy | 0.5000 | 0.4000 to 0.6000 | 0.4900 to 0.5100 | 20 |"
    assert lines[3] == "| piqa | 0 | accuracy | 0.5000 | 0.4000 to 0.6000 |  | 20 |"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_an_image(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="plots")
    path = plot(RESULTS, tmp_path / f"plot.{suffix}")
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<?xml" in start
    with pytest.raises(ValueError, match="no task to plot"):
        plot({"tasks": {}}, tmp_path / "none.png")


def test_versions_name_what_takes_part() -> None:
    found = versions()
    assert {"python", "torch", "numpy"} <= found.keys()
    assert found["numpy"] == np.__version__
