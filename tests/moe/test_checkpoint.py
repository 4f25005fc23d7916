from __future__ import annotations

import concurrent.futures
import contextlib
import json
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from moe.checkpoint import (
    CheckpointSaver,
    TrainState,
    find_checkpoint,
    function_changes,
    list_checkpoints,
    load_checkpoint,
    load_config,
    load_model,
    load_tokenizer,
    model_tensors,
    optimizer_tensors,
    storage,
    verify_checkpoint,
)
from moe.checkpoint import save as saving
from moe.compose import to_yaml
from moe.config import ModelConfig, RunConfig
from moe.config.model import RopeScalingConfig
from moe.data.tokenizer import Tokenizer
from moe.model import Transformer
from moe.training.optimizer import make_optimizer
from tests.moe.conftest import STATE, Save


def trained(config: RunConfig, seed: int = 0) -> tuple[Transformer, torch.optim.Optimizer]:
    """A model after one update, so that the optimizer has a state."""
    model = Transformer(config.model)
    model.reset_parameters(seed)
    optimizer = make_optimizer(model, config.optim)
    tokens = torch.randint(37, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(tokens, tokens).token_losses.mean().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("tied", [True, False])
def test_everything_comes_back_bit_for_bit(
    save: Save, config: RunConfig, tokenizer: Tokenizer, model_config: Callable[..., ModelConfig], tied: bool
) -> None:
    config.model = model_config(sparse=True, tie_embeddings=tied, position="learned")
    model, optimizer = trained(config)
    path = save(model, optimizer)
    other, other_optimizer = trained(config, seed=5)
    fresh = Transformer(config.model)
    fresh_optimizer = make_optimizer(fresh, config.optim)
    for target, target_optimizer in ((other, other_optimizer), (fresh, fresh_optimizer)):
        assert load_checkpoint(path, model=target, optimizer=target_optimizer) == STATE
        expected = model_tensors(model) | optimizer_tensors(model, optimizer)
        actual = model_tensors(target) | optimizer_tensors(target, target_optimizer)
        assert expected.keys() == actual.keys()
        assert any(key.endswith("exp_avg_sq") for key in actual)
        assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_going_back_before_the_first_update_forgets_its_moments(save: Save, config: RunConfig) -> None:
    model = Transformer(config.model)
    path = save(model, make_optimizer(model, config.optim), TrainState())
    later, optimizer = trained(config)
    assert optimizer.state
    load_checkpoint(path, model=later, optimizer=optimizer)
    assert optimizer_tensors(later, optimizer) == {}
    assert torch.equal(later.embedding.weight, model.embedding.weight)


def test_tensors_are_spread_over_files_of_a_limited_size(
    save: Save, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FILE_BYTES", 4096)
    model, optimizer = trained(config)
    expected = model_tensors(model) | optimizer_tensors(model, optimizer)
    path = save(model, optimizer)
    largest = max(tensor.nbytes for tensor in expected.values())
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < max(largest, 4096) + 4096  # and its header
    other, other_optimizer = trained(config, seed=5)
    load_checkpoint(path, model=other, optimizer=other_optimizer)
    actual = model_tensors(other) | optimizer_tensors(other, other_optimizer)
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_a_path_is_enough(save: Save, config: RunConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, optimizer = trained(config)
    path = save(model, optimizer)
    tokens = torch.tensor([[1, 2, 3]])
    for place in (path, tmp_path, tmp_path / "checkpoints", str(path)):
        assert torch.equal(load_model(place)(tokens).logits, model.eval()(tokens).logits)
    assert load_config(tmp_path) == config
    assert load_tokenizer(tmp_path).hash == tokenizer.hash


def test_only_the_newest_are_kept_and_latest_names_the_last(save: Save, config: RunConfig, tmp_path: Path) -> None:
    model, optimizer = trained(config)
    for step in (1, 2, 3, 4):
        save(model, optimizer, TrainState(step=step))
    folder = tmp_path / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000003", "step_00000004"]
    assert (folder / "latest").read_text() == "step_00000004\n"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000003", "step_00000004"]


def test_milestones_are_kept_for_good(save: Save, config: RunConfig, tmp_path: Path) -> None:
    model, optimizer = trained(config)
    for step in range(1, 10):
        save(model, optimizer, TrainState(step=step), keep_last=1, keep_every=4)
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "checkpoints")] == ["4", "8", "9"]
    save(model, optimizer, TrainState(step=10), keep_last=3)  # without keep_every they count like all others
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "checkpoints")] == ["8", "9", "0"]


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_every": 0}])
def test_a_policy_that_keeps_nothing_is_refused(
    save: Save, config: RunConfig, tmp_path: Path, options: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match=r"(keep_last|keep_every) \(0\) must be at least 1"):
        save(*trained(config), **options)
    assert not (tmp_path / "checkpoints").exists()


