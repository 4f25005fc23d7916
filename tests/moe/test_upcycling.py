"""A whole dense model and its sparse twin: equal logits at step 0, and training that goes on from there."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from moe.checkpoint import load_config, load_model, load_tokenizer
from moe.cli import app
from moe.compose import compose
from moe.config import ModelConfig, MoEConfig
from moe.model import Transformer
from moe.run import train
from moe.training.metrics import read_metrics
from moe.upcycling import upcycle_model


@pytest.mark.parametrize(("granularity", "top_k", "num_experts"), [(1, 2, 5), (2, 4, 6), (4, 4, 8)])
@pytest.mark.parametrize("gated", [False, True])
def test_logits_are_preserved(
    model_config: Callable[..., ModelConfig],
    moe_config: MoEConfig,
    granularity: int,
    top_k: int,
    num_experts: int,
    gated: bool,
) -> None:
    model = Transformer(model_config(gated=gated, bias=True, init="fairseq"), dtype=torch.float64)
    model.reset_parameters(0)
    moe = replace(moe_config, num_experts=num_experts, top_k=top_k)
    sparse = upcycle_model(model, moe, granularity=granularity)
    tokens = torch.randint(37, (2, 9))
    output = sparse(tokens)
    assert len(output.routings) == 1
    torch.testing.assert_close(output.logits, model(tokens).logits, rtol=1e-10, atol=1e-11)
    assert sparse.config.moe.weight_scale == granularity


def test_what_would_change_the_function_is_refused(
    model_config: Callable[..., ModelConfig], moe_config: MoEConfig
) -> None:
    model = Transformer(model_config())
    for changes, message in (
        ({"normalize_weights": False}, "normalize_weights"),
        ({"capacity_factor": 1.0}, r"moe\.capacity_factor"),
        ({"eval_capacity_factor": 0.5}, r"moe\.eval_capacity_factor \(0\.5\) must be null to upcycle"),
        ({"shared_d_ff": 4}, "shared_d_ff"),
        ({"router": "gshard"}, "router"),
    ):
        with pytest.raises(ValueError, match=message):
            upcycle_model(model, replace(moe_config, **changes))
    with pytest.raises(ValueError, match="has experts"):
        upcycle_model(Transformer(model_config(sparse=True)), moe_config)
    with pytest.raises(ValueError, match=r"divide model.d_ff \(20\)"):
        upcycle_model(model, moe_config, granularity=3)


@pytest.fixture(scope="module")
def dense_run(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("upcycling") / "dense"
    arguments = [each for each in overrides if not each.startswith("+moe")]
    return train(compose([*arguments, f"run_dir={run_dir}", "train.num_steps=3", "model.expert_d_ff=null"]))


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def convert(*arguments: object) -> str:
    return invoke(*arguments).stdout.strip()


def test_a_run_goes_on_from_an_upcycled_checkpoint(dense_run: Path, overrides: list[str], tmp_path: Path) -> None:
    made = Path(convert(dense_run, tmp_path / "sparse", "--upcycle", "8e", "--granularity", 2, "model.moe.top_k=4"))
    config = load_config(made)
    assert (config.model.moe.num_experts, config.model.moe.top_k, config.model.expert_d_ff) == (8, 4, 16)
    tokens = torch.randint(300, (2, 16))
    dense, sparse = load_model(dense_run), load_model(made)
    torch.testing.assert_close(sparse(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)
    run = train(
        compose(
            [
                *overrides,
                f"run_dir={tmp_path / 'run'}",
                f"init_from={tmp_path / 'sparse'}",
                "model.moe.top_k=4",
                "model.moe.weight_scale=2.0",
                "model.expert_d_ff=16",
                "model.dropout=0.0",
                "train.num_steps=2",
            ]
        )
    )
    steps = [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
    trained = [record for record in read_metrics(dense_run / "metrics.jsonl") if "loss" in record]
    # what three dense steps had learned is still there at the first sparse one
    assert steps[0]["cross_entropy"] < trained[0]["cross_entropy"] - 0.1


@pytest.mark.parametrize("changes", [(), ("--granularity", 2, "model.moe.top_k=4")])
def test_the_command_that_trains_on_is_printed(dense_run: Path, tmp_path: Path, changes: tuple[object, ...]) -> None:
    """The converted model, text and tokenizer are those of the run that the command means."""
    result = invoke(dense_run, tmp_path / "sparse", "--upcycle", "8e", *changes)
    words = shlex.split(result.stderr.split("to continue training: ")[1])
    assert words[:2] == ["python", "train.py"]
    made = Path(result.stdout.strip())
    assert f"init_from={made}" in words
    run = train(compose([*words[2:], f"run_dir={tmp_path / 'run'}", "train.num_steps=1", "eval.sample_tokens=1"]))
    assert load_config(run).model == load_config(made).model
    assert load_tokenizer(run).hash == load_tokenizer(dense_run).hash


def test_bad_requests_are_refused(dense_run: Path, overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for arguments, message in (
        ((dense_run, tmp_path / "full", "--upcycle", "8e"), "is not empty"),
        ((dense_run, tmp_path / "new", "--upcycle", "9e"), "preset '9e' does not exist"),
        ((tmp_path, tmp_path / "new", "--upcycle", "8e"), "no checkpoint at"),
        (
            (dense_run, tmp_path / "new", "--upcycle", "8e", "train.num_steps=4"),
            r"train\.num_steps=4 cannot be set with",
        ),
        ((dense_run, tmp_path / "new", "--upcycle", "8e", "model.d_model=64"), r"model\.d_model=64 cannot be set with"),
        ((dense_run, tmp_path / "new", "--upcycle", "8e", "model.moe.eval_capacity_factor=0.5"), "must be null"),
        ((dense_run, tmp_path / "new", "--upcycle", "8e", "model.moe.moe_every=3"), r"model\.num_layers \(2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(*arguments)
    assert not (tmp_path / "new").exists()
    arguments = [each for each in overrides if not each.startswith(("+moe", "data.vocab_size"))]
    options = [
        f"init_from={dense_run}",
        "data.vocab_size=310",
        "model.expert_d_ff=null",
        f"run_dir={tmp_path / 'other'}",
    ]
    with pytest.raises(ValueError, match="another tokenizer"):
        train(compose([*arguments, *options]))
