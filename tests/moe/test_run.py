"""The composition root, in process, on a corpus of made-up sentences."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch

from moe.checkpoint import DivergedError, list_checkpoints, load_config, load_model, load_tokenizer
from moe.checkpoint.folders import remove_checkpoint
from moe.compose import compose, from_yaml, to_yaml
from moe.data.loader import TokenBatch
from moe.data.prepare import prepare
from moe.multirun import main
from moe.pretraining import Text
from moe.run import train
from moe.run_folder import run_name
from moe.training.metrics import StepMetrics, read_metrics
from moe.training.trainer import BatchLosses, Trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert train(compose([*overrides, f"run_dir={run_dir}"])) == run_dir
    return run_dir


def test_a_run_leaves_its_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml",
        "corpus.json",
        "metrics.jsonl",
        "tensorboard",
        "samples.txt",
        "documents.json",
        "results.json",
        "checkpoints",
    }
    assert [path.name for path in list_checkpoints(finished / "checkpoints")] == ["step_00000009", "step_00000010"]


def test_results_hold_what_the_table_shows(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    for domain, losses in json.loads((finished / "documents.json").read_text())["test"].items():
        figures = results["splits"]["test"]["domains"][domain]
        assert sum(losses["num_tokens"]) == figures["num_tokens"]
        assert sum(losses["nats"]) == pytest.approx(figures["cross_entropy"] * figures["num_tokens"])
    assert (results["steps"], results["tokens"], results["skipped_steps"]) == (10, 2560, 0)
    assert results["training_flops"] == results["training_flops_per_token"] * 2560
    assert 0 < results["active_params"] < results["total_params"]
    model = load_model(finished)
    assert results["total_params"] == sum(parameter.numel() for parameter in model.parameters())
    for split in ("validation", "test"):
        figures = results["splits"][split]["domains"]["sentences"]
        assert 0 < figures["bits_per_byte"] < 10
        assert results["compressors"][split]["sentences"].keys() == {"gzip", "xz", "xz_given_train"}
        assert len(results["splits"][split]["tokens_per_expert"][0]) == 8


def test_bits_per_byte_are_those_of_the_saved_model(finished: Path, overrides: list[str]) -> None:
    """From the checkpoint and the raw tokens, window by window, without the evaluation code."""
    corpus = prepare(compose(overrides).data)
    shard, model = corpus.test, load_model(finished)
    stream = np.concatenate([[corpus.tokenizer.eos_id], shard.tokens]).astype(np.int64)
    nats = 0.0
    for start in range(0, len(stream) - 1, 32):
        window = torch.from_numpy(stream[start : start + 33])[None]
        logits = model(window[:, :-1]).logits.detach().double()
        nats += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
    figures = json.loads((finished / "results.json").read_text())["splits"]["test"]["domains"]["sentences"]
    assert figures["bits_per_byte"] == pytest.approx(nats / np.log(2) / shard.num_bytes, rel=1e-5)


def test_metrics_have_a_line_per_step_and_validations_between(finished: Path) -> None:
    records = read_metrics(finished / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 11))
    assert [record["step"] for record in records if "validation" in record] == [4, 8]
    assert steps[-1]["cross_entropy"] < steps[0]["cross_entropy"]
    assert steps[1]["routers"][0]["layer"] == 0
    assert sum(steps[1]["routers"][0]["tokens_per_expert"]) == 256 * 2


def test_samples_begin_with_their_prompts(finished: Path, overrides: list[str], tmp_path: Path) -> None:
    assert (finished / "samples.txt").read_text().startswith("=== ''\n")
    assert load_tokenizer(finished).hash == prepare(compose(overrides).data).tokenizer.hash


def test_tensorboard_holds_scalars_histograms_and_the_heat_map(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/cross_entropy", "router_0/entropy", "validation_sentences/bits_per_byte"} <= set(tags["scalars"])
    assert "router_0/tokens_per_expert" in tags["histograms"]
    assert "router_0/experts_x_steps" in tags["images"]
    assert len(events.Scalars("train/loss")) == 10


def test_the_same_command_again_says_that_it_is_complete(
    finished: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "results.json").read_bytes()
    train(compose([*overrides, f"run_dir={finished}"]))
    assert "is complete" in capsys.readouterr().out
    assert (finished / "results.json").read_bytes() == before


def test_a_run_that_ended_between_checkpoint_and_validation(
    finished: Path, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures are those of a run that was not ended, the validation that it had no time for included."""
    run_dir = tmp_path / "run"
    every_step = [*overrides, "train.checkpoint_every=1", f"run_dir={run_dir}"]

    def ends(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Text, "validate", ends)
        with pytest.raises(KeyboardInterrupt):
            train(compose(every_step))
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == "step_00000004"
    assert not any("validation" in record for record in read_metrics(run_dir / "metrics.jsonl"))
    train(compose(every_step))
    found, expected = (
        [(record["step"], record.get("validation")) for record in read_metrics(folder / "metrics.jsonl")]
        for folder in (run_dir, finished)
    )
    assert found == expected
    assert [step for step, validation in found if validation] == [4, 8]


