"""What the report computes: from runs whose law is known, and from the paper's published points."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe.compose import compose
from moe.scaling.flops import paper_training_flops
from moe.scaling.params import count_params
from moe.scaling.report import read
from moe.scaling.report.analysis import analyse
from tests.moe.scaling.study_files import DOMAINS, OUTSIDE, SIZES, SPEEDUP, TOKENS, loss, make_study, write

RESAMPLES = 200
EXACT = 1e-9  # relative: the law holds to rounding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    make_study(path, spread=0.02)
    return path


@pytest.fixture(scope="module")
def tree(folder: Path) -> dict[str, Any]:
    return analyse(read.study(folder), resamples=RESAMPLES)


def rows(tree: dict[str, Any], **wanted: object) -> list[dict[str, Any]]:
    return [row for row in tree["speedups"] if all(row[key] == value for key, value in wanted.items())]


def test_speedups_are_those_of_the_law(tree: dict[str, Any]) -> None:
    """A sparse model is as good as the dense one of 4 times its FLOPs, which was trained: no interpolation errs."""
    found = rows(tree, cost="flops", group="in-domain")
    assert {row["metric"] for row in found} == {"test/all", *(f"test/{name}" for name in DOMAINS)}
    assert {(row["size"], row["space"]) for row in found} == {
        (size, space) for size in "abc" for space in ("perplexity", "log-perplexity")
    }
    for row in found:
        assert row["speedup"] == pytest.approx(SPEEDUP, rel=EXACT)
        assert row["dense_cost"] == pytest.approx(4 * SIZES[row["size"]] * TOKENS, rel=EXACT)
    # what took 8 times the seconds of its twin saves no time: a dense model of 4 times the FLOPs took 4
    assert {round(row["speedup"], 9) for row in rows(tree, cost="seconds", metric="test/all")} == {0.5}
    assert rows(tree, cost="peak_memory_bytes", metric="test/all", size="a")[0]["speedup"] == pytest.approx(2.0)


def test_out_of_domain_counts_each_domain_once(tree: dict[str, Any]) -> None:
    model = next(row for row in tree["models"] if (row["size"], row["arm"]) == ("a", "dense"))
    flops = SIZES["a"] * TOKENS
    assert model["metrics"]["ood/all"]["mean"] == pytest.approx(loss(flops, sum(OUTSIDE.values()) / 2), rel=EXACT)
    assert {metric["key"] for metric in tree["metrics"] if metric["group"] == "out-of-domain"} == {
        "ood/all",
        *(f"ood/{name}" for name in OUTSIDE),
    }


def test_spaces_differ_between_models(folder: Path, tmp_path: Path) -> None:
    """Where the target is no model's own, perplexity and its logarithm interpolate differently, and both are told."""
    make_study(tmp_path)
    for path in tmp_path.glob("runs/b-dense-*/results.json"):
        path.unlink()
    tree = analyse(read.study(tmp_path), resamples=RESAMPLES)
    perplexity, log = (
        rows(tree, size="a", cost="flops", metric="test/all", space=s)[0] for s in ("perplexity", "log-perplexity")
    )
    flops = [SIZES[size] * TOKENS for size in "ac"]
    low, high, target = (loss(f, 0.0) for f in (*flops, SPEEDUP * flops[0]))
    share = (target - low) / (high - low)
    expected = math.exp(math.log(flops[0]) + share * math.log(flops[1] / flops[0])) / flops[0]
    assert log["speedup"] == pytest.approx(expected, rel=1e-6)
    assert perplexity["speedup"] != pytest.approx(log["speedup"], rel=1e-3)
    assert log["between"] == ["a dense", "c dense"]


def test_outside_of_the_bracket_there_is_no_speedup(tmp_path: Path) -> None:
    make_study(tmp_path)
    for path in tmp_path.glob("runs/d-dense-*/results.json"):
        path.unlink()
    tree = analyse(read.study(tmp_path), resamples=RESAMPLES)
    row = rows(tree, size="c", cost="flops", metric="test/all", space="perplexity")[0]
    assert row["speedup"] is None and row["dense_cost"] is None
    assert row["why"].startswith("not bracketed: no model is better than")
    assert rows(tree, size="b", cost="flops", metric="test/all")[0]["speedup"] == pytest.approx(SPEEDUP)
    assert set(tree["missing"]) == {"d-dense-t1M-s0", "d-dense-t1M-s1"}


