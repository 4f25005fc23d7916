from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moe.compose import compose, to_yaml
from moe.summary import print_summary

RESULTS = {
    "total_params": 68_289_920,
    "active_params": 1_443_200,
    "training_flops_per_token": 10_223_616,
    "training_flops": 1.67e13,
    "steps": 400,
    "skipped_steps": 1,
    "tokens": 1_638_400,
    "seconds": 170.0,
    "tokens_per_second": 9637.6,
    "peak_memory_bytes": 3 * 2**30,
    "splits": {
        split: {
            "domains": {"docs": {"bits_per_byte": 2.0512, "perplexity": 60.5, "num_tokens": 31_602}},
            "dead_experts": 0,
        }
        for split in ("validation", "test")
    },
    "compressors": {
        split: {"docs": {"gzip": 2.359, "xz": 2.131, "xz_given_train": 1.698}} for split in ("validation", "test")
    },
}


def summary(folder: Path, results: dict, *overrides: str) -> str:
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(to_yaml(compose(list(overrides))))
    stream = io.StringIO()
    print_summary(folder, Console(file=stream, width=120))
    return stream.getvalue()


def test_the_table_holds_the_figures_and_the_next_commands(tmp_path: Path) -> None:
    text = summary(tmp_path, RESULTS, "+moe=512e")
    for expected in ("2.051", "2.359", "2.131", "1.698", "60.50", "68,289,920", "1,443,200", "1.67e+13", "400 (1)"):
        assert expected in text
    assert "3.00 GiB" in text
    assert "experts without a validation token" in text
    assert "moe generate" in text
    assert "tensorboard --logdir" in text
    assert "the dense twin" in text


def test_a_figure_that_no_float_holds_is_shown(tmp_path: Path) -> None:
    results = json.loads(json.dumps(RESULTS))
    results["splits"]["test"]["domains"]["docs"] |= {"perplexity": None, "bits_per_byte": None}
    assert "not finite" in summary(tmp_path, results)


def test_a_dense_run_points_to_its_sparse_twin(tmp_path: Path) -> None:
    results = json.loads(json.dumps(RESULTS))
    for split in results["splits"].values():
        split["dead_experts"] = None
    text = summary(tmp_path, results)
    assert "experts without" not in text
    assert "python train.py +moe=512e" in text


def test_a_missing_figure_is_an_error_not_a_zero(tmp_path: Path) -> None:
    results = {key: value for key, value in RESULTS.items() if key != "seconds"}
    with pytest.raises(KeyError):
        summary(tmp_path, results)
