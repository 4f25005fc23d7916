"""Tuning from end to end: a pretrained toy model, a small benchmark, and what the run leaves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moe.checkpoint import list_checkpoints, load_config, load_model, load_tokenizer
from moe.checkpoint.folders import remove_checkpoint
from moe.compose import CONFIGS, compose
from moe.config import ModelConfig, RunConfig, TuneConfig
from moe.distributed.world import World, open_world
from moe.instruct.adaptation import adapt_modules, tuned_config, tuned_model
from moe.instruct.benchmark import Benchmark
from moe.instruct.build import build
from moe.instruct.encoded import RecordEncoder
from moe.instruct.records import Record
from moe.instruct.tuning import open_tuning
from moe.instruct.validation import by_group, target_losses
from moe.layers.experts import Experts
from moe.model import Transformer
from moe.run import train
from moe.training.metrics import read_metrics
from tests.moe.instruct.conftest import SUPER_NI, define
from tests.moe.instruct.toy_tokenizer import ToyTokenizer
from tests.ranks import run_ranks

TASKS = {
    "task001_a": ("Question Answering", "How many?"),
    "task002_b": ("Question Answering", "Which of the experts?"),
    "task003_c": ("Sentiment Analysis", "Say whether it is good or bad."),
    "task004_d": ("Textual Entailment", "Does it follow?"),
}


@pytest.fixture(scope="module")
def pretrained(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    return train(compose([*overrides, f"run_dir={folder}", "train.num_steps=2", "model.dropout=0.0"]))


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trained tasks, one of them evaluated on instances, and one held-out category."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "tasks").mkdir()
    for name, (category, definition) in TASKS.items():
        task: dict[str, Any] = {
            "Contributors": ["nobody"],
            "Source": [name],
            "Categories": [category],
            "Definition": [definition],
            "Positive Examples": [],
            "Negative Examples": [],
            "Instances": [
                {"id": f"{name}-{i}", "input": f"{name} {i} small gate", "output": ["good" if i % 2 else "bad"]}
                for i in range(140)
            ],
            "Instance License": ["MIT"],
        }
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(task))
    definition = define(
        SUPER_NI,
        held_out_categories={"validation": ["Textual Entailment"]},
        held_out_instances={"validation": ["bench/task001_a"]},
        validation_records=20,
    )
    return build(definition, folder, folder / "out").folder


def tune_overrides(pretrained: Path, benchmark: Path, overrides: list[str], *more: str) -> list[str]:
    cache = next(each for each in overrides if each.startswith("data.cache_dir="))
    return [
        "tune=instructions",
        f"init_from={pretrained}",
        f"tune.benchmark={benchmark}",
        cache,
        "optim.warmup_steps=0",
        "data.seq_len=96",
        "train.num_steps=4",
        "train.batch_tokens=768",
        "train.micro_batch_size=4",
        "train.checkpoint_every=1",
        "eval.every=2",
        "eval.sample_tokens=4",
        "eval.prompts=[a]",
        *more,
    ]


def run(run_dir: Path, *where: Any, more: tuple[str, ...] = ()) -> Path:
    return train(compose([*tune_overrides(*where, *more), f"run_dir={run_dir}"]))


@pytest.fixture(scope="module")
def tuned(pretrained: Path, benchmark: Path, overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = ("tune.keep_best=cross_entropy", "tune.expert_dropout=0.3", "tune.freeze_router=true", "model=125m")
    return run(tmp_path_factory.mktemp("tuned") / "run", pretrained, benchmark, overrides, more=more)


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock measured."""
    timed = ("seconds", "tokens_per_second", "ranks", "routers")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(run_dir / "metrics.jsonl")]


def test_a_tuning_run_leaves_its_files(tuned: Path) -> None:
    names = {path.name for path in tuned.iterdir()}
    kept = {"config.yaml", "corpus.json", "metrics.jsonl", "mixture.json", "results.json", "checkpoints", "best"}
    assert kept | {"tensorboard", "samples.txt", "before.json"} == names
    results = json.loads((tuned / "results.json").read_text())
    assert results["validation"]["groups"].keys() == {
        "all",
        "held-out instances",
        "held-out category",
        "category Question Answering",
        "category Textual Entailment",
    }
    assert results["validation"]["tasks"].keys() == {"bench/task001_a", "bench/task004_d"}
    mixture = json.loads((tuned / "mixture.json").read_text())
    assert sum(task["sampled"] for task in mixture["tasks"]) == pytest.approx(1.0)
    assert 0 < mixture["counted"] < mixture["used"] <= 1