def test_intervals_say_what_they_are(tree: dict[str, Any], folder: Path) -> None:
    row = rows(tree, size="a", cost="flops", metric="test/all", space="perplexity")[0]
    seeds, documents = row["over_seeds"], row["over_documents"]
    assert seeds["kind"] == "bootstrap over seeds" and seeds["fewest_seeds"] == 2
    assert seeds["low"] <= SPEEDUP <= seeds["high"] and seeds["high"] > seeds["low"]
    assert documents["kind"] == "paired bootstrap over documents" and documents["documents"] == 40
    assert documents["low"] < SPEEDUP * 1.001 and documents["high"] > SPEEDUP * 0.999
    assert rows(tree, metric="ood/all", cost="flops")[0]["over_documents"] is None  # of each domain alone
    assert rows(tree, metric="ood/code", cost="flops")[0]["over_documents"]["documents"] == 20


def test_few_documents_have_no_interval(tmp_path: Path) -> None:
    """Nine documents of a domain, merged from twenty: its losses stand, an interval over them does not."""
    make_study(tmp_path)
    for path in tmp_path.glob("runs/*/ood/results.json"):
        tree = json.loads(path.read_text())
        for name, values in tree["domains"].items():
            if name == "code":
                for key, numbers in values["documents"].items():
                    values["documents"][key] = [*numbers[:8], sum(numbers[8:])]
        path.write_text(json.dumps(tree))
    found = analyse(read.study(tmp_path), resamples=RESAMPLES)
    assert rows(found, metric="ood/code", cost="flops")[0]["over_documents"] is None
    assert rows(found, metric="ood/code", cost="flops")[0]["speedup"] == pytest.approx(SPEEDUP)
    assert rows(found, metric="test/all", cost="flops")[0]["over_documents"]["documents"] == 40
    differences = [row for row in found["pair_differences"] if row["metric"] == "ood/code"]
    assert differences and all(row["over_documents"] is None for row in differences)


def test_documents_are_paired(tree: dict[str, Any]) -> None:
    """Documents differ by 0.2 nats and twins by a constant: paired, the difference is nearly certain; unpaired not."""
    row = next(row for row in tree["pair_differences"] if (row["size"], row["metric"]) == ("a", "test/books"))
    flops = SIZES["a"] * TOKENS
    assert row["difference"] == pytest.approx(loss(SPEEDUP * flops) - loss(flops), rel=1e-6)
    assert row["difference"] < 0 and row["seeds"] == [0, 1]
    width = row["over_documents"]["high"] - row["over_documents"]["low"]
    assert row["over_documents"]["low"] - EXACT <= row["difference"] <= row["over_documents"]["high"] + EXACT
    assert width < 0.05 < 0.2 / math.sqrt(20) * 2


def test_power_laws(tree: dict[str, Any]) -> None:
    fits = {(fit["arm"], fit["metric"], fit["with_offset"]): fit for fit in tree["fits"]}
    dense = fits["dense", "test/books", False]
    assert dense["exponent"] == pytest.approx(0.08, rel=1e-6) and dense["points"] == 4
    assert dense["exponent_interval"][0] < 0.08 < dense["exponent_interval"][1]
    assert fits["8e", "test/books", False]["exponent"] == pytest.approx(0.08, rel=1e-6)
    assert not any(with_offset for _, _, with_offset in fits)  # four sizes are too few for three parameters


def test_experts(tree: dict[str, Any]) -> None:
    even, uneven = [row for row in tree["experts"] if row["size"] == "a"]
    assert (even["dead"], even["max_over_mean"], even["coefficient_of_variation"]) == (0, 1, 0)
    assert even["entropy_share"] == pytest.approx(1.0)
    assert (uneven["dead"], uneven["max_over_mean"]) == (6, 4)
    assert uneven["entropy_share"] == pytest.approx(math.log(2) / math.log(8))
    assert uneven["coefficient_of_variation"] == pytest.approx(math.sqrt(3))


def test_tasks_and_a_metric_of_unknown_direction(tree: dict[str, Any]) -> None:
    tasks = [metric for metric in tree["metrics"] if metric["group"] == "task"]
    assert [(metric["key"], metric["lower_is_better"]) for metric in tasks] == [("task/blimp acc", False)]
    assert rows(tree, metric="task/blimp acc", cost="flops", size="a")[0]["speedup"] == pytest.approx(SPEEDUP)


