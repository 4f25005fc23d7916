"""`moe convert`: the weights of a checkpoint of any sharding in one file that other programs read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from moe.checkpoint import (
    TrainState,
    consolidate,
    consolidation,
    load_checkpoint,
    load_config,
    load_model,
    load_tokenizer,
    load_weights,
    save_checkpoint,
)
from moe.cli import app
from moe.compose import to_yaml
from moe.config import ModelConfig, ParallelConfig, RunConfig
from moe.data.tokenizer import Tokenizer, open_tokenizer
from moe.distributed.mesh import make_meshes
from moe.distributed.parallelize import parallelize
from moe.distributed.world import World
from moe.model import Transformer
from moe.training.optimizer import make_optimizer
from tests.ranks import run_ranks

FILES = ["checksums.json", "config.yaml", "model.safetensors", "tokenizer.model"]


def save(folder: Path, config: RunConfig, tokenizer: Tokenizer, model: Transformer, world: World | None = None) -> Path:
    optimizer = make_optimizer(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # so that there is something to leave out
    return save_checkpoint(
        folder / "checkpoints",
        model=model,
        optimizer=optimizer,
        state=TrainState(step=3),
        config_yaml=to_yaml(config),
        tokenizer=tokenizer,
        keep_last=2,
        world=world,
    )


def convert(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.strip()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_file_with_the_names_of_the_model(
    config: RunConfig, tokenizer: Tokenizer, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consolidation, "GROUP_BYTES", 3000)  # several groups
    model = Transformer(config.model, dtype=dtype)
    model.reset_parameters(0)
    save(tmp_path / "run", config, tokenizer, model)
    assert convert(tmp_path / "run", tmp_path / "made") == str(tmp_path / "made")
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == FILES
    stored = load_file(tmp_path / "made" / "model.safetensors")
    expected = model.state_dict()
    assert stored.keys() <= expected.keys()
    assert {id(tensor) for tensor in model.parameters()} == {
        id(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name in stored
    }
    for name, tensor in stored.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    with safe_open(tmp_path / "made" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # what transformers asks for
    header = int.from_bytes((tmp_path / "made" / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0  # so that tensors read in place are aligned


def test_it_serves_wherever_weights_are_read(
    config: RunConfig, tokenizer: Tokenizer, tmp_path: Path, model_config: Callable[..., ModelConfig]
) -> None:
    model = Transformer(config.model)
    model.reset_parameters(0)
    save(tmp_path / "run", config, tokenizer, model)
    made = consolidate(tmp_path / "run", tmp_path / "deep" / "made")
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_model(made)(tokens).logits, model.eval()(tokens).logits)
    assert load_config(made) == config
    assert load_tokenizer(made).hash == tokenizer.hash
    other = Transformer(config.model)
    other.reset_parameters(1)
    load_weights(made, model=other)
    assert torch.equal(other.eval()(tokens).logits, model(tokens).logits)
    wider = Transformer(model_config(sparse=True, d_ff=21))
    with pytest.raises(ValueError, match=r"does not fit the model: .*\(12, 20\)"):
        load_weights(made, model=wider)
    with pytest.raises(ValueError, match=r"holds weights alone.* init_from="):
        load_checkpoint(made, model=other, optimizer=make_optimizer(other, config.optim))


def test_damage_is_noticed_before_and_after(config: RunConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Transformer(config.model)
    model.reset_parameters(0)
    path = save(tmp_path / "run", config, tokenizer, model)
    made = consolidate(path, tmp_path / "made")
    for file in (made / "model.safetensors", next(path.glob("*.safetensors"))):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(made)
    with pytest.raises(ValueError, match="is damaged"):
        consolidate(path, tmp_path / "other")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["made", "run"]


def test_bad_requests_are_refused(config: RunConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Transformer(config.model)
    model.reset_parameters(0)
    save(tmp_path / "run", config, tokenizer, model)
    convert(tmp_path / "run", tmp_path / "made")
    for arguments, message in (
        ((tmp_path / "run", tmp_path / "made"), "is not empty"),
        ((tmp_path / "run", tmp_path / "made" / "config.yaml"), "is not empty"),
        ((tmp_path / "made", tmp_path / "new"), "already"),
        ((tmp_path, tmp_path / "new"), "no checkpoint at"),
        ((tmp_path / "run", tmp_path / "new", "model.moe.top_k=4"), "apply only with --upcycle"),
        ((tmp_path / "run", tmp_path / "new", "--granularity", 2), "apply only with --upcycle"),
        ((tmp_path / "run", tmp_path / "new", "--seed", 1), "apply only with --upcycle"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(*arguments)
    assert not (tmp_path / "new").exists()


def save_shared(world: World, config: RunConfig, folder: Path, tokenizer_file: Path) -> dict[str, torch.Tensor]:
    model = Transformer(config.model, device="meta")
    parallelize(model, make_meshes(config.parallel, world.size, "cpu"), config)
    model.to_empty(device="cpu").reset_parameters(0)
    save(folder, config, open_tokenizer(tokenizer_file), model, world)
    state = model.state_dict()
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


def test_shards_are_put_together(config: RunConfig, moe_config: object, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two ranks with half of the experts each and halves of all else, the odd ones unequal."""
    assert config.model.moe is not None
    config.model = replace(config.model, moe=replace(config.model.moe, num_experts=6))
    config.parallel = ParallelConfig(ep_size=2)
    tokenizer.save(tmp_path)
    expected, _ = run_ranks(save_shared, 2, config, tmp_path / "run", tmp_path / "tokenizer.model")
    assert len(list((tmp_path / "run" / "checkpoints" / "step_00000003").glob("*.safetensors"))) == 2
    convert(tmp_path / "run", tmp_path / "made")
    stored = load_file(tmp_path / "made" / "model.safetensors")
    assert any("experts" in name for name in stored)
    for name, tensor in stored.items():
        assert torch.equal(tensor, expected[name]), name
    whole = load_model(tmp_path / "made").state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in expected.items())
    assert set(json.loads((tmp_path / "made" / "checksums.json").read_text())) == set(FILES) - {"checksums.json"}