def test_targets_are_learned_and_figures_are_in_metrics(tuned: Path) -> None:
    records = [line for line in steps_of(tuned) if "validation" in line]
    assert [record["step"] for record in records] == [0, 2]  # before tuning, and every eval.every
    results = json.loads((tuned / "results.json").read_text())
    before = records[0]["validation"]["all"]["cross_entropy"]
    assert results["validation"]["groups"]["all"]["cross_entropy"] < before - 0.1
    losses = [line["cross_entropy"] for line in steps_of(tuned) if "loss" in line]
    assert len(losses) == 4


def test_a_complete_run_says_what_it_has_become(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(tuned)
    train(replace(config, run_dir=str(tuned)))
    shown = capsys.readouterr().out
    before, after = (json.loads((tuned / name).read_text()) for name in ("before.json", "results.json"))
    assert "is complete" in shown
    for results in (before, after):
        for group in ("all", "held-out category"):
            assert f"{results['validation']['groups'][group]['cross_entropy']:.3f}" in shown
    assert "of positions held a token" in shown


def test_model_and_tokenizer_are_the_checkpoints_whatever_model_says(tuned: Path, pretrained: Path) -> None:
    ours, theirs = load_config(tuned).model, load_config(pretrained).model
    assert ours == theirs
    assert json.loads((tuned / "corpus.json").read_text())["tokenizer"] == load_tokenizer(pretrained).hash


def test_frozen_routers_stay_and_everything_else_moves(tuned: Path, pretrained: Path) -> None:
    before, after = load_model(pretrained).state_dict(), load_model(tuned).state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if ".router." in name}
    assert still


def test_results_are_of_the_best_weights(tuned: Path) -> None:
    """The lowest loss of the validations, the last step included, is that of the weights in best/."""
    config = load_config(tuned)
    (checkpoint,) = list_checkpoints(tuned / "best")
    results = json.loads((tuned / "results.json").read_text())
    encoded = open_tuning(tuned_config(config), open_world("cpu", timeout_seconds=60.0))
    sums = target_losses(load_model(tuned / "best"), encoded.validation, seq_len=config.seq_len)
    best = by_group(encoded.validation, sums)["all"]["cross_entropy"]
    assert best == pytest.approx(results["validation"]["groups"]["all"]["cross_entropy"], rel=1e-6)
    earlier = [line["validation"]["all"]["cross_entropy"] for line in steps_of(tuned) if "validation" in line]
    assert best <= min(earlier) + 1e-9
    assert checkpoint.name == "step_00000004"  # which nothing validates but the end


def test_a_run_that_gets_worse_keeps_the_model_as_it_came_also_when_resumed(
    pretrained: Path, benchmark: Path, overrides: list[str], tmp_path: Path
) -> None:
    out, again = tmp_path / "run", tmp_path / "again"
    run(out, pretrained, benchmark, overrides, more=("tune.keep_best=cross_entropy", "optim.lr=1.0"))
    shutil.copytree(out, again)
    (again / "results.json").unlink()
    remove_checkpoint(again / "checkpoints" / "step_00000004")
    train(replace(load_config(out), run_dir=str(again)))
    before = json.loads((out / "before.json").read_text())
    for path in (out, again):
        assert [checkpoint.name for checkpoint in list_checkpoints(path / "best")] == ["step_00000000"]
        assert json.loads((path / "results.json").read_text())["validation"] == before["validation"]
    last = load_model(out).state_dict()
    assert not all(torch.equal(tensor, last[name]) for name, tensor in load_model(pretrained).state_dict().items())


