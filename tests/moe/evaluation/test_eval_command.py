"""`moe eval` as a user types it: a folder of results, one-line errors, a paper's protocol beside lm-eval's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe.cli import app
from moe.compose import compose
from moe.evaluation.protocol_run import _task
from moe.evaluation.protocols import RunResult, TaskResult
from moe.run import train

pytest.importorskip("lm_eval", reason="moe eval runs lm-eval's tasks (extra `eval`)")


@pytest.fixture(scope="module")
def finished(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("eval") / "run"
    settings = ["train.num_steps=1", "model.max_seq_len=128", "train.batch_tokens=512", "eval.sample_tokens=4"]
    return train(compose([*overrides, f"run_dir={run_dir}", *settings]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    path = folder / "super_glue/COPA/val.jsonl"
    path.parent.mkdir(parents=True)
    rows = [
        {"premise": f"The {word} ran.", "choice1": "It was late.", "choice2": "The layer reads.", "question": "cause"}
        for word in ("expert", "token", "gate", "layer", "word", "router")
    ]
    rows[-1]["premise"] = "The long story went on " + "and on " * 60 + "there."
    path.write_text("".join(json.dumps(row | {"idx": i, "label": i % 2}) + "\n" for i, row in enumerate(rows)))
    return folder


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_lm_eval_and_a_papers_protocol(finished: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "lm-eval"
    printed = invoke(finished, "--tasks", "copa", "--data-dir", data, "--out", out, "--samples")
    results = json.loads((out / "results.json").read_text())
    figures = results["tasks"]["copa"]["metrics"]["acc"]
    assert figures["num_samples"] == 6
    assert 0 <= figures["low"] <= figures["value"] <= figures["high"] <= 1
    assert results["data"]["aps/super_glue/copa/validation"]["rows"] == 6
    assert {"lm-eval", "torch", "python"} <= results["versions"].keys()
    assert results["seed"] == 1234
    assert results["requests"]["loglikelihood"]["truncated"] == 2
    assert (
        "loglikelihood: 2 of 12 requests lost the beginning of their context to fit model.max_seq_len (128)" in printed
    )
    assert (out / "table.md").read_text().strip() in printed
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (out / "samples.jsonl").open()]
    assert sum(sample["acc"] for sample in samples) / 6 == figures["value"]
    with pytest.raises(ValueError, match="holds the results of an evaluation; choose another --out"):
        invoke(finished, "--tasks", "copa", "--data-dir", data, "--out", out)

    again = tmp_path / "again"
    invoke(finished, "--tasks", "copa", "--data-dir", data, "--out", again, "--batch-tokens", 1, "--limit", 6)
    assert json.loads((again / "results.json").read_text())["tasks"] == results["tasks"]

    paper = tmp_path / "paper"
    invoke(finished, "--tasks", "copa, ", "--protocol", "artetxe2021", "--data-dir", data, "--out", paper)
    found = json.loads((paper / "results.json").read_text())
    assert found["protocol"] == "artetxe2021"
    assert found["tasks"]["copa"]["metrics"]["accuracy"]["num_samples"] == 6
    assert found["data"].keys() == results["data"].keys()


def test_what_found_no_room_is_said(finished: Path, data: Path, tmp_path: Path) -> None:
    train = data / "super_glue/COPA/train.jsonl"
    train.write_text((data / "super_glue/COPA/val.jsonl").read_text())
    options = ["--tasks", "copa", "--protocol", "artetxe2021", "--data-dir", data, "--runs", 2, "--num-fewshot", 6]
    printed = invoke(finished, *options, "--out", tmp_path / "out")
    train.unlink()
    task = json.loads((tmp_path / "out/results.json").read_text())["tasks"]["copa"]
    assert 0 < task["mean_shots"] < 6
    assert task["num_cut"] == 1
    shown = f"{task['mean_shots']:.1f}"
    assert (
        f"copa: {shown} of 6 demonstrations found room; 1 questions lost their beginning (model.max_seq_len" in printed
    )
    assert f"| copa | 6 ({shown}) | accuracy |" in printed


def test_wrong_names_are_found_before_the_model_runs(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr("moe.evaluation.protocol_run.run_task", fail)
    common = ["--protocol", "xglm", "--data-dir", data, "--out", tmp_path / "out"]
    for arguments, message in [
        (["--tasks", "copa,foo"], "the protocol xglm has no task 'foo'"),
        (["--tasks", "copa,piqa"], "piqa"),  # whose file is not there
        (["--tasks", "copa", "--languages", "en, xx"], "copa has no language 'xx'"),
        (
            ["--tasks", "copa", "--template-language", "xx"],
            "template_language .'xx'.: copa has one prompt for all languages",
        ),
        (["--tasks", "copa", "--template-set", "foo"], "template_set .'foo'.: copa has one set of templates"),
        (["--tasks", "copa", "--demo-split", "train"], "demo_split .'train'. applies to demonstrations"),
        (["--tasks", "copa", "--num-fewshot", 7], "no file with split 'train'"),
    ]:
        with pytest.raises(ValueError, match=message):
            invoke(finished, *arguments, *common)
    assert not (tmp_path / "out").exists()


def test_a_few_shot_interval_is_over_questions_too() -> None:
    """Two draws that agree on every question leave it open what other questions would give."""
    run = RunResult((1.0, 0.0) * 10, (0,) * 20, 0, 4.0, 0, 0.0, ())
    result = TaskResult({"num_shots": 4}, (run, run), 0.5, ((),) * 20, tuple(map(str, range(20))))
    found = _task(result)
    assert found["interval_over_demonstrations"] == (0.5, 0.5)
    figure = found["metrics"]["accuracy"]
    assert figure["low"] < 0.35
    assert figure["high"] > 0.65


def test_the_list_of_data_sets() -> None:
    printed = invoke("--list-data")
    assert "cambridgeltl/xcopa (et, ht, id, it, qu, sw, ta, th, tr, vi, zh)" in printed.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"needs a run folder or checkpoint and --tasks"),
        (["RUN", "--tasks", "copa", "--protocol", "gpt3"], r"--protocol \(gpt3\) must be one of: lm-eval, artetxe2021"),
        (
            ["RUN", "--tasks", "copa", "--protocol", "xglm"],
            r"--protocol xglm reads its data from files: set --data-dir",
        ),
        (
            ["RUN", "--tasks", "copa", "--languages", "sw"],
            r"--languages applies only with --protocol artetxe2021 or xglm",
        ),
        *(
            (["RUN", "--tasks", "copa", *given], rf"{given[0]} applies only with --protocol artetxe2021 or xglm")
            for given in (["--template-language", "en"], ["--template-set", "corrected"], ["--demo-split", "train"])
        ),
        *(
            (
                ["RUN", "--tasks", "copa", "--protocol", "xglm", "--data-dir", ".", *given],
                rf"{given[0]} applies only with --protocol lm-eval",
            )
            for given in (["--beginning", "auto"], ["--seed", "1234"], ["--samples"])
        ),
        (["RUN", "--tasks", "copa", "--precision", "int8"], r"--precision \(int8\) must be one of"),
    ],
)
def test_what_cannot_be_run_is_refused_before_a_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        invoke(*arguments)
    assert list(tmp_path.iterdir()) == []
