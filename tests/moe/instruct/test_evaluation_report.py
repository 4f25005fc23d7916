"""Comparisons with planted gains: found where they are, not found elsewhere, refused where they mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.instruct.evaluation import compare, parse_source, write_report
from moe.instruct.evaluation.aggregation import verdict
from moe.instruct.evaluation.comparison import Comparison, Difference
from moe.instruct.evaluation.report import findings

NUM = 300  # examples of each task
LEVEL = ("level", 1, "", "held-out category", 0)


def entry(task: str, accuracy: np.ndarray, loss: np.ndarray, level: int = 1) -> dict[str, Any]:
    ones, names = [1.0] * len(accuracy), [str(i) for i in range(len(accuracy))]
    return {
        "num_fewshot": 0,
        "task": task,
        "benchmark": "b",
        "category": "QA",
        "level": level,
        "same_task": task,
        "primary": "accuracy",
        "chance": {"accuracy": 0.45},
        "constant": {"accuracy": 0.55},
        "records_sha256": "same",
        "series": {
            "accuracy": {"sums": accuracy.tolist(), "counts": ones, "examples": names},
            "loss": {"sums": loss.tolist(), "counts": ones, "examples": names},
        },
    }


def write(folder: Path, right: float, **changes: Any) -> Path:
    """An evaluation in which a share `right` of the answers is right; the same draws decide in every folder."""
    uniform = np.random.default_rng(0).random((2, NUM))
    tasks = {f"b/{i}": entry(f"b/{i}", (uniform[i] < right).astype(float), 2.0 - right * uniform[i]) for i in range(2)}
    results = {
        "kind": "instruct",
        "protocol": {"name": "opt_iml", "primary": "rouge_l"},
        "rouge": "words",
        "benchmark": {"name": "x", "split": "test", "manifest_sha256": "a"},
        "tokenizer_sha256": "t",
        "model": "checkpoint",
        "precision": "fp32",
        "max_seq_len": 128,
        "tasks": tasks,
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results | changes))
    return folder


def comparison(tmp_path: Path, **shares: float) -> Comparison:
    """dense_before=0.5 names model and stage."""
    sources = []
    for name, share in shares.items():
        model, stage = name.split("_")[:2]
        sources.append(parse_source(f"{model}:{stage}={write(tmp_path / name, share)}"))
    return compare(sources)


def find(differences: list[Difference], metric: str = "score") -> dict[str, Difference]:
    return {each.name: each for each in differences if each.key == LEVEL and each.metric == metric}


def test_planted_gains(tmp_path: Path) -> None:
    found = comparison(tmp_path, dense_before=0.5, dense_after=0.6, moe_before=0.5, moe_after=0.85)
    gains = find(found.gains)
    assert gains["dense after"].estimate.value == pytest.approx(0.1, abs=0.03)
    assert gains["moe after"].estimate.value == pytest.approx(0.35, abs=0.03)
    assert {each.says for each in gains.values()} == {"more"}
    more = find(found.gain_differences)["moe"]
    assert (more.than, more.says) == ("dense", "more")
    assert more.estimate.value == pytest.approx(gains["moe after"].estimate.value - gains["dense after"].estimate.value)
    # 600 paired examples, of which a quarter changed in one model alone: the standard error of a share of 1/4
    assert more.estimate.high - more.estimate.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 * 0.75 / 600), rel=0.2)
    assert find(found.gains, "loss")["moe after"].estimate.value > 0  # the loss fell
    text = "\n".join(findings(found))
    assert "**The gain of moe is larger than dense's**, held-out category, 0-shot, score: by +0.2" in text
    assert "dense before, 0-shot: 0 of 1 levels are above chance; not above: held-out category." in text
    assert "moe after, 0-shot: 2 of 2 tasks are above chance." in text


def test_a_report_has_the_verdicts_of_its_evaluation(tmp_path: Path) -> None:
    """Four of four right is luck in one case of 16 at a chance of one half, in results.json and in a report of it."""
    lucky = entry("b/x", np.ones(4), np.ones(4)) | {"chance": {"accuracy": 0.5}}
    source = parse_source(f"a={write(tmp_path / 'a', 0.5, tasks={'b/x': lucky})}")
    for sources in ([source], [source, source]):
        (arm,) = compare(sources).arms
        for key, figures in arm.groups.items():
            assert verdict(figures["accuracy"]) == "not above", key
    assert "0 of 1 levels are above chance" in "\n".join(findings(compare([source])))


def test_one_lucky_answer_is_no_gain(tmp_path: Path) -> None:
    """A draw leaves the one example out in which they differ with probability 1/e."""
    sources = []
    for name, right in (("before", 0), ("after", 1)):
        values = np.zeros(100)
        values[:right] = 1.0
        folder = write(tmp_path / name, 0.5, tasks={"b/x": entry("b/x", values, np.ones(100))})
        sources.append(parse_source(f"m:{name}={folder}"))
    (gain,) = find(compare(sources).gains).values()
    assert (gain.estimate.low, gain.says) == (0.0, "no difference")


def test_no_difference_is_said_to_be_none(tmp_path: Path) -> None:
    found = comparison(tmp_path, dense_before=0.5, dense_after=0.7, moe_before=0.5, moe_after=0.7)
    same = find(found.gain_differences)["moe"]
    assert (same.says, same.estimate.value) == ("no difference", 0.0)
    assert "**The gain of moe is not shown to differ from dense's**" in "\n".join(findings(found))
    less = comparison(tmp_path / "less", dense_before=0.5, dense_after=0.9, moe_before=0.5, moe_after=0.6)
    assert "**The gain of moe is smaller than dense's**" in "\n".join(findings(less))


def test_seeds(tmp_path: Path) -> None:
    found = comparison(tmp_path, dense_x_1=0.5, dense_x_2=0.8, moe_x_1=0.65)
    dense, moe = found.arms
    assert (dense.num_seeds, moe.num_seeds) == (2, 1)
    figure = dense.groups[LEVEL]["score"]
    low, high = dense.spread[LEVEL]["score"]
    assert figure.value == pytest.approx((low + high) / 2)
    assert figure.estimate().high - figure.estimate().low > 3 * (
        moe.groups[LEVEL]["score"].estimate().high - moe.groups[LEVEL]["score"].estimate().low
    )
    (difference,) = find(found.differences).values()
    assert (difference.name, difference.than, difference.says) == ("moe", "dense", "no difference")
    single = comparison(tmp_path / "single", dense_x=0.5, moe_x=0.65)
    assert find(single.differences)["moe"].says == "more"
    assert find(single.differences, "loss")["moe"].estimate.value > 0


def test_the_page(tmp_path: Path) -> None:
    names = {"dense_before": 0.5, "dense_after": 0.6, "moe_before": 0.5, "moe_after": 0.85}
    sources = [parse_source(f"{n.replace('_', ':')}={write(tmp_path / n, share)}") for n, share in names.items()]
    path = write_report(compare(sources), sources, tmp_path / "report")
    text = path.read_text()
    for part in ("## Findings", "## Levels", "## Categories", "## Tasks", "## Gains of tuning", "![gains](gains.png)"):
        assert part in text
    assert "| held-out category | 0 | score | 0.450 | 0.550 |" in text
    assert "▲" in text
    for name in ("levels.png", "gains.png"):
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="holds a report; choose another --out"):
        write_report(compare(sources), sources, tmp_path / "report")


def test_what_does_not_compare(tmp_path: Path) -> None:
    good = parse_source(f"a={write(tmp_path / 'good', 0.5)}")

    def with_(name: str, **changes: Any) -> Any:
        return parse_source(f"b={write(tmp_path / name, 0.6, **changes)}")

    other = good.results | {"benchmark": {"name": "y"}}
    for name, changes, message in [
        (
            "protocol",
            {"protocol": {"name": "flan"}},
            r"compared: protocol\.name is 'opt_iml' and 'flan'; protocol\.p",
        ),
        ("benchmark", {"benchmark": other["benchmark"]}, r"cannot be compared: benchmark\.name is 'x' and 'y'"),
        ("seed", {"seed": 1}, "cannot be compared: seed is None and 1"),
        ("fewer", {"tasks": {"b/0": good.results["tasks"]["b/0"]}}, "cannot be compared: only one of them has b/1"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare([good, with_(name, **changes)])
    changed = json.loads(json.dumps(good.results["tasks"]))
    changed["b/1"]["records_sha256"] = "other"
    with pytest.raises(ValueError, match="cannot be compared: task b/1 was scored on other records"):
        compare([good, with_("records", tasks=changed)])
    found = compare([good, with_("tokenizer", tokenizer_sha256="u", max_seq_len=64)])
    assert [note.split(",")[0] for note in found.notes] == ["max_seq_len differs: 128", "the tokenizers differ"]
    assert "loss" not in found.arms[0].groups[LEVEL]
    stages = [parse_source(f"m:{name}={tmp_path / 'good'}") for name in "abc"]
    with pytest.raises(ValueError, match=r"m \(a, b, c\) has more than two stages"):
        compare(stages)
    with pytest.raises(ValueError, match="nothing to report"):
        compare([])


def test_what_is_no_evaluation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist: give folders that `moe instruct eval` wrote"):
        parse_source(f"a={tmp_path}")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        parse_source(str(tmp_path))
    (tmp_path / "results.json").write_text('{"tasks": {}}')
    with pytest.raises(ValueError, match=r"is not the results\.json of `moe instruct eval`"):
        parse_source(str(tmp_path))
    task = entry("b/0", np.ones(3), np.ones(3))
    del task["series"]["loss"]["examples"]
    with pytest.raises(ValueError, match=r"does not name the raw examples of task b/0 .* evaluate again"):
        parse_source(str(write(tmp_path / "old", 0.5, tasks={"b/0": task})))
    with pytest.raises(ValueError, match="names no model"):
        parse_source(f":after={write(tmp_path / 'x', 0.5)}")
    assert parse_source(str(tmp_path / "x")).label == "x"