def test_a_resumed_run_is_the_same_to_the_bit(tuned: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(tuned, again)
    (again / "results.json").unlink()
    remove_checkpoint(again / "checkpoints" / "step_00000004")
    for path in (again / "best").glob("step_*"):  # as if the machine had died before the last step
        if path.name == "step_00000004":
            remove_checkpoint(path)
    config = load_config(tuned)
    assert train(replace(config, run_dir=str(again))) == again
    assert steps_of(again) == steps_of(tuned)
    theirs, ours = load_model(tuned).state_dict(), load_model(again).state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    results = [json.loads((path / "results.json").read_text())["validation"] for path in (tuned, again)]
    assert results[0] == results[1]


def test_a_resume_needs_no_source(
    pretrained: Path, benchmark: Path, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's own checkpoint has weights, shape and tokenizer, also for the text among the examples."""
    source = shutil.copytree(pretrained, tmp_path / "source")
    text = [each for each in overrides if each.startswith(("data=", "data.path", "data.validation", "data.test"))]
    more = (*text, "tune.pretraining_share=0.25", "eval.every=null")
    run_dir = run(tmp_path / "run", source, benchmark, overrides, more=more)
    expected, logged = load_model(run_dir).state_dict(), steps_of(run_dir)
    shutil.rmtree(source)
    capsys.readouterr()
    run(run_dir, source, benchmark, overrides, more=more)
    assert "is complete" in capsys.readouterr().out
    (run_dir / "results.json").unlink()
    remove_checkpoint(run_dir / "checkpoints" / "step_00000004")
    run(run_dir, source, benchmark, overrides, more=more)
    assert steps_of(run_dir) == logged
    assert all(torch.equal(expected[name], value) for name, value in load_model(run_dir).state_dict().items())
    with pytest.raises(ValueError, match=r"holds another run; it differs in tune\.dropout"):
        run(run_dir, source, benchmark, overrides, more=(*more, "tune.dropout=0.3"))
    with pytest.raises(ValueError, match="no checkpoint at"):  # a run that has none of its own needs it
        run(tmp_path / "new", source, benchmark, overrides, more=more)


def _tune_on_ranks(world: World, config: RunConfig) -> None:
    from moe.run import _train

    _train(config, world)


def test_two_processes_train_as_one_does(
    pretrained: Path, benchmark: Path, overrides: list[str], tmp_path: Path
) -> None:
    """Experts spread over both, routers frozen, text among the examples; the losses are those of one process."""
    text = [each for each in overrides if each.startswith(("data=", "data.path", "data.validation", "data.test"))]
    more = [*text, "tune.pretraining_share=0.25", "tune.freeze_router=true", "train.num_steps=3", "eval.every=2"]
    common = tune_overrides(pretrained, benchmark, overrides, *more)
    # the load-balance loss is of a micro-batch: as many sequences meet in a step with one process as with two
    whole = train(compose([*common, f"run_dir={tmp_path / 'whole'}", "tune.load_balance_weight=0.0"]))
    config = compose([*common, f"run_dir={tmp_path / 'parts'}", "tune.load_balance_weight=0.0", "parallel.ep_size=2"])
    run_ranks(_tune_on_ranks, 2, tuned_config(config))
    parts = tmp_path / "parts"
    one, two = steps_of(whole), steps_of(parts)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        if "validation" in a:
            for group, figures in a["validation"].items():
                assert b["validation"][group] == pytest.approx(figures, rel=1e-4)
        else:
            assert b["cross_entropy"] == pytest.approx(a["cross_entropy"], rel=1e-4)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    ours, before = load_model(parts).state_dict(), load_model(pretrained).state_dict()
    assert all(torch.equal(ours[name], before[name]) for name in ours if ".router." in name)
    assert json.loads((parts / "mixture.json").read_text())["text_sequences"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["init_from=null"], "init_from must name the model to tune"),
        (["tune.benchmark=null"], "tune.benchmark must name a folder"),
        (["tune.capacity_factor=1.0", "tune.dropless=true"], "leave tune.capacity_factor out"),
        (["tune.loss_on=suffix"], "set tune.demonstrations_zipf"),
        (["tune.keep_best=accuracy"], "measured only on tune.task"),
        (["+tune.extra_shares.cot=0.5"], "tune.extra_shares names cot"),
        (["tune.num_tasks=9"], r"tune.num_tasks \(9\) must be between 1"),
        (["data.seq_len=8", "train.batch_tokens=64"], None),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    changes: list[str],
    message: str | None,
    pretrained: Path,
    benchmark: Path,
    overrides: list[str],
    tmp_path: Path,
) -> None:
    if message is None:  # a long instruction is cut: not an error
        run(tmp_path / "r", pretrained, benchmark, overrides, more=tuple(changes))
        return
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "r", pretrained, benchmark, overrides, more=tuple(changes))