def test_a_deletion_that_dies_leaves_no_half_checkpoint(
    save: Save, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(config)
    save(model, optimizer, TrainState(step=1))

    def half(path: Path, ignore_errors: bool = False) -> None:
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", half)
        save(model, optimizer, TrainState(step=2), keep_last=1)
    folder = tmp_path / "checkpoints"
    for path in list_checkpoints(folder):
        verify_checkpoint(path)
    assert sorted(path.name for path in folder.iterdir()) == [".deleted_step_00000001", "latest", "step_00000002"]
    save(model, optimizer, TrainState(step=3))
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000002", "step_00000003"]


def test_the_same_step_again_replaces_it(save: Save, config: RunConfig, tmp_path: Path) -> None:
    model, optimizer = trained(config)
    save(model, optimizer)
    other, other_optimizer = trained(config, seed=5)
    path = save(other, other_optimizer)
    assert sorted(each.name for each in path.parent.iterdir()) == ["latest", path.name]
    load_checkpoint(path, model=model, optimizer=optimizer)
    assert torch.equal(model.embedding.weight, other.embedding.weight)


def test_the_same_step_again_is_not_lost_with_what_cannot_be_deleted(
    save: Save, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system, which keeps what another process has open."""
    model, optimizer = trained(config)
    save(model, optimizer)
    other, other_optimizer = trained(config, seed=5)
    remove = shutil.rmtree

    def stubborn(path: Path, ignore_errors: bool = False) -> None:
        if path.name.startswith(".deleted_"):
            raise OSError("Directory not empty")
        remove(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Directory not empty"):
        patch.setattr("shutil.rmtree", stubborn)
        save(other, other_optimizer)
    (path,) = list_checkpoints(tmp_path / "checkpoints")
    load_checkpoint(path, model=model, optimizer=optimizer)
    assert torch.equal(model.embedding.weight, other.embedding.weight)


def test_links_to_checkpoints_elsewhere_are_deleted_alone(save: Save, config: RunConfig, tmp_path: Path) -> None:
    model, optimizer = trained(config)
    moved = save(model, optimizer, TrainState(step=1)).rename(tmp_path / "elsewhere")
    folder = tmp_path / "checkpoints"
    (folder / "step_00000001").symlink_to(moved)
    (folder / ".partial_step_00000001").symlink_to(moved)
    (folder / ".partial_step_00000002").touch()
    for step in (2, 3):
        save(model, optimizer, TrainState(step=step))
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000002", "step_00000003"]
    verify_checkpoint(moved)


class Background(NamedTuple):
    """A saver beside training, and the switch that lets its writing begin."""

    saver: CheckpointSaver
    begin: threading.Event


@pytest.fixture
def background(
    tmp_path: Path, config: RunConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Background]:
    begin, write_tensors = threading.Event(), storage.write_tensors

    def slow(*arguments: Any) -> None:
        assert begin.wait(30)
        write_tensors(*arguments)

    monkeypatch.setattr(saving, "write_tensors", slow)
    model, optimizer = trained(config)
    saver = CheckpointSaver(
        tmp_path / "checkpoints",
        model=model,
        optimizer=optimizer,
        config_yaml=to_yaml(config),
        tokenizer=tokenizer,
        keep_last=2,
        in_background=True,
    )
    yield Background(saver, begin)
    begin.set()


def test_training_goes_on_while_a_checkpoint_is_written(
    background: Background, config: RunConfig, tmp_path: Path
) -> None:
    saver, begin = background
    folder = tmp_path / "checkpoints"
    for step in (1, 2):  # the second copy is made into the memory of the first
        begin.clear()
        tensors = model_tensors(saver.model) | optimizer_tensors(saver.model, saver.optimizer)
        expected = {key: value.clone() for key, value in tensors.items()}
        state = TrainState(step=step, tokens=7)
        saver.save(state)
        state.tokens = 8
        with torch.no_grad():
            for value in tensors.values():
                value.add_(1.0)
        assert not (folder / f"step_{step:08d}").exists()
        begin.set()
        saver.wait()
        other, optimizer = trained(config, seed=5)
        assert load_checkpoint(find_checkpoint(tmp_path), model=other, optimizer=optimizer).tokens == 7
        actual = model_tensors(other) | optimizer_tensors(other, optimizer)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_the_next_save_waits_for_the_last(background: Background, tmp_path: Path) -> None:
    saver, begin = background
    saver.save(TrainState(step=1))
    threading.Timer(0.2, begin.set).start()
    saver.save(TrainState(step=2))
    assert (tmp_path / "checkpoints" / "step_00000001").exists()
    saver.close()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000001", "step_00000002"]


def test_what_fails_in_the_background_is_raised_at_the_next_call(background: Background, tmp_path: Path) -> None:
    saver, begin = background
    begin.set()
    with full_disk():
        saver.save(TrainState(step=1))
        concurrent.futures.wait([saver._writing])
    with pytest.raises(OSError, match="could not be written"):
        saver.save(TrainState(step=2))
    with torch.no_grad():
        saver.model.embedding.weight[0, 0] = float("nan")
    saver.save(TrainState(step=3))
    with pytest.raises(ValueError, match="step 3 is not saved"):
        saver.wait()
    saver.wait()  # said once
    saver.save(TrainState(step=4))
    with pytest.raises(RuntimeError, match="what stopped the run") as stopped, saver:
        raise RuntimeError("what stopped the run")
    assert "step 4 is not saved" in stopped.value.__notes__[0]
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_a_saver_without_a_thread_saves_before_it_returns(
    save: Save, config: RunConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """And writes what `save_checkpoint` writes; only the header of a file has no fixed order."""
    model, optimizer = trained(config)
    expected = save(model, optimizer)
    held = {"model": model, "optimizer": optimizer, "config_yaml": to_yaml(config), "tokenizer": tokenizer}
    with CheckpointSaver(tmp_path / "other", keep_last=1, **held) as saver:
        saver.save(STATE)
        (made,) = list_checkpoints(tmp_path / "other")
    assert {file.name for file in made.iterdir()} == {file.name for file in expected.iterdir()}
    (a,), (b,) = made.glob("*.safetensors"), expected.glob("*.safetensors")
    for name in ("config.yaml", "state.json", "tokenizer.model"):
        assert (made / name).read_bytes() == (expected / name).read_bytes()
    stored = load_file(b)
    assert all(torch.equal(tensor, stored[key]) for key, tensor in load_file(a).items())


def test_nothing_on_disk_is_a_pickle(save: Save, config: RunConfig) -> None:
    path = save(*trained(config))
    names = {file.suffix or file.name for file in path.iterdir()}
    assert names == {".safetensors", ".json", ".yaml", ".model"}


def test_another_shape_is_refused_before_anything_is_read(
    save: Save, config: RunConfig, model_config: Callable[..., ModelConfig]
) -> None:
    path = save(*trained(config))
    config.model = model_config(sparse=True, d_ff=21, num_layers=4)
    model = Transformer(config.model)
    before = {key: value.clone() for key, value in model_tensors(model).items()}
    with pytest.raises(ValueError, match=r"does not fit the model: .*\(1, 12, 20\)|missing model.layers.3"):
        load_checkpoint(path, model=model, optimizer=make_optimizer(model, config.optim))
    assert all(torch.equal(before[key], value) for key, value in model_tensors(model).items())


def test_a_poisoned_model_is_never_saved(save: Save, config: RunConfig, tmp_path: Path) -> None:
    model, optimizer = trained(config)
    good = save(model, optimizer, TrainState(step=2))
    with torch.no_grad():
        model.embedding.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"step 3 is not saved: model\.embedding\.weight"):
        save(model, optimizer)
    assert list_checkpoints(tmp_path / "checkpoints") == [good]


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 4 KiB: writing more fails as it does on a full disk. Not even the test's own output."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_last_checkpoint(save: Save, config: RunConfig, tmp_path: Path) -> None:
    model, optimizer = trained(config)
    good = save(model, optimizer, TrainState(step=2))
    message = r"could not be written .* earlier checkpoints in .* are untouched"
    with pytest.raises(OSError, match=message), full_disk():
        save(model, optimizer)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000002"]
    assert load_checkpoint(good, model=model, optimizer=optimizer).step == 2


def test_leftovers_of_a_crash_are_no_checkpoint(save: Save, config: RunConfig, tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / ".partial_step_00000003"
    partial.mkdir(parents=True)
    (partial / "state.json").write_text("{")
    with pytest.raises(ValueError, match="no checkpoint at"):
        find_checkpoint(tmp_path)
    path = save(*trained(config))
    assert json.loads((path / "state.json").read_text())["step"] == 3
    assert not partial.exists()


def test_a_bit_that_changes_on_the_way_to_the_disk_is_noticed(
    save: Save, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupting(folder: Path, tensors: dict[str, torch.Tensor], group: None) -> None:
        storage.write_tensors(folder, tensors, group)
        (file,) = folder.glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(saving, "write_tensors", corrupting)
    with pytest.raises(OSError, match="read back"):
        save(*trained(config))
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_changes_of_the_function_are_those_that_are_read(model_config: Callable[..., ModelConfig]) -> None:
    """Rotary settings without rotary positions compute nothing, and a width that is written out is the derived one."""
    rope, learned = (replace(model_config(sparse=False), position=name) for name in ("rope", "learned"))
    scaling = RopeScalingConfig("linear", 2.0)
    assert function_changes(learned, replace(learned, rope_theta=5e5, head_dim=learned.head_width)) == {}
    assert function_changes(replace(rope, norm_eps=1e-6, rope_scaling=scaling), replace(rope, rope_theta=5e5)) == {
        "model.norm_eps": ("1e-06", "1e-05"),
        "model.rope_theta": ("10000.0", "500000.0"),
        "model.rope_scaling": (
            "{kind:linear,factor:2.0,low_freq_factor:1.0,high_freq_factor:4.0,original_max_seq_len:null}",
            "null",
        ),
    }