def test_a_resume_needs_no_source(finished: Path, overrides: list[str], tmp_path: Path) -> None:
    """`init_from` is for step 0; afterwards the run's own checkpoint has all weights, and the other run may be gone."""
    source = shutil.copytree(finished, tmp_path / "source")
    again = [*overrides, f"init_from={source}", f"run_dir={tmp_path / 'run'}", "eval.every=null"]
    run_dir = train(compose(again))
    expected = load_model(run_dir).state_dict()
    (run_dir / "results.json").unlink()
    remove_checkpoint(run_dir / "checkpoints" / "step_00000010")
    shutil.rmtree(source)
    train(compose(again))
    assert all(torch.equal(expected[name], value) for name, value in load_model(run_dir).state_dict().items())


def test_a_diverged_run_goes_on_as_its_error_says(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.step

    def diverges(trainer: Trainer) -> StepMetrics:
        metrics = original(trainer)
        if metrics.step == 4:
            next(trainer.model.parameters()).data.fill_(float("inf"))
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", diverges)
        with pytest.raises(ValueError, match=r"step 4 is not saved: .* with a lower optim\.lr") as stopped:
            train(compose([*overrides, f"run_dir={tmp_path / 'run'}"]))
    advised = next(word for word in str(stopped.value).split() if word.startswith("init_from=")).rstrip(",")
    assert advised.endswith("run/checkpoints/step_00000003")
    run_dir = train(compose([*overrides, f"run_dir={tmp_path / 'new'}", advised, "optim.lr=1e-4"]))
    assert (run_dir / "results.json").exists()


def test_a_run_that_diverged_says_so_and_is_not_trained_again(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run repeats bit for bit, so it would diverge again, unless it may skip more steps."""
    original, given = Trainer._accumulate, [*overrides, f"run_dir={tmp_path / 'run'}", "train.checkpoint_every=null"]
    steps: list[int] = []

    def diverges(trainer: Trainer, batch: TokenBatch) -> BatchLosses:
        losses = original(trainer, batch)
        steps.append(trainer.state.step)
        losses.loss = math.nan if 4 <= trainer.state.step < 9 else losses.loss
        return losses

    monkeypatch.setattr(Trainer, "_accumulate", diverges)
    with pytest.raises(DivergedError, match=r"3 updates in a row .*max_skipped_steps=2"):
        train(compose([*given, "train.max_skipped_steps=2"]))
    record = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert record["step"] == 6 and record["skipped_steps"] == 3 and record["max_skipped_steps"] == 2
    assert record["seconds"] > 0 and "3 updates in a row" in record["reason"]
    assert not (tmp_path / "run" / "results.json").exists()
    with pytest.raises(DivergedError, match=r"diverged at step 6: 3 updates .*max_skipped_steps.*diverged\.json"):
        train(compose([*given, "train.max_skipped_steps=1"]))
    assert len(steps) == 6
    train(compose([*given, "train.max_skipped_steps=9"]))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["skipped_steps"] == 5
    assert not (tmp_path / "run" / "diverged.json").exists()
    (tmp_path / "run" / "diverged.json").write_text("{")  # a complete run is complete
    train(compose([*given, "train.max_skipped_steps=9"]))


def test_a_source_that_is_not_there_is_refused_before_anything_is_made(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for more in ([], ["run_dir=run"]):
        cache = f"data.cache_dir={tmp_path / 'cache'}"
        with pytest.raises(ValueError, match=r"init_from: no checkpoint at /nope: give a run folder"):
            train(compose([*overrides, "init_from=/nope", cache, *more]))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_compute_another_function_are_warned_of(
    finished: Path, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [*overrides, f"init_from={finished}", "train.num_steps=1", "eval.every=null"]
    train(compose([*same, f"run_dir={tmp_path / 'same'}", "model.dropout=0.2", "model.moe.jitter=0.1", "model.name=x"]))
    assert "another function" not in capsys.readouterr().err
    train(compose([*same, f"run_dir={tmp_path / 'other'}", "model.moe.weight_scale=2.0", "model.activation=relu"]))
    assert (
        f"warning: with model.activation=relu, model.moe.weight_scale=2.0 the weights of init_from {finished} compute "
        f"another function than there; unless you mean that, add model.activation=gelu model.moe.weight_scale=1.0"
    ) in capsys.readouterr().err


def test_a_folder_whose_run_failed_at_its_start_is_taken_over(
    finished: Path, overrides: list[str], tmp_path: Path
) -> None:
    """The corrected command is another run, but the first one has left nothing that could be lost."""
    run_dir = f"run_dir={tmp_path / 'run'}"
    with pytest.raises(ValueError, match="does not fit the model"):
        train(compose([*overrides, f"init_from={finished}", "model.d_ff=16", run_dir]))
    assert (tmp_path / "run" / "config.yaml").exists()
    corrected = compose([*overrides, f"init_from={finished}", run_dir])
    train(corrected)
    assert load_config(tmp_path / "run") == from_yaml((tmp_path / "run" / "config.yaml").read_text())
    assert (tmp_path / "run" / "results.json").exists()


def test_one_process_at_a_time_trains_a_run(overrides: list[str], tmp_path: Path) -> None:
    """The second of two equal commands would delete what the first is writing; killed, the first is out of the way."""
    run_dir = tmp_path / "run"
    code = (
        "import sys, time; from moe.compose import from_yaml; from moe.run_folder import open_run_folder\n"
        "with open_run_folder(from_yaml(sys.stdin.read()), {}) as run_dir: print('open', flush=True); time.sleep(100)"
    )
    config = compose([*overrides, f"run_dir={run_dir}", "train.num_steps=2"])
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True, cwd=ROOT)
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write(to_yaml(config))
    holder.stdin.close()
    assert holder.stdout.readline() == "open\n"
    for other in (config, compose([*overrides, f"run_dir={run_dir}", "seed=1"])):
        with pytest.raises(ValueError, match=rf"another process \(pid {holder.pid} on .*\) trains run_dir"):
            train(other)
    assert from_yaml((run_dir / "config.yaml").read_text()) == config
    holder.kill()
    holder.wait()
    assert (run_dir / ".lock").exists()
    train(config)
    assert (run_dir / "results.json").exists()
    assert not (run_dir / ".lock").exists()


def test_a_start_that_was_killed_at_its_lock_is_no_foreign_folder(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("pid 1 on nowhere\n")
    train(compose([*overrides, f"run_dir={tmp_path}", "train.num_steps=2"]))
    assert (tmp_path / "results.json").exists()


def test_a_complete_run_in_a_folder_that_can_only_be_read_is_shown(
    finished: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe.run_folder._acquire", None)
    train(compose([*overrides, f"run_dir={finished}"]))


def test_a_file_system_without_locks_is_no_obstacle(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    train(compose([*overrides, f"run_dir={tmp_path / 'run'}", "train.num_steps=2"]))
    assert "cannot be locked ([Errno" in capsys.readouterr().err
    assert (tmp_path / "run" / "results.json").exists()


def test_a_configuration_of_another_program_is_not_written_over(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("colour: red\n")
    with pytest.raises(ValueError, match="this is no run configuration"):
        train(compose([*overrides, f"run_dir={tmp_path}"]))
    assert (tmp_path / "config.yaml").read_text() == "colour: red\n"


@pytest.mark.parametrize("step", [3, 10])
def test_a_signal_ends_several_runs(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    """Also one that comes so late that the run which got it is complete."""
    original = Trainer.step

    def interrupted(trainer: Trainer) -> StepMetrics:
        if trainer.state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer)

    monkeypatch.setattr(Trainer, "step", interrupted)
    monkeypatch.chdir(tmp_path)
    runs = [[f"run_dir={tmp_path / 'a'}"], [f"run_dir={tmp_path / 'b'}"], ["seed=7"]]
    main([[*overrides, *run] for run in runs], [compose([*overrides, *run]) for run in runs])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "results.json").exists() == (step == 10)
    left = f"SIGTERM: 2 of 3 runs are not started: run 2 ({tmp_path / 'b'}), run 3 (tiny-8e-s7); the same command"
    assert left in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.d_ff=16", r"holds another run; it differs in model\.d_ff: 32 != 16\. Choose another run_dir"),
        ("optim.lr=0.5", r"optim\.lr: .* != 0\.5"),
        ("data.vocab_size=301", r"data\.vocab_size: 300 != 301"),
        ("data.validation_fraction=0.2", r"data\.validation_fraction"),
    ],
)
def test_another_run_in_the_folder_is_refused(finished: Path, overrides: list[str], change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(compose([*overrides, f"run_dir={finished}", change]))


def test_changed_text_under_the_same_name_is_refused(finished: Path, overrides: list[str], tmp_path: Path) -> None:
    """Same settings, other tokens: the path is not what makes a corpus."""
    stored = json.loads((finished / "corpus.json").read_text())
    (finished / "corpus.json").write_text(json.dumps(stored | {"train": "0" * 64}))
    try:
        with pytest.raises(ValueError, match=f"train: {'0' * 64} != {stored['train']}"):
            train(compose([*overrides, f"run_dir={finished}"]))
    finally:
        (finished / "corpus.json").write_text(json.dumps(stored))


@pytest.mark.parametrize("text", [None, "", "[]", '{"tokenizer": "abc"}'], ids=["none", "empty", "list", "few"])
def test_a_folder_whose_identity_is_damaged_is_refused_in_words(
    finished: Path, overrides: list[str], tmp_path: Path, text: str | None
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "corpus.json").unlink()
    if text is not None:
        (copy / "corpus.json").write_text(text)
    with pytest.raises(ValueError, match=r"copy/corpus\.json is missing or damaged.*restore it, or .*another run_dir"):
        train(compose([*overrides, f"run_dir={copy}"]))
    shutil.copy(finished / "corpus.json", copy)
    (copy / "config.yaml").write_text("model: 3")
    with pytest.raises(ValueError, match=r"copy/config\.yaml: this is no run configuration"):
        train(compose([*overrides, f"run_dir={copy}"]))


def test_a_folder_may_be_a_link_that_leads_somewhere(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "there")
    given = compose([*overrides, f"run_dir={tmp_path / 'link'}", "train.num_steps=1", "eval.every=null"])
    with pytest.raises(
        ValueError, match=r"run_dir .*link is a link to .*there, which does not exist: create that folder"
    ):
        train(given)
    (tmp_path / "there").mkdir()
    train(given)
    assert (tmp_path / "there" / "results.json").exists()


def test_a_folder_of_other_files_is_left_alone(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(ValueError, match=r"holds other files and no config\.yaml"):
        train(compose([*overrides, f"run_dir={tmp_path}"]))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_never_refuses_a_started_run(overrides: list[str], finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "results.json").unlink()
    with pytest.raises(ValueError, match="holds this run and resume=never"):
        train(compose([*overrides, f"run_dir={copy}", "resume=never"]))


def test_a_fixed_vocabulary_must_hold_the_tokenizers(overrides: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer has 300 tokens but model\.vocab_size is 299"):
        train(compose([*overrides, f"run_dir={tmp_path / 'run'}", "model.vocab_size=299"]))


def test_a_corpus_shorter_than_a_batch_is_refused(overrides: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fewer than one batch"):
        train(compose([*overrides, f"run_dir={tmp_path / 'run'}", "train.batch_tokens=65536"]))


def test_several_processes_need_a_launcher(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        train(compose([*overrides, f"run_dir={tmp_path / 'run'}"]))


def test_names_differ_exactly_where_runs_do(overrides: list[str]) -> None:
    base = run_name(compose(overrides))
    assert base.startswith("tiny-8e-s0-")
    assert run_name(compose([*overrides, "seed=1"])).startswith("tiny-8e-s1-")
    assert run_name(compose([*overrides, "data.num_workers=2", "device=cpu"])) == base
    assert run_name(compose([*overrides, "optim.lr=0.1"])) != base
    assert run_name(compose(overrides[1:])).startswith("tiny-dense-s0-")


@pytest.mark.parametrize(
    "variant", ["within", "bf16", "recompute", "compile", "gshard", "deepseek", "dense", "reference"]
)
def test_variants_train(overrides: list[str], tmp_path: Path, variant: str) -> None:
    one_layer = ["model.num_layers=1", "model.moe.moe_every=1"]  # a layer takes the compiler half a minute
    changes = {
        "within": ["data.document_attention=within"],
        "bf16": ["train.precision=bf16"],
        "recompute": ["train.recompute=true"],
        "compile": ["train.compile=true", "train.num_steps=1", "eval.every=null", *one_layer],
        "gshard": ["model.moe.router=gshard", "model.moe.load_balance_choices=first"],
        "deepseek": [
            *("model.moe.scores=sigmoid", "model.moe.num_groups=4", "model.moe.top_groups=2"),
            *("model.moe.bias_balance_rate=0.01", "model.moe.shared_d_ff=8", "model.moe.shared_gate=true"),
            *("model.moe.jitter=0.1", "model.moe.load_balance_scope=sequence", "train.recompute=true"),
        ],
        "dense": ["model.moe=null"],
        "reference": ["backend=reference", "train.num_steps=1", "eval.every=null"],
    }[variant]
    run_dir = train(compose([*overrides, f"run_dir={tmp_path / 'run'}", "train.num_steps=4", *changes]))
    steps = [record for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record]
    assert all(np.isfinite(record["loss"]) for record in steps)
    assert (run_dir / "results.json").exists()