def test_what_tuning_changes_of_a_model(model_config: Callable[..., ModelConfig]) -> None:
    dense, sparse = model_config(), model_config(sparse=True)
    capped = replace(sparse, moe=replace(sparse.moe, capacity_factor=1.5, eval_capacity_factor=1.5))
    assert tuned_model(sparse, TuneConfig("t", benchmark="b")) == sparse
    changed = tuned_model(sparse, TuneConfig("t", benchmark="b", load_balance_weight=0.0, capacity_factor=2.0))
    assert (changed.moe.load_balance_weight, changed.moe.capacity_factor) == (0.0, 2.0)
    dropless = tuned_model(capped, TuneConfig("t", benchmark="b", dropless=True))
    assert (dropless.moe.capacity_factor, dropless.moe.eval_capacity_factor) == (None, None)
    assert tuned_model(dense, TuneConfig("t", benchmark="b", dropout=0.2)).dropout == 0.2
    for name, value in (("freeze_router", True), ("expert_dropout", 0.1), ("load_balance_weight", 0.0)):
        with pytest.raises(ValueError, match=f"tune.{name} is for models with experts, and test is dense"):
            tuned_model(dense, TuneConfig("t", benchmark="b", **{name: value}))
    biased = replace(sparse, moe=replace(sparse.moe, bias_balance_rate=0.01))
    with pytest.raises(ValueError, match="would not stop the updates of this model's balancing biases"):
        tuned_model(biased, TuneConfig("t", benchmark="b", freeze_router=True))


def test_experts_drop_out_and_routers_freeze(model_config: Callable[..., ModelConfig]) -> None:
    model = Transformer(model_config(sparse=True))
    adapt_modules(model, TuneConfig("t", benchmark="b", expert_dropout=0.4, freeze_router=True))
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    assert experts and all(module.dropout == 0.4 and module.train().drops_out for module in experts)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".router." in name}


def test_demonstrations_are_of_the_same_task_and_never_the_example_itself(benchmark: Path) -> None:
    tune = TuneConfig("t", benchmark="b", demonstrations_zipf=0.5, loss_on="suffix")
    tokenizer = ToyTokenizer()
    encoder = RecordEncoder(tokenizer, tune, seq_len=400, seed=0)
    pool = list(Benchmark(benchmark).records("train", "bench/task002_b"))
    counts = []
    for record in pool[:60]:
        example = encoder.encode(record, pool)
        assert example is not None
        text = tokenizer.decode(example.tokens)
        counts.append(text.count("small gate") - 1)
        assert text.count(record.input) == 1
        assert text.count("\n\n\n") == counts[-1]
        assert "task003" not in text
        counted = tokenizer.decode(example.tokens[example.first_counted :])
        assert counted.count("small gate") == counts[-1]  # all examples after the first
    assert max(counts) == 5
    assert 3 < len(counts) / (counts.count(0) or 1) < 6.5  # 1 / 0.274 = 3.6 without any, exponent 0.5
    few = pool[:8]
    for record in few:  # with a pool this small an example would often be its own demonstration
        example = encoder.encode(record, few)
        assert example is not None
        assert tokenizer.decode(example.tokens).count(record.input) == 1


def test_demonstrations_without_room_are_left_out_one_by_one(benchmark: Path) -> None:
    tune = TuneConfig("t", benchmark="b", demonstrations_zipf=0.1, vary_layout=False)
    tokenizer = ToyTokenizer()
    short, long = (RecordEncoder(tokenizer, tune, seq_len=seq_len, seed=0) for seq_len in (48, 400))
    pool = list(Benchmark(benchmark).records("train", "bench/task002_b"))
    kept, wanted = [], []
    for record in pool[:40]:
        example, whole = short.encode(record, pool), long.encode(record, pool)
        assert example is not None and whole is not None
        text = tokenizer.decode(example.tokens)
        assert example.positions <= 48
        assert record.input in text and "Which of the experts?" in text  # the definition and the example always stay
        kept.append(text.count("small gate") - 1)
        wanted.append(tokenizer.decode(whole.tokens).count("small gate") - 1)
    room = max(kept)
    assert 0 < room < max(wanted)
    assert kept == [min(room, count) for count in wanted]


