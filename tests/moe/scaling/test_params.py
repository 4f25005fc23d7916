"""Closed-form counts against the modules on the meta device and against published figures."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moe.compose import CONFIGS, compose
from moe.config import ModelConfig
from moe.model import Transformer
from moe.scaling.params import ComponentParams, component_params, count_params

PRESETS = sorted(path.stem if path.suffix != ".yaml" else path.name[:-5] for path in (CONFIGS / "model").glob("*.yaml"))


def preset(*overrides: str) -> ModelConfig:
    """A preset with a vocabulary and a batch that fits its context."""
    config = compose([*overrides, "train.batch_tokens=32768"]).model
    if config.vocab_size is None:
        config.vocab_size = 4096
    return config


# Artetxe et al. 2021, exact: dense model, shared and expert parameters of its 512-expert twin
PAPER = {
    "125m": (123_658_752, 97_683_456, 14_507_311_104),
    "355m": (353_781_760, 259_348_480, 51_571_064_832),
    "1.3b": (1_311_543_296, 921_350_144, 206_221_344_768),
    "2.7b": (2_646_328_320, None, None),
    "6.7b": (6_650_044_416, 4_535_787_520, 1_099_679_399_936),
    "13b": (12_842_936_320, None, None),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_table_exactly(name: str) -> None:
    dense, shared, expert = PAPER[name]
    count = count_params(preset(f"model={name}"))
    assert count == (dense, dense, dense, 0)
    if shared is not None:
        for moe in ("512e", "gshard_512e"):
            twin = count_params(preset(f"model={name}", f"+moe={moe}"))
            assert (twin.shared, twin.expert, twin.total) == (shared, expert, shared + expert)


def test_active_parameters_of_the_paper() -> None:
    active = {n: count_params(preset(f"model={n}", "+moe=512e")).active for n in ("125m", "355m", "1.3b", "6.7b")}
    assert {n: f"{value / 1e9:.3g}" for n, value in active.items()} == {
        "125m": "0.154",
        "355m": "0.461",
        "1.3b": "1.73",
        "6.7b": "8.83",
    }


def test_fairseqs_own_count() -> None:
    """24 layers, d 2048, 8 experts: 908,423,168 shared and 402,776,064 expert parameters a GPU (fairseq)."""
    config = preset("model=1.3b", "+moe=8e", "model.vocab_size=50000")
    count = count_params(config)
    assert count.shared == 908_423_168
    assert count.expert // 8 == 402_776_064


# Lin et al. 2021, printed with four decimals; OPT's by the module itself, public checkpoints' exact sizes
ROUNDED = {"564m": 0.5645, "1.7b": 1.7329, "2.9b": 2.9415, "7.5b": 7.4928, "4.5b": 4.5525}
EXACT = {
    "opt_125m": 125_239_296,
    "opt_350m": 331_196_416,
    "opt_1.3b": 1_315_758_080,
    "opt_2.7b": 2_651_596_800,
    "opt_6.7b": 6_658_473_984,
    "opt_13b": 12_853_473_280,
    "llama_1b": 1_235_814_400,
    "llama_8b": 8_030_261_248,
    "mixtral_8x7b": 46_702_792_704,
    "olmoe_1b_7b": 6_919_161_856,
}


@pytest.mark.parametrize("name", ROUNDED)
def test_xglm(name: str) -> None:
    assert round(count_params(preset(f"model=xglm_{name}")).total / 1e9, 4) == ROUNDED[name]


@pytest.mark.parametrize("name", EXACT)
def test_public_checkpoints(name: str) -> None:
    assert count_params(preset(f"model={name}")).total == EXACT[name]


def components(model: Transformer) -> ComponentParams:
    """The module's own parameters by their names; the first pattern that fits counts."""
    patterns = {
        "experts": r"\.experts\.",
        "shared_experts": r"\.shared",
        "routers": r"\.router\.",
        "attention": r"\.attention\.",
        "norms": "norm",
        "dense_ffn": r"\.feed_forward\.",
        "embedding": "embedding|position|project_",
        "head": "^head",
    }
    counts = dict.fromkeys(patterns, 0)
    for name, parameter in model.named_parameters():
        counts[next(part for part, pattern in patterns.items() if re.search(pattern, name))] += parameter.numel()
    return ComponentParams(**counts)


@pytest.mark.parametrize("moe", [None, "512e", "64e_top8"])
@pytest.mark.parametrize("name", PRESETS)
def test_formula_and_module_agree_on_every_preset(name: str, moe: str | None) -> None:
    config = preset(f"model={name}", *([] if moe is None else [f"+moe={moe}"]))
    model = Transformer(config, device="meta", dtype=torch.bfloat16)
    count = count_params(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    expert = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key)
    assert count.expert == expert
    assert component_params(config) == components(model)
    if config.moe is not None:
        assert count.active == count.shared + expert // config.moe.num_experts * config.moe.top_k


def test_every_preset_carries_its_file_name() -> None:
    for group in ("model", "moe", "data"):
        for path in (CONFIGS / group).glob("*.yaml"):
            name = re.search(r"^name: (\S+)$", path.read_text(), re.MULTILINE)[1]
            kind = "text" if (group, path.stem) == ("data", "multilingual") else path.stem  # of data, how it is read
            assert name == kind


@pytest.mark.parametrize(
    "changes",
    [
        {"gated": True, "bias": True},
        {"qk_norm": "full", "num_kv_heads": 1, "head_dim": 6},
        {"position": "learned", "position_offset": 2, "embedding_dim": 8, "tie_embeddings": False},
        {"norm": "layernorm", "norm_position": "post", "expert_d_ff": 7, "moe_placement": "first"},
    ],
)
def test_formula_and_module_agree_on_odd_shapes(changes: dict, model_config: Callable[..., ModelConfig]) -> None:
    config = model_config(sparse=True, num_layers=5, **changes)
    model = Transformer(config, device="meta")
    assert count_params(config).total == sum(p.numel() for p in model.parameters())
    assert component_params(config) == components(model)


@pytest.mark.parametrize("shared_gate", [False, True])
def test_shared_experts_count_for_every_token(model_config: Callable[..., ModelConfig], shared_gate: bool) -> None:
    plain = model_config(sparse=True, gated=True, bias=True)
    config = replace(plain, moe=replace(plain.moe, shared_d_ff=7, shared_gate=shared_gate))
    assert component_params(config) == components(Transformer(config, device="meta"))
    count, without = count_params(config), count_params(plain)
    assert count.total == sum(p.numel() for p in Transformer(config, device="meta").parameters())
    assert count.total - without.total == count.active - without.active == count.shared - without.shared
    assert count.shared - without.shared == 3 * 12 * 7 + 7 + 12 + (12 if shared_gate else 0)


def test_a_vocabulary_is_needed() -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size is null"):
        count_params(compose([]).model)