def test_every_point_names_its_folder_and_commit(tree: dict[str, Any]) -> None:
    assert len(tree["runs"]) == 14
    for run in tree["runs"]:
        assert run["run_dir"] == f"runs/{run['run']}" and run["commits"] == ["c0ffee"]
        assert run["changed_since_commit"] is False


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("results.json", None, "is missing: the run is not complete"),
        ("results.json", '{"splits": {"te', "is half-written or damaged"),
        ("results.json", '{"tokens": 1}', "has no field 'splits'"),
        ("results.json", '{"splits": {"validation": {}}}', "has no domain of the test split"),
        ("ood/results.json", None, "is missing"),
        ("tasks/results.json", "[1, 2", "is half-written or damaged"),
        ("documents.json", "{", "is half-written or damaged"),
    ],
)
def test_runs_that_are_not_whole_are_named_and_left_out(
    tmp_path: Path, path: str, content: str | None, words: str
) -> None:
    make_study(tmp_path)
    file = tmp_path / "runs/b-8e-t1M-s1" / path
    file.unlink() if content is None else file.write_text(content)
    found = read.study(tmp_path)
    assert list(found.missing) == ["b-8e-t1M-s1"] and words in found.missing["b-8e-t1M-s1"]
    assert len(found.records) == 13


@pytest.mark.parametrize("loss", [None, math.nan, 1000.0], ids=["null", "nan", "infinite_perplexity"])
@pytest.mark.parametrize("path", ["results.json", "ood/results.json"])
def test_a_run_that_diverged_is_named(tmp_path: Path, path: str, loss: float | None) -> None:
    """`moe train` and `moe perplexity` write null for what is not finite."""
    make_study(tmp_path, documents=False)
    file = tmp_path / "runs/b-8e-t1M-s1" / path
    results = json.loads(file.read_text())
    splits = results["splits"]["test"] if "splits" in results else results
    next(iter(splits["domains"].values()))["cross_entropy"] = loss
    write(file, results)
    found = read.study(tmp_path)
    assert "is not finite: the run diverged" in found.missing["b-8e-t1M-s1"]
    assert len(analyse(found, resamples=RESAMPLES)["runs"]) == 13


@pytest.mark.parametrize("text", ["[{", '{"commit": "c0ffee"}', '[{"at": "2026"}]', "[1]"])
def test_a_damaged_record_of_starts_is_an_error_and_drops_no_run(tmp_path: Path, text: str) -> None:
    make_study(tmp_path)
    (tmp_path / "started/a-8e-t1M-s1.json").write_text(text)
    with pytest.raises(ValueError, match=r"started/a-8e-t1M-s1\.json is damaged .*which commit.*delete it"):
        read.study(tmp_path)


def test_what_nobody_knows_of_a_run_is_not_told(tmp_path: Path) -> None:
    """An installed package has no checkout that was changed or not; neither has a run without its record."""
    make_study(tmp_path)
    installed = {"commit": None, "changed": None, "version": "0.1", "command": []}
    write(tmp_path / "started/a-dense-t1M-s0.json", [installed])
    (tmp_path / "started/a-dense-t1M-s1.json").unlink()
    started = [{"commit": "c0ffee", "changed": changed, "command": []} for changed in (None, True)]
    write(tmp_path / "started/a-8e-t1M-s0.json", started)
    told = {record.name: record.facts["changed_since_commit"] for record in read.study(tmp_path).records}
    assert [told[f"a-dense-t1M-s{seed}"] for seed in (0, 1)] == [None, None]
    assert told["a-8e-t1M-s0"] is True and told["a-8e-t1M-s1"] is False


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("few/results.json", "tasks/results.json", r"few/results\.json measures task/blimp acc, as .* evaluation does"),
        ("ood/more.json", "ood/results.json", r"ood/more\.json measures ood/all"),
        ("test.json", "ood/results.json", r"test\.json measures test/all, as the test split"),
    ],
)
def test_one_evaluation_does_not_replace_another(tmp_path: Path, name: str, source: str, words: str) -> None:
    make_study(tmp_path)
    manifest = json.loads((tmp_path / "study.json").read_text())
    write(tmp_path / "study.json", manifest | {"evaluations": [*manifest["evaluations"], name]})
    for run_dir in (tmp_path / "runs").iterdir():
        write(run_dir / name, json.loads((run_dir / source).read_text()))
    with pytest.raises(ValueError, match=words):
        read.study(tmp_path)