def test_long_targets_stop_a_run_or_are_dropped_and_counted(benchmark: Path) -> None:
    record = next(Benchmark(benchmark).records("train", "bench/task002_b"))._replace(targets=("word " * 50,))
    tune = TuneConfig("t", benchmark="b")
    with pytest.raises(ValueError, match=r"a record of bench/task002_b .*: its target of 51 tokens is longer"):
        RecordEncoder(ToyTokenizer(), tune, seq_len=40, seed=0).encode(record)
    dropping = RecordEncoder(ToyTokenizer(), replace(tune, long_targets="drop"), seq_len=40, seed=0)
    assert dropping.encode(record) is None
    assert dropping.dropped == {"bench/task002_b": 1}


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        ({}, "one two three"),
        ({"loss_on": "all"}, "Say it.\na b c d e f\nA: one two three"),
        ({"loss_on": "all", "seq_len": 10}, "d e f\nA: one two three"),
        ({"seq_len": 9}, "one two three"),
        ({"truncation": "right", "seq_len": 15}, "one two"),
        ({"style": "instance", "instruction": "", "input": "", "seq_len": 3}, "two three"),
    ],
)
def test_bytes_are_of_the_text_whose_loss_counts(
    options: dict[str, Any], counted: str, benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits per byte divide the loss by these bytes: with loss_on=all they are not those of the target alone."""
    settings = {"loss_on": "target", "truncation": "left", "seq_len": 40} | options
    fields = {"style": "keyword", "instruction": "Say it.", "input": "a b c d e f\nA:"} | options
    fields = {name: value for name, value in fields.items() if name in Record._fields}
    record = Record("b/t", "b", "c", "s", targets=("one two three",), **fields)
    tune = TuneConfig(
        "t", benchmark="b", loss_on=settings["loss_on"], truncation=settings["truncation"], vary_layout=False
    )
    encoder = RecordEncoder(ToyTokenizer(), tune, seq_len=settings["seq_len"], seed=0)
    monkeypatch.setattr(Benchmark, "records", lambda *_: [record])
    made = Benchmark(benchmark)
    encoder.write(tmp_path / "store", made, "train", made.tasks("train")[:1])
    written = int(np.load(tmp_path / "store" / "examples.npy")[0, 3])
    assert written - len(counted) in (0, 1), "the space before the first counted word may count"


def test_every_preset_states_every_field() -> None:
    names = {field.name for field in dataclasses.fields(TuneConfig)}
    files = sorted((CONFIGS / "tune").glob("*.yaml"))
    assert len(files) >= 3
    for path in files:
        assert set(yaml.safe_load(path.read_text())) == names, path.name


def test_the_recipe_of_the_paper() -> None:
    """Iyer et al. 2022: batch, steps, learning rate, and the mixture that was chosen."""
    for name, batch, steps in (
        ("30b", 256, 4000),
        ("175b", 128, 8000),
        ("30b_max", 256, 6000),
        ("175b_max", 128, 12000),
    ):
        config = compose([f"experiment=opt_iml/{name}"])
        assert (config == compose(["experiment=opt_iml"])) == (name == "30b")
        assert (config.batch_size, config.seq_len, config.train.num_steps) == (batch, 2048, steps)
        optim = config.optim
        assert (optim.lr, optim.beta1, optim.beta2, optim.warmup_steps) == (5e-5, 0.9, 0.95, 60)
        assert (optim.schedule, optim.final_lr_fraction, optim.clip_norm) == ("linear", 0.0, 1.0)
        tune = config.tune
        assert tune is not None
        assert (tune.eta, tune.pretraining_share, tune.extra_shares) == (4096, 0.05, {"cot": 0.01})
        assert list(tune.benchmark_shares.values()) == [4, 2, 20, 25, 45, 2, 2]
        assert (tune.demonstrations_zipf, tune.keep_best, tune.dropout, config.seed) == (None, None, 0.1, 1234)
    for path in (CONFIGS / "experiment" / "opt_iml").glob("shares_*.yaml"):
        found = compose([f"experiment=opt_iml/{path.stem}"])
        assert "shares_" + "_".join(f"{share:g}" for share in found.tune.benchmark_shares.values()) == path.stem
