"""A checkpoint that is not what was saved is refused in one line that names the file and the way out."""

from __future__ import annotations

import json
import shutil

import pytest

from moe.checkpoint import TrainState, load_checkpoint, load_config, load_model, load_tokenizer, verify_checkpoint
from moe.checkpoint.folders import sha256
from moe.config import RunConfig
from tests.moe.conftest import Save
from tests.moe.test_checkpoint import trained


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "no checksums"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(save: Save, config: RunConfig, damage: str) -> None:
    model, optimizer = trained(config)
    save(model, optimizer, TrainState(step=2))
    path = save(model, optimizer)
    (file,) = path.glob("checksums.json" if damage == "no checksums" else "*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-7])
    elif damage == "flip":
        content[-3] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name} is .*damaged.* delete {path} to resume from step_00000002"):
        load_checkpoint(path, model=model, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"is damaged|no checkpoint at"):
        load_model(path)


@pytest.mark.parametrize("content", ["model: {d_model: 12,\n d_ff", "", "{}", "\x00"])
def test_a_damaged_configuration_is_named(save: Save, config: RunConfig, content: str) -> None:
    path = save(*trained(config))
    (path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"{path}/config.yaml is damaged: sha256 .* delete {path} to start again"):
        load_model(path)
    for read in (load_config, load_tokenizer):
        with pytest.raises(ValueError, match=rf"{path}/config.yaml: this is no run configuration of this version"):
            read(path)


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"config.yaml": 1}'])
def test_damaged_checksums_are_named(save: Save, config: RunConfig, content: str) -> None:
    path = save(*trained(config))
    (path / "checksums.json").write_text(content)
    with pytest.raises(ValueError, match=rf"checksums.json.* delete {path} to start again"):
        verify_checkpoint(path)


def test_a_file_of_tensors_that_was_not_saved_with_it_is_refused(save: Save, config: RunConfig) -> None:
    """The reader would read it with the others, and nothing says what it holds."""
    path = save(*trained(config))
    (file,) = path.glob("*.safetensors")
    shutil.copyfile(file, path / "copy of a shard.safetensors")
    with pytest.raises(ValueError, match=r"copy of a shard.safetensors is not in checksums.json.*delete it"):
        load_model(path)


def test_counters_of_another_version_are_refused(save: Save, config: RunConfig) -> None:
    model, optimizer = trained(config)
    path = save(model, optimizer)
    state = json.loads((path / "state.json").read_text()) | {"epochs": 1}
    (path / "state.json").write_text(json.dumps(state))
    sums = json.loads((path / "checksums.json").read_text()) | {"state.json": sha256(path / "state.json")}
    (path / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(ValueError, match=r"state.json is of another version: it has epochs"):
        load_checkpoint(path, model=model, optimizer=optimizer)
