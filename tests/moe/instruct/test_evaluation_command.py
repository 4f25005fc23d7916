"""`moe instruct eval` and `moe instruct report` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("rouge_score", reason="ROUGE-L is rouge-score's (extra `eval`)")

from moe.cli import app
from moe.compose import compose
from moe.instruct import Benchmark, build
from moe.run import train
from tests.moe.instruct.conftest import SUPER_NI, WriteTask, define


@pytest.fixture(scope="module")
def finished(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("instruct") / "run"
    settings = ["train.num_steps=1", "model.max_seq_len=256", "train.batch_tokens=1024", "eval.sample_tokens=4"]
    return train(compose([*overrides, f"run_dir={run_dir}", *settings]))


@pytest.fixture
def benchmark(tmp_path: Path, write_task: WriteTask) -> Benchmark:
    for number, source in enumerate("ab"):
        write_task(f"task{number}_{source}_x", count=110)
    write_task("task9_rte_x", category="Textual Entailment", count=4)
    held_out = {"held_out_categories": {"test": ["Textual Entailment"]}}
    splits = held_out | {"held_out_instances": {"test": ["bench/task1_b_x"]}, "test_records": 4}
    return build(define(SUPER_NI, **splits), tmp_path, tmp_path / "benchmark")


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["instruct", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_from_a_run_to_a_report(finished: Path, benchmark: Benchmark, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    common = ["--max-new-tokens", 4, "--shots", "0,2", "--separator", "\\n\\n\\n"]
    for folder in folders:
        printed = invoke("eval", finished, benchmark.folder, "--out", folder, *common)
        assert (folder / "table.md").read_text().strip() in printed
    results = json.loads((folders[0] / "results.json").read_text())
    assert list(results["tasks"]) == [
        f"bench/{task} {shots}-shot" for shots in (0, 2) for task in ("task1_b_x", "task9_rte_x")
    ]
    levels = {g["name"]: g for g in results["groups"] if g["kind"] == "level" and g["num_fewshot"] == 0}
    assert levels.keys() == {"held-out category", "held-out instances"}
    assert levels["held-out category"]["metrics"]["loss"]["num_samples"] == 4
    assert results["protocol"]["separator"] == "\n\n\n"
    samples = [json.loads(line) for line in (folders[0] / "samples.jsonl").open()]
    assert len(samples) == 2 * 8
    shown = next(row["prompt"] for row in samples if row["num_fewshot"] == 2 and "task1" in row["task"])
    assert shown.count("task1_b_x question") == 3
    again = json.loads((folders[1] / "results.json").read_text())
    assert again == results  # nothing in it depends on when or where
    with pytest.raises(ValueError, match="holds the results of an evaluation; choose another --out"):
        invoke("eval", finished, benchmark.folder, "--out", folders[0])
    printed = invoke("report", tmp_path / "report", f"m:before={folders[0]}", f"m:after={folders[1]}")
    assert (
        "m after over m before, held-out category, 0-shot, loss of target tokens (nats): no difference shown" in printed
    )
    assert (tmp_path / "report" / "gains.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "helm"], r"protocol \('helm'\) must be one of"),
        (["--shots", "0-5"], r"--shots \(0-5\) must be numbers with commas between"),
        (["--precision", "int8"], r"--precision \(int8\) must be one of"),
        (["--split", "train"], r"split \('train'\) must be validation or test"),
        (["--tasks", "bench/nothing"], "split test has no task 'bench/nothing'"),
        (["--normalisation", "pmi"], r"normalisation \('pmi'\) must be one of"),
        (["--protocol", "bbh"], r"manifest\.json: key 'examples' must be a list of questions"),
        (["--shots", "9"], r"num_shots \(9\) is more than the 3 other examples of task bench/task9_rte_x"),
        ([], r"max_new_tokens \(256\) leaves no room for a prompt of bench/task1_b_x"),
    ],
)
def test_what_cannot_be_asked(
    finished: Path, benchmark: Benchmark, tmp_path: Path, arguments: list[str], message: str
) -> None:
    more = ["--max-new-tokens", "4"] if arguments else []
    with pytest.raises(ValueError, match=message):
        invoke("eval", finished, benchmark.folder, "--out", tmp_path / "out", *arguments, *more)
    assert not (tmp_path / "out").exists()
