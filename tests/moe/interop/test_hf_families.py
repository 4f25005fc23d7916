"""Each family of transformers with random weights, through a checkpoint of ours and back: logits, tokens, bytes.

Double precision: an error in a name, a transposition or an epsilon shows at 1e-3, rounding at 1e-15.
"""

from __future__ import annotations

import filecmp
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe.generation import generate
from moe.interop.hf import from_hf, to_hf
from moe.interop.hf.families import read_config
from tests.moe.interop.hf_models import (
    CASES,
    FAMILIES,
    assert_same_logits,
    default_dtype,
    load_ours,
    load_theirs,
    save_theirs,
    some_tokens,
)

pytest.importorskip("transformers", reason="transformers is the extra 'hf'")


@pytest.mark.parametrize("name", CASES)
def test_in_and_out_again(name: str, tmp_path: Path) -> None:
    """The same logits, the same 64 greedy tokens, the same shape and the same bytes."""
    source = save_theirs(name, tmp_path / "theirs")
    checkpoint = from_hf(source, tmp_path / "ours", without_tokenizer=True, verify=True)
    ours, theirs = load_ours(checkpoint), load_theirs(source)
    assert_same_logits(ours, theirs, CASES[name].tolerance)
    prompts = some_tokens(3, 5)
    with default_dtype(torch.float64):
        expected = theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=64, do_sample=False, eos_token_id=None
        )[:, 5:]
    assert generate(ours, prompts.tolist(), 64) == expected.tolist()
    assert expected.unique().numel() > 3, "a model that repeats itself compares little"
    made = to_hf(checkpoint, tmp_path / "back", verify=True)
    for file in ("model.safetensors", "generation_config.json"):
        assert filecmp.cmp(source / file, made / file, shallow=False), file
    assert_same_config(source, made)


def assert_same_config(source: Path, made: Path) -> None:
    """The same shape, whatever keys say it, and the same token ids."""
    (family, model), (family_again, again) = read_config(source), read_config(made)
    assert family_again is family
    assert replace(again, name=model.name) == model
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    config, config_again = (json.loads((folder / "config.json").read_text()) for folder in (source, made))
    assert [config_again[key] for key in ids] == [config[key] for key in ids]


@pytest.mark.parametrize("name", FAMILIES)
def test_several_files(name: str, tmp_path: Path) -> None:
    """Theirs in shards is read, ours in shards is read by transformers; the largest tensor is all that fits."""
    source = save_theirs(name, tmp_path / "theirs", max_shard_size="3KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    ours = from_hf(source, tmp_path / "ours", without_tokenizer=True)
    made = to_hf(ours, tmp_path / "back", max_shard_size="4KB", verify=True)
    files = sorted(made.glob("model-*-of-*.safetensors"))
    assert len(files) > 3
    assert json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    assert_same_logits(load_ours(ours), load_theirs(made), CASES[name].tolerance)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "dots1"])
def test_fused_experts_are_read(name: str, tmp_path: Path) -> None:
    """What transformers 5 writes when told to keep the names that it has in memory."""
    source = save_theirs(name, tmp_path / "theirs", save_original_format=False)
    from safetensors import safe_open

    with safe_open(source / "model.safetensors", framework="pt") as file:
        assert any(key.endswith("experts.gate_up_proj") for key in file.keys())  # noqa: SIM118
    fused = from_hf(source, tmp_path / "fused", without_tokenizer=True, verify=True)
    plain = from_hf(save_theirs(name, tmp_path / "plain"), tmp_path / "ours", without_tokenizer=True)
    assert filecmp.cmp(fused / "model.safetensors", plain / "model.safetensors", shallow=False)
