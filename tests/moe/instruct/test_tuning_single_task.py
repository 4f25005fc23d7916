"""Fine-tuning on one task: the same path, the loss on the whole text, the lowest total NLL wins."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe.checkpoint import list_checkpoints, load_model, load_tokenizer
from moe.compose import CONFIGS, compose
from moe.config import ModelConfig, SingleTaskConfig
from moe.instruct.encoding import EncodedExample
from moe.instruct.finetuning import Question, accuracy, read_task
from moe.model import Transformer
from moe.run import train
from moe.training.metrics import read_metrics
from tests.moe.instruct.toy_tokenizer import ToyTokenizer
from tests.shared_data import shared_data

STEMS = ("the gate reads every", "a small layer learns", "a dense expert routes", "the second token and")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenBookQA in its authors' form; the right choice is always "expert", wherever it stands."""
    folder = tmp_path_factory.mktemp("data")
    main = folder / "OpenBookQA-V1-Sep2018" / "Data" / "Main"
    main.mkdir(parents=True)
    for split, count in (("train", 60), ("dev", 10), ("test", 24)):
        lines = []
        for i in range(count):
            options = ["token", "gate", "word"]
            options.insert(i % 4, "expert")
            choices = [{"text": text, "label": label} for text, label in zip(options, "ABCD", strict=True)]
            stem = f"{STEMS[i % 4]} {split} {i}"
            lines.append(
                json.dumps({"id": str(i), "question": {"stem": stem, "choices": choices}, "answerKey": "ABCD"[i % 4]})
            )
        (main / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def pretrained(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    rates = ["optim.lr=0.005", "optim.embedding_lr_scale=2.5"]
    return train(compose([*overrides, *rates, f"run_dir={folder}", "train.num_steps=2", "model.dropout=0.0"]))


def finetune(run_dir: Path, pretrained: Path, data_dir: Path, overrides: list[str], *more: str) -> Path:
    cache = next(each for each in overrides if each.startswith("data.cache_dir="))
    common = [
        "experiment=finetune/openbookqa",
        f"init_from={pretrained}",
        f"tune.task.data_dir={data_dir}",
        cache,
        "data.seq_len=64",
        "train.batch_tokens=512",
        "train.micro_batch_size=null",
        "train.precision=fp32",
        "train.num_steps=30",
        "optim.lr=0.02",
        "optim.warmup_steps=2",
        "eval.every=10",
        "eval.sample_tokens=4",
        f"run_dir={run_dir}",
    ]
    return train(compose([*common, *more]))


def test_fine_tuning_learns_the_task_and_reports_the_best_checkpoint(
    pretrained: Path, data_dir: Path, overrides: list[str], tmp_path: Path
) -> None:
    out = finetune(
        tmp_path / "run", pretrained, data_dir, overrides, "tune.load_balance_weight=0.0", "tune.freeze_router=true"
    )
    results = json.loads((out / "results.json").read_text())
    validations = [line for line in read_metrics(out / "metrics.jsonl") if "validation" in line]
    before = validations[0]["validation"]["all"]["accuracy"]
    assert [line["step"] for line in validations] == [0, 10, 20]
    assert before < 0.7
    assert json.loads((out / "before.json").read_text())["held_out"]["accuracy"] == before
    assert results["evaluation"]["accuracy"] > 0.9
    assert results["evaluation"]["chance"] == 0.25
    assert results["evaluation"]["num_samples"] == 24
    assert results["held_out"]["num_samples"] == 12  # a fifth of 60
    (checkpoint,) = list_checkpoints(out / "best")
    best = max(validations, key=lambda line: line["validation"]["all"]["accuracy"])  # of equals the first
    if best["validation"]["all"]["accuracy"] == 1.0:
        assert checkpoint.name == f"step_{best['step']:08d}"
    questions = read_task(
        SingleTaskConfig("openbookqa", str(data_dir)), load_tokenizer(out / "best"), seq_len=64, seed=0
    )
    found = accuracy(load_model(out / "best"), questions.evaluation, batch_tokens=999)
    assert found.value == results["evaluation"]["accuracy"]


def test_the_candidate_with_the_lowest_total_nll_wins(model_config: Callable[..., ModelConfig]) -> None:
    """Over whole texts, token by token, without the scorer."""
    model = Transformer(model_config()).eval()
    model.reset_parameters(seed=3)
    torch.manual_seed(0)
    questions = []
    for _ in range(12):
        stem = torch.randint(1, 37, (4,)).tolist()
        ends = [torch.randint(1, 37, (int(n),)).tolist() for n in torch.randint(1, 5, (3,))]
        questions.append(Question(tuple((0, *stem, *end) for end in ends), (1,), 3, 9))
    found = accuracy(model, questions, batch_tokens=64)
    expected = []
    for question in questions:
        totals = []
        for sequence in question.sequences:
            tokens = torch.tensor(sequence)[None]
            logits = model(tokens[:, :-1]).logits[0].detach().double()
            totals.append(float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")))
        expected.append(float(totals.index(min(totals)) == 1))
    assert list(found.credits) == expected
    assert 0 < math.fsum(expected) < 12


def test_examples_of_a_question(data_dir: Path) -> None:
    tokenizer = ToyTokenizer()
    questions = read_task(SingleTaskConfig("openbookqa", str(data_dir)), tokenizer, seq_len=64, seed=0)
    question = questions.train[0]
    whole, target = question.example(0, "all"), question.example(0, "target")
    pieces = tokenizer.pieces(whole.tokens)
    assert (pieces[0], pieces[-3:]) == ("<eos>", [" expert", ".", "<eos>"])
    assert whole.first_counted == 1
    text = "".join(pieces[1:-1])
    assert question.counted_bytes("all") == len(text.encode())
    assert 0 < question.counted_bytes("target") < question.counted_bytes("all")
    assert tokenizer.pieces(target.tokens[target.first_counted :]) == [" expert", ".", "<eos>"]
    assert isinstance(whole, EncodedExample)
    short = read_task(SingleTaskConfig("openbookqa", str(data_dir)), tokenizer, seq_len=8, seed=0).train[0]
    assert len(short.example(0, "all").tokens) <= 9  # the stem loses its beginning
    assert tokenizer.pieces(short.example(0, "all").tokens)[-3:] == [" expert", ".", "<eos>"]


def test_the_split_is_drawn_by_the_seed_and_apart_from_the_evaluation(data_dir: Path) -> None:
    def read(seed: int, **options: object) -> tuple[set, set, set]:
        config = SingleTaskConfig("openbookqa", str(data_dir), **options)
        parts = read_task(config, tokenizer, seq_len=64, seed=seed)[:3]
        return tuple({question.sequences for question in part} for part in parts)

    tokenizer = ToyTokenizer()
    train_part, held_out, evaluation = read(0)
    assert (len(train_part), len(held_out), len(evaluation)) == (48, 12, 24)
    assert not train_part & held_out
    assert read(0)[1] == held_out != read(1)[1]
    assert len(read(0, held_out_fraction=0.5)[1]) == 30
    with pytest.raises(ValueError, match="would train on what it is evaluated on, split test"):
        read(0, train_split="test")
    with pytest.raises(ValueError, match="leaves none to train"):
        read(0, held_out_fraction=0.999)
    one_split = read(0, evaluation_fraction=0.25)
    assert [len(part) for part in one_split] == [36, 9, 15]
    assert not one_split[2] & (one_split[0] | one_split[1])
    assert one_split[2] == read(1, evaluation_fraction=0.25)[2]
    with pytest.raises(ValueError, match="give one of them"):
        read(0, evaluation_fraction=0.25, evaluation_split="test")
    with pytest.raises(ValueError, match="none on one side"):
        read(0, evaluation_fraction=0.001)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lambada", "has no candidates to choose from"),
        ("crows_pairs", "is for evaluation alone"),
        ("nothing", "has no task 'nothing'"),
    ],
)
def test_tasks_that_cannot_be_trained_on_are_refused(data_dir: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_task(SingleTaskConfig(name, str(data_dir)), ToyTokenizer(), seq_len=64, seed=0)


@pytest.mark.parametrize("preset", sorted((CONFIGS / "experiment" / "finetune").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipe(preset: Path) -> None:
    """Artetxe et al. 2021."""
    config = compose([f"experiment=finetune/{preset.stem}"])
    optim, tune = config.optim, config.tune
    assert tune is not None and tune.task is not None
    assert (optim.lr, optim.beta1, optim.beta2, optim.eps, optim.clip_norm) == (1e-4, 0.9, 0.98, 1e-6, None)
    assert optim.warmup_steps == round(0.06 * config.train.num_steps)
    assert (tune.loss_on, tune.keep_best, tune.dropout, tune.attention_dropout) == ("all", "accuracy", 0.1, 0.1)
    assert (tune.task.name, tune.task.held_out_fraction, config.seq_len) == (preset.stem, 0.2, 768)


def test_the_recipe_of_any_task() -> None:
    config = compose(["experiment=finetune", "tune.task.name=copa"])
    assert config.tune is not None and config.tune.task is not None
    assert config.tune.task.name == "copa"
    assert config.optim == compose(["experiment=finetune/openbookqa"]).optim


def test_real_questions_become_examples() -> None:
    tokenizer = ToyTokenizer()
    folder = shared_data("mcq_english").parent
    questions = read_task(SingleTaskConfig("openbookqa", str(folder)), tokenizer, seq_len=128, seed=0)
    assert (len(questions.train) + len(questions.held_out), len(questions.evaluation)) == (4957, 500)
    assert questions.chance == 0.25
