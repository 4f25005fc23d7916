from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from typer.testing import CliRunner

from moe.cli import app
from moe.evaluation.specialization import read_maps, table


def write(folder: Path, counts: dict[str, list[list[int]]]) -> Path:
    content = {"splits": {"test": {"tokens_per_expert_of_domains": counts}}}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def test_domains_that_share_no_expert_are_known_by_it_and_equal_ones_are_not(tmp_path: Path) -> None:
    apart, alike = [[10, 0, 0, 0], [0, 0, 4, 4], [0, 7, 0, 0]], [[1, 2, 3, 4], [10, 20, 30, 40], [2, 4, 6, 8]]
    counts = {domain: [a, b] for domain, a, b in zip("xyz", apart, alike, strict=True)}
    first, second = read_maps(write(tmp_path, counts))
    assert first.information == pytest.approx(math.log2(3))
    assert second.information == pytest.approx(0.0, abs=1e-12)
    assert first.effective_experts == pytest.approx({"x": 1.0, "y": 2.0, "z": 1.0})


def test_figures_are_scipys(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 50, (5, 7))
    (made,) = read_maps(write(tmp_path, {str(i): [row.tolist()] for i, row in enumerate(numbers)}))
    shares = numbers / numbers.sum(axis=1, keepdims=True)
    expected = entropy(shares.mean(axis=0), base=2) - np.mean([entropy(row, base=2) for row in shares])
    assert made.information == pytest.approx(expected)
    for i in range(5):
        for j in range(5):
            assert made.distances[i, j] == pytest.approx(jensenshannon(shares[i], shares[j], base=2) ** 2, abs=1e-12)
    distances = made.distances + np.diag([np.inf] * 5)
    assert [made.nearest(str(i)) for i in range(5)] == [str(distances[i].argmin()) for i in range(5)]


def test_the_command_prints_a_table_and_draws(tmp_path: Path) -> None:
    write(tmp_path, {"en": [[5, 1]], "fr": [[1, 5]]})
    result = CliRunner().invoke(app, ["experts", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "| en |" in result.output
    assert (tmp_path / "experts.png").stat().st_size > 1000
    assert "nearest" in table(read_maps(tmp_path))


@pytest.mark.parametrize(
    ("counts", "message"),
    [({}, "does not count experts"), ({"en": [[1, 2]]}, "one domain"), ({"en": [[1]], "fr": [[0]]}, "fr has no token")],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, counts: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_maps(write(tmp_path, counts))
    with pytest.raises(ValueError, match="no results"):
        read_maps(tmp_path / "nothing")
