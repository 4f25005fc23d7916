"""Models of ours as transformers opens them: presets, trained models, and those that no family can say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe.checkpoint import TrainState, consolidate, load_config, load_tokenizer, save_checkpoint
from moe.cli import app
from moe.compose import CONFIGS, compose, to_yaml
from moe.config import RunConfig
from moe.data.tokenizer import Tokenizer, open_tokenizer
from moe.interop.hf import from_hf, to_hf
from moe.interop.hf.families import choose_family, read_config
from moe.model import Transformer
from moe.run import train
from tests.moe.interop.hf_models import (
    CASES,
    ROUTED,
    assert_same_logits,
    load_ours,
    load_theirs,
    make_model,
    some_tokens,
)
from tests.moe.interop.test_hf_published_configs import PUBLISHED

PRESETS = sorted(file.stem for file in (CONFIGS / "model").glob("*.yaml"))
_SMALL = {"d_model": 24, "d_ff": 20, "num_layers": 2, "num_heads": 6, "max_seq_len": 64, "vocab_size": 60}


def family_of(preset: str) -> str | None:
    for name, family in (("opt", "opt"), ("xglm", "xglm"), ("llama", "llama"), ("mixtral", "mixtral")):
        if preset.startswith(name):
            return family
    if preset.startswith("olmoe"):
        return "olmoe"
    return "xglm" if preset[0].isdigit() else None  # the paper's dense models; tiny and the ladder are our own


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_find_their_family(preset: str) -> None:
    model = replace(compose([f"model={preset}", "data.seq_len=64"]).model, vocab_size=60)
    expected = family_of(preset)
    if expected is not None:
        assert choose_family(model, None, None).model_type == expected
        return
    with pytest.raises(ValueError, match=r"fits no family of transformers.*\n  llama: .*gated is False, not True"):
        choose_family(model, None, None)


def test_the_papers_sparse_models_fit_none() -> None:
    model = compose(["model=125m", "+moe=512e"]).model
    with pytest.raises(ValueError, match=r"(?s)fits no family.*\n  xglm: moe is MoEConfig"):
        choose_family(model, None, None)
    with pytest.raises(ValueError, match=r"\n  mixtral: .*norm is 'layernorm', not 'rmsnorm'.*gated is False"):
        choose_family(model, "mixtral", None)


def test_groups_of_one_expert_fit_none(tmp_path: Path) -> None:
    """transformers takes the two best scores of a group, and ends in an error where there is one."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["dots_llm1"] | {"n_group": 64, "topk_group": 8}))
    model = read_config(tmp_path)[1]
    assert choose_family(model, None, None).model_type == "dots1"
    assert model.moe is not None
    with pytest.raises(ValueError, match="groups of 1 expert"):
        choose_family(replace(model, moe=replace(model.moe, num_groups=128)), "dots1", None)