def test_documents_of_a_pair_are_of_the_seeds_that_both_have(tmp_path: Path) -> None:
    """A twin without its second seed: the interval is around the difference of the first."""
    make_study(tmp_path, spread=0.5)
    (tmp_path / "runs/a-8e-t1M-s1/results.json").unlink()
    found = analyse(read.study(tmp_path), resamples=RESAMPLES)
    row = next(row for row in found["pair_differences"] if (row["size"], row["metric"]) == ("a", "test/books"))
    assert row["seeds"] == [0]
    assert row["over_documents"]["low"] - EXACT <= row["difference"] <= row["over_documents"]["high"] + EXACT


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        ("corpus.json", {"test": "other"}, "trained or tested on other text"),
        ("ood/results.json", {"protocol": "rolling"}, "another protocol, tokenizer or list of domains"),
        ("ood/results.json", {"tokenizer": "xyz"}, "another protocol, tokenizer or list of domains"),
        (
            "ood/results.json",
            {"domains": {name: {"cross_entropy": 3.0, "num_tokens": 5} for name in OUTSIDE}},
            "or other text in them, than those of other runs",
        ),
        ("tasks/results.json", {"tasks": {"blimp": {"num_fewshot": 5, "metrics": {}}}}, "number of demonstrations"),
        ("tasks/results.json", {"limit": 100}, "another protocol, limit"),
        (
            "documents.json",
            {"test": {"books": {"nats": [30.0], "num_tokens": [3]}}},
            "nats per token, and the domain has",
        ),
        ("documents.json", {"test": {"books": {"nats": [1.0, 2.0], "num_tokens": [3]}}}, "they must match"),
        ("documents.json", {"test": {"films": {"nats": [1.0], "num_tokens": [3]}}}, "has the domain films"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, path: str, change: dict, words: str) -> None:
    make_study(tmp_path)
    file = tmp_path / "runs/b-8e-t1M-s1" / path
    write(file, json.loads(file.read_text()) | change)
    with pytest.raises(ValueError, match=words):
        read.study(tmp_path)


def test_nothing_complete_is_an_error(tmp_path: Path) -> None:
    make_study(tmp_path)
    for path in tmp_path.glob("runs/*/results.json"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no run of .* is complete"):
        read.study(tmp_path)
    manifest = json.loads((tmp_path / "study.json").read_text())
    write(tmp_path / "study.json", manifest | {"runs": []})
    with pytest.raises(ValueError, match="has not chosen yet"):
        read.study(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ValueError, match="half-written or damaged"):
        read.study(tmp_path)


# the paper's scores are recalled: what is tested is the arithmetic on the stated table (Artetxe et al. 2021)
def test_the_papers_four_times() -> None:
    tree = analyse(read.published(), resamples=RESAMPLES)
    found = {row["size"]: row for row in rows(tree, metric="task/average", cost="flops")}
    assert round(found["125M"]["dense_cost"] / 1e21, 2) == 1.55
    assert round(found["125M"]["speedup"], 1) == 3.6
    assert round(found["355M"]["dense_cost"] / 1e21, 2) == 5.02
    assert round(found["355M"]["speedup"], 1) == 3.9
    assert found["125M"]["between"] == ["355M dense", "1.3B dense"]
    for size in ("1.3B", "6.7B"):  # better than any dense model whose score is known
        assert found[size]["speedup"] is None and "not bracketed" in found[size]["why"]
    figure = next(curve for curve in tree["curves"] if curve["metric"] == "task/average")
    by_target = dict(zip(figure["target"], figure["speedup"], strict=True))
    assert by_target[62.4] == pytest.approx(found["125M"]["speedup"])
    # where dense ends, 2.7B: the sparse cost lies between 52B's and 207B's, by hand 1.3 * (4.533 / 1.3)^(1.4 / 2.5)
    assert max(by_target) == 69.6
    assert by_target[69.6] == pytest.approx(7.076 / (1.3 * (4.533 / 1.3) ** (1.4 / 2.5)))


def test_the_published_table_is_what_our_formulas_give() -> None:
    published = read.published()
    assert set(published.missing) == {"dense 6.7B", "dense 13B"}
    assert "recalled" in " ".join(published.notes)
    for record in published.records:
        assert "recalled, unverified" in record.facts["confidence"]
        moe = ["+moe=512e"] if record.num_experts else []
        model = compose([f"model={record.size.lower()}", *moe, "train.batch_tokens=2048"]).model
        flops = paper_training_flops(model, 300e9, 2048)
        assert round(flops / 1e21, 3) == pytest.approx(record.costs["flops"] / 1e21, abs=5e-4)
        assert count_params(model).total == record.facts["total_params"]


def test_reporting_needs_no_torch() -> None:
    code = "import sys, moe.scaling.report.build, moe.scaling.report.read, moe.scaling.study.harness\n"
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
