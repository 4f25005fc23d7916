"""Bad input to `moe convert from-hf` and `to-hf`: an error says what is wrong, and nothing is left behind."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moe.checkpoint import load_model
from moe.cli import app
from moe.data.tokenizer import Tokenizer
from moe.interop.hf import from_hf, to_hf
from tests.moe.interop.hf_models import VOCABULARY, assert_same_logits, load_ours, load_theirs, save_theirs, some_tokens

pytest.importorskip("transformers", reason="transformers is the extra 'hf'")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    names = ("llama", "gpt2", "xglm", "mixtral", "opt", "olmoe", "qwen3_moe", "dots1")
    return {name: save_theirs(name, folder / name, torch.float32) for name in names}


Change = Callable[[dict[str, Any]], Any]


def changed(source: Path, folder: Path, *, config: dict[str, Any] | None = None, tensors: Change | None = None) -> Path:
    """A copy of a checkpoint with other keys in config.json, or other tensors."""
    folder.mkdir()
    stated = json.loads((source / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps({key: value for key, value in stated.items() if value != "absent"}))
    weights = load_file(source / "model.safetensors")
    if tensors is not None:
        tensors(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def refused(source: Path, tmp_path: Path, message: str, **options: Any) -> str:
    with pytest.raises(ValueError, match=message) as caught:
        from_hf(source, tmp_path / "made", **({"without_tokenizer": True} | options))
    assert not (tmp_path / "made").exists()
    assert not list(tmp_path.glob(".partial*"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "llama",
            {"model_type": "bloom"},
            r"model_type \('bloom'\) is not supported; supported are: opt, xglm, gpt2, llama",
        ),
        ("llama", {"model_type": "deepseek_v3"}, r"multi-head latent attention \(kv_lora_rank\)"),
        ("llama", {"model_type": "absent"}, "lacks model_type"),
        ("llama", {"attention_bias": True}, r"attention_bias \(True\) is not supported"),
        ("llama", {"mlp_bias": True}, r"mlp_bias \(True\) is not supported"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_parameters": "absent"}, "rope_type .'yarn'."),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, r"factor \(None\) must be a number"),
        ("llama", {"rope_parameters": {"rope_type": "default", "beta": 3}}, r"rope_parameters.beta \(3\)"),
        (
            "llama",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            r"partial_rotary_factor \(0.5\) is not supported",
        ),
        ("llama", {"rope_parameters": "linear"}, r"rope_parameters \('linear'\) must be an object, or null"),
        ("llama", {"rope_parameters": {"rope_theta": None}}, r"rope_parameters.rope_theta \(None\) must be a number"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "both given"),
        ("llama", {"rms_norm_eps": None}, r"rms_norm_eps \(None\) must be a number"),
        ("llama", {"num_hidden_layers": None}, r"num_hidden_layers \(None\) must be a whole number"),
        ("llama", {"model_type": ["llama"]}, r"model_type \(\['llama'\]\) is not supported"),
        ("llama", {"hidden_act": ["silu"]}, r"hidden_act \(\['silu'\]\) is not supported"),
        ("llama", {"hidden_act": "quick_gelu"}, r"hidden_act \('quick_gelu'\) is not supported; supported are: gelu"),
        ("llama", {"quantization_config": {"bits": 4}}, r"holds unknown keys: quantization_config \(\{'bits': 4\}\)"),
        ("llama", {"residual_multiplier": 0.2, "new": 1}, r"new \(1\), residual_multiplier \(0.2\)"),
        ("llama", {"hidden_size": "12"}, r"hidden_size \('12'\) must be a whole number"),
        ("llama", {"tie_word_embeddings": 1}, r"tie_word_embeddings \(1\) must be true or false"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx .True."),
        ("gpt2", {"embd_pdrop": 0.3}, r"embd_pdrop \(0.3\) is not supported: .* resid_pdrop is 0.1"),
        ("gpt2", {"n_embd": 12, "hidden_size": 14}, "are names of one value but differ"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ("opt", {"layerdrop": 0.1}, r"layerdrop \(0.1\)"),
        (
            "xglm",
            {"pad_token_id": 5},
            r"pad_token_id \(5\) is not supported: XGLM zeroes the embedding of the position",
        ),
        ("xglm", {"activation_dropout": 0.1}, r"activation_dropout \(0.1\)"),
        ("mixtral", {"sliding_window": 32}, r"sliding_window \(32\) is not supported"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("olmoe", {"clip_qkv": 8.0}, r"clip_qkv \(8.0\) is not supported"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \(\[1\]\)|misshaped|missing"),
        ("qwen3_moe", {"mlp_only_layers": 1}, r"mlp_only_layers \(1\) must be a list of whole numbers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, r"decoder_sparse_step \(0\) must be at least 1"),
        ("dots1", {"moe_intermediate_size": None}, r"moe_intermediate_size \(None\) must be a whole number"),
        ("dots1", {"layer_types": ["sliding_attention"] * 3}, "sliding_window"),
        ("dots1", {"topk_method": "greedy"}, r"topk_method \('greedy'\)"),
    ],
)
def test_keys_that_cannot_be_expressed(
    name: str, config: dict[str, Any], message: str, published: dict[str, Path], tmp_path: Path
) -> None:
    refused(changed(published[name], tmp_path / "theirs", config=config), tmp_path, message)


def test_every_fault_of_the_tensors_is_listed(published: dict[str, Path], tmp_path: Path) -> None:
    def spoil(weights: dict[str, Any]) -> None:
        del weights["model.norm.weight"]
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(12)
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(12, 18)
        weights["model.layers.0.self_attn.k_proj.weight"] = weights["model.layers.0.self_attn.k_proj.weight"].half()
        weights["lm_head.weight"] = torch.zeros(VOCABULARY, 12, dtype=torch.int32)

    told = refused(changed(published["llama"], tmp_path / "theirs", tensors=spoil), tmp_path, "does not fit")
    for fault in (
        r"missing: model.norm.weight (12,)",
        r"unused: model.layers.0.self_attn.q_proj.bias (12,)",
        r"misshaped: model.layers.1.mlp.up_proj.weight (12, 18) must be (18, 12)",
        r"of several dtypes: model.layers.0.self_attn.q_proj.weight to model.layers.0.self_attn.v_proj.weight",
        r"of an unsupported dtype: lm_head.weight torch.int32",
    ):
        assert fault in told


def test_a_vocabulary_of_another_size(published: dict[str, Path], tmp_path: Path, tokenizer: Tokenizer) -> None:
    wrong = changed(published["llama"], tmp_path / "theirs", config={"vocab_size": VOCABULARY + 1})
    told = refused(wrong, tmp_path, "misshaped")
    assert f"model.embed_tokens.weight ({VOCABULARY}, 12) must be ({VOCABULARY + 1}, 12)" in told
    assert "lm_head.weight" in told
    other = changed(published["llama"], tmp_path / "other")
    tokenizer.save(other)
    refused(other, tmp_path, rf"the tokenizer .* has {tokenizer.vocab_size} ids and the model vocab_size {VOCABULARY}")


def test_a_tied_head_that_differs(published: dict[str, Path], tmp_path: Path) -> None:
    """Old files hold the head beside the embedding; a copy is read, another matrix is not dropped."""
    name, head = "transformer.wte.weight", "lm_head.weight"
    same = changed(published["gpt2"], tmp_path / "same", tensors=lambda w: w.update({head: w[name].clone()}))
    from_hf(same, tmp_path / "fine", without_tokenizer=True)
    other = changed(published["gpt2"], tmp_path / "theirs", tensors=lambda w: w.update({head: w[name] + 1}))
    refused(other, tmp_path, "ties the embeddings, but lm_head.weight is not transformer.wte.weight")


def test_old_names_and_buffers(published: dict[str, Path], tmp_path: Path) -> None:
    """The first GPT-2 files: names of the bare model, and the mask as a tensor."""

    def as_published(weights: dict[str, Any]) -> None:
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        weights["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        weights["h.1.attn.masked_bias"] = torch.tensor(-1e4)

    old = changed(published["gpt2"], tmp_path / "theirs", tensors=as_published)
    made = from_hf(old, tmp_path / "made", without_tokenizer=True, verify=True)
    new = from_hf(published["gpt2"], tmp_path / "new", without_tokenizer=True)
    assert (made / "model.safetensors").read_bytes() == (new / "model.safetensors").read_bytes()


def test_damaged_and_missing_files(published: dict[str, Path], tmp_path: Path) -> None:
    whole = published["llama"] / "model.safetensors"
    for number, content in enumerate(
        (
            b"",
            whole.read_bytes()[:100],
            whole.read_bytes()[:-8],
            struct.pack("<Q", 2**60) + b"{}",
            b"\x08" + bytes(7) + b"not json",
        )
    ):
        folder = changed(published["llama"], tmp_path / f"damaged{number}")
        (folder / "model.safetensors").write_bytes(content)
        refused(folder, tmp_path, r"model\.safetensors is not a safetensors file, or is damaged")
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    refused(folder, tmp_path, "holds no weights in a supported format: .* It holds: tf_model.h5")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    refused(folder, tmp_path, "must be the name of a file beside it")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    refused(folder, tmp_path, "lacks x.safetensors")
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(folder, tmp_path, "is not an index of weights")
    (folder / "config.json").write_text("{")
    refused(folder, tmp_path, "config.json is not JSON")
    refused(tmp_path / "nowhere", tmp_path, "is not a folder")
    refused(published["llama"], tmp_path, "holds no tokenizer: .* --without-tokenizer", without_tokenizer=False)
    refused(published["llama"], tmp_path, r"--dtype \('int8'\) must be one of: float64", dtype="int8")


def test_of_two_sets_of_weights_transformers_one_is_read(published: dict[str, Path], tmp_path: Path) -> None:
    """One file before an index, which may be left of an earlier save."""
    folder = changed(published["llama"], tmp_path / "theirs")
    older = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(older, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(older, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_logits(
        load_ours(from_hf(folder, tmp_path / "made", without_tokenizer=True), torch.float64), load_theirs(folder), 1e-9
    )


def test_a_number_too_large_for_the_wanted_dtype(published: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = changed(published["llama"], tmp_path / "theirs", tensors=lambda w: w[name].view(-1)[7].fill_(-7e4))
    told = refused(folder, tmp_path, "the largest number of float16 is 65504: choose another --dtype", dtype="float16")
    assert "layers.1.feed_forward.w_in holds 70000" in told
    made = from_hf(folder, tmp_path / "ours", without_tokenizer=True, dtype="bfloat16")
    with pytest.raises(ValueError, match=f"{name} holds 70144, and the largest number of float16"):
        to_hf(made, tmp_path / "back", dtype="float16")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_a_destination_that_cannot_be_made_is_refused(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for destination in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="file is a file: name a new folder"):
            from_hf(published["llama"], destination, without_tokenizer=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made = from_hf(published["llama"], "ours", without_tokenizer=True)
    assert (made / "model.safetensors").is_file()
    with pytest.raises(ValueError, match=r"destination \('\.'\) must be a new folder, by its name"):
        from_hf(published["llama"], ".", without_tokenizer=True)


def test_torch_files_are_read_safely(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = load_file(published["opt"] / "model.safetensors")
    expected = from_hf(published["opt"], tmp_path / "expected", without_tokenizer=True) / "model.safetensors"
    folder = changed(published["opt"], tmp_path / "theirs")
    (folder / "model.safetensors").unlink()
    for name, zipped in (("pytorch_model.bin", True), ("pytorch_model.bin", False), ("model.pt", True)):
        for old in (*folder.glob("*.bin"), *folder.glob("*.pt")):
            old.unlink()
        torch.save(weights, folder / name, _use_new_zipfile_serialization=zipped)
        made = from_hf(folder, tmp_path / f"{name}{zipped}", without_tokenizer=True, verify=True)
        assert (made / "model.safetensors").read_bytes() == expected.read_bytes()
    for content in (pickle.dumps(Bomb()), b"no pickle"):
        (folder / "model.pt").write_bytes(content)
        refused(folder, tmp_path, r"model\.pt (is refused: it holds more than tensors|cannot be read)")
    torch.save(weights | {"step": 3}, folder / "model.pt")
    refused(folder, tmp_path, "'step' is a int, not a tensor with a name")
    for spoilt, message in (
        (torch.zeros(12, device="meta"), "final_layer_norm.weight has no numbers"),
        (torch.ones(12).to_sparse(), "final_layer_norm.weight is torch.sparse_coo"),
        (
            torch.ones(12).to(torch.float8_e4m3fn),
            "of an unsupported dtype: .*final_layer_norm.weight torch.float8_e4m3fn",
        ),
    ):
        torch.save(weights | {"model.decoder.final_layer_norm.weight": spoilt}, folder / "model.pt")
        refused(folder, tmp_path, message)
    torch.save({"model": weights, "x": Bomb()}, folder / "model.pt")
    refused(folder, tmp_path, "is refused: it holds more than tensors, and no code in it was run")
    assert not (tmp_path / "exploded").exists()


def test_verification_notices_a_changed_bit(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe.interop.hf import export_checkpoint, import_checkpoint

    made = from_hf(published["mixtral"], tmp_path / "ours", without_tokenizer=True)
    write = import_checkpoint.write_safetensors

    def with_a_swap(path: Path, contents: Any, rows_of: Any) -> str:
        def rows(name: str) -> Any:
            parts = list(rows_of(name))
            return parts[::-1] if len(parts) == 5 else [part.neg() if "down" in name or ".w2." in name else part
                                                        for part in parts]  # fmt: skip

        return write(path, contents, rows)

    monkeypatch.setattr(import_checkpoint, "write_safetensors", with_a_swap)
    monkeypatch.setattr(export_checkpoint, "write_safetensors", with_a_swap)
    refused(
        published["mixtral"], tmp_path, r"differ from their source: .*experts.w_in rows 0 to 1 are not", verify=True
    )
    with pytest.raises(ValueError, match=r"differ from their source: .*w2.weight is not"):
        to_hf(made, tmp_path / "back", verify=True)
    assert not (tmp_path / "back").exists()


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.strip()


def test_the_commands(published: dict[str, Path], tmp_path: Path) -> None:
    source, ours, made = published["llama"], tmp_path / "ours", tmp_path / "back"
    assert run("from-hf", source, ours, "--without-tokenizer", "--dtype", "bfloat16", "--verify") == str(ours)
    assert run("to-hf", ours, made, "--dtype", "float32", "--max-shard-size", "2KB", "--verify") == str(made)
    assert len(list(made.glob("*.safetensors"))) > 3
    assert json.loads((made / "config.json").read_text())["dtype"] == "float32"
    rounded = load_file(source / "model.safetensors")["model.norm.weight"].bfloat16()
    assert torch.equal(load_ours(ours, torch.float32).final_norm.weight, rounded.float())
    assert load_model(ours)(some_tokens()).logits.dtype == torch.float32
    for arguments, message in (
        (("to-hf", ours, made), "is not empty: name a new folder"),
        (("to-hf", ours, tmp_path / "new", "--max-shard-size", "5 parsecs"), "must be a size such as 5GB"),
        (("to-hf", ours, tmp_path / "new", "--family", "bert"), "--family .'bert'. must be one of: opt"),
        (("to-hf", ours, tmp_path / "new", "--family", "opt"), "opt: position is 'rope', not 'learned'"),
        (("to-hf", tmp_path, tmp_path / "new"), "no checkpoint at"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*arguments)
    assert not (tmp_path / "new").exists()
    help_text = CliRunner().invoke(app, ["convert", "--help"]).output
    assert all(name in help_text for name in ("from-hf", "to-hf", "checkpoint"))