@pytest.fixture
def small_run(tokenizer: Tokenizer, tmp_path: Path) -> Callable[[str], Path]:
    def make(preset: str) -> Path:
        """A preset, made small, with random weights and a tokenizer, as a run saves it."""
        config: RunConfig = compose([f"model={preset}", "data.seq_len=64"])
        sizes = _SMALL | {"vocab_size": tokenizer.vocab_size + 3}
        if config.model.embedding_dim is not None:
            sizes["embedding_dim"] = 10
        if config.model.num_kv_heads is not None:
            sizes["num_kv_heads"] = 2
        shape = replace(config.model, **sizes, head_dim=None, init_std=0.3)
        if shape.moe is not None:
            shape = replace(shape, moe=replace(shape.moe, num_experts=5, top_k=2))
        model = Transformer(shape)
        model.reset_parameters(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        return save_checkpoint(
            tmp_path / "run" / "checkpoints",
            model=model,
            optimizer=None,
            state=TrainState(),
            config_yaml=to_yaml(replace(config, model=shape)),
            tokenizer=tokenizer,
            keep_last=1,
        )

    return make


def assert_autotokenizer_has_its_ids(made: Path, tokenizer: Tokenizer) -> None:
    """transformers would take the model for the family's own tokenizer, where nothing says what it is."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(made)
    for text in ("the cat\n    sat", "  two  spaces\tand 漢字", "\n\n"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.eos_token_id, theirs.bos_token_id) == (tokenizer.eos_id, tokenizer.bos_id)
    assert open_tokenizer(made).begin_id == tokenizer.begin_id


@pytest.mark.parametrize(
    "preset", ["125m", "xglm_564m", "opt_350m", "opt_125m", "llama_8b", "mixtral_8x7b", "olmoe_1b_7b"]
)
def test_transformers_computes_what_ours_does(preset: str, small_run: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is the extra 'hf'")
    checkpoint = small_run(preset)
    made = to_hf(tmp_path / "run", tmp_path / "hf", verify=True, max_shard_size="20KB")
    tolerance = ROUTED if load_config(checkpoint).model.moe is not None else 1e-9
    assert_same_logits(load_ours(checkpoint), load_theirs(made), tolerance)
    tokenizer = load_tokenizer(checkpoint)
    config = json.loads((made / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (tokenizer.eos_id, tokenizer.bos_id)
    assert (made / "tokenizer.model").read_bytes() == (checkpoint / "tokenizer.model").read_bytes()
    assert_autotokenizer_has_its_ids(made, tokenizer)
    once = to_hf(consolidate(tmp_path / "run", tmp_path / "one_file"), tmp_path / "again", max_shard_size="20KB")
    for file in made.iterdir():
        assert file.read_bytes() == (once / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", ["opt", "dots1"])
def test_imported_trained_and_exported(name: str, overrides: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Five steps of an ordinary run from imported weights, through experts and a balancing bias."""
    pytest.importorskip("transformers", reason="transformers is the extra 'hf'")
    CASES[name].options["vocab_size"], before = tokenizer.vocab_size, CASES[name].options["vocab_size"]
    try:
        make_model(name, torch.float32).save_pretrained(tmp_path / "theirs")
    finally:
        CASES[name].options["vocab_size"] = before
    tokenizer.save(tmp_path / "theirs")
    imported = from_hf(tmp_path / "theirs", tmp_path / "ours")
    assert load_tokenizer(imported).hash == tokenizer.hash
    ordinary = [each for each in overrides if each != "+moe=8e" and not each.startswith("model.")]
    config = compose([*ordinary, "data.seq_len=32"])
    config = replace(
        config,
        model=load_config(imported).model,
        init_from=str(imported),
        run_dir=str(tmp_path / "run"),
        data=replace(config.data, tokenizer=str(imported / "tokenizer.model")),
        train=replace(config.train, num_steps=5),
    )
    run = train(config)
    theirs = load_theirs(to_hf(run, tmp_path / "back", verify=True))
    ours = load_ours(run)
    assert_same_logits(ours, theirs, CASES[name].tolerance)
    start = load_ours(imported)
    moved = [not torch.equal(a, b) for a, b in zip(ours.parameters(), start.parameters(), strict=True)]
    assert all(moved)
    biases = [key for key in ours.state_dict() if key.endswith("expert_bias")]
    assert all(not torch.equal(ours.state_dict()[key], start.state_dict()[key]) for key in biases)
    assert bool(biases) == (name == "dots1")


def test_an_import_is_a_checkpoint_in_full(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Text from it, and experts for it."""
    pytest.importorskip("transformers", reason="transformers is the extra 'hf'")
    CASES["gpt2"].options["vocab_size"], before = tokenizer.vocab_size, CASES["gpt2"].options["vocab_size"]
    try:
        make_model("gpt2", torch.float32).save_pretrained(tmp_path / "theirs")
    finally:
        CASES["gpt2"].options["vocab_size"] = before
    tokenizer.save(tmp_path / "theirs")
    runner = CliRunner()

    def moe(*arguments: object) -> str:
        result = runner.invoke(app, [*map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    moe("convert", "from-hf", tmp_path / "theirs", tmp_path / "ours")
    assert moe("generate", tmp_path / "ours", "--prompt", "the cat", "--tokens", 5).startswith("the cat")
    moe("convert", tmp_path / "ours", tmp_path / "sparse", "--upcycle", "8e")
    dense, sparse = load_ours(tmp_path / "ours"), load_ours(tmp_path / "sparse")
    tokens = some_tokens()
    scale = float(dense(tokens).logits.detach().abs().max())
    assert float((dense(tokens).logits - sparse(tokens).logits).detach().abs().max()) < 1e-9 * scale
    assert sparse.config.moe is not None
    assert sparse.config.activation == "gelu_tanh"
