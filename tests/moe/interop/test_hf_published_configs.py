"""The config.json of public checkpoints, key by key as they are published, and the shapes that they mean.

Sizes are the models' own; no weights are needed. A family whose reader refuses a key of its own releases is of no use.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe.compose import compose
from moe.config import ModelConfig, RopeScalingConfig
from moe.interop.hf.families import read_config
from moe.scaling.params import count_params

_COMMON = {"architectures": ["X"], "torch_dtype": "float16", "transformers_version": "4.21.0", "use_cache": True}
_OPT = {
    "activation_dropout": 0.0, "activation_function": "relu", "attention_dropout": 0.0, "bos_token_id": 2,
    "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 3072, "hidden_size": 768,
    "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "vocab_size": 50272,
    "word_embed_proj_dim": 768, "prefix": "</s>", "_remove_final_layer_norm": False, "_name_or_path": "opt",
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "opt_125m": _OPT,
    "opt_350m": _OPT
    | {
        "do_layer_norm_before": False, "ffn_dim": 4096, "hidden_size": 1024, "num_attention_heads": 16,
        "num_hidden_layers": 24, "word_embed_proj_dim": 512,
    },
    "xglm_564m": {
        "activation_dropout": 0, "activation_function": "gelu", "attention_dropout": 0.1, "attention_heads": 16,
        "bos_token_id": 0, "d_model": 1024, "decoder_start_token_id": 2, "dropout": 0.1, "eos_token_id": 2,
        "ffn_dim": 4096, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "xglm",
        "num_layers": 24, "pad_token_id": 1, "scale_embedding": True, "vocab_size": 256008,
    },
    "gpt2": {
        "activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1,
        "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "llama3.1_8b": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008],
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
            "original_max_position_embeddings": 8192,
        },
        "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
    },
    "mixtral_8x7b": {
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "olmoe_1b_7b": {
        "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None, "eos_token_id": 50279,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 1024,
        "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
        "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "vocab_size": 50304,
    },
    "qwen3_30b_a3b": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "dots_llm1": {
        "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 151643, "first_k_dense_replace": 1,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 10944,
        "max_position_embeddings": 32768, "model_type": "dots1", "moe_intermediate_size": 1408,
        "moe_layer_freq": 1, "n_routed_experts": 128, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6, "num_hidden_layers": 62,
        "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "rope_theta": 10000000, "routed_scaling_factor": 2.5,
        "scoring_func": "noaux_tc", "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 152064,
    },
}  # fmt: skip
# parameters in all, in billions, as their makers state them
SIZES = {
    "opt_125m": 0.125, "opt_350m": 0.331, "xglm_564m": 0.564, "gpt2": 0.124, "llama3.1_8b": 8.03,
    "mixtral_8x7b": 46.7, "olmoe_1b_7b": 6.92, "qwen3_30b_a3b": 30.5, "dots_llm1": 142.8,
}  # fmt: skip


def read(name: str, folder: Path) -> ModelConfig:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_COMMON | PUBLISHED[name]))
    return read_config(folder)[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_is_known_and_the_size_is_theirs(name: str, tmp_path: Path) -> None:
    model = read(name, tmp_path / name)
    assert count_params(model).total / 1e9 == pytest.approx(SIZES[name], rel=0.01)


@pytest.mark.parametrize("name", ["opt_125m", "opt_350m", "xglm_564m"])
def test_they_are_our_presets(name: str, tmp_path: Path) -> None:
    """The shapes that the presets state were written down on their own."""
    preset = compose([f"model={name}", "data.seq_len=64"]).model
    assert read(name, tmp_path / name) == preset


def test_details(tmp_path: Path) -> None:
    llama = read("llama3.1_8b", tmp_path / "llama")
    assert llama.rope_scaling == RopeScalingConfig("llama3", 8.0, 1.0, 4.0, 8192)
    assert (llama.rope_theta, llama.norm_eps) == (500000.0, 1e-5)
    qwen = read("qwen3_30b_a3b", tmp_path / "qwen")
    assert (qwen.head_width, qwen.expert_width, qwen.qk_norm) == (128, 768, "head")
    assert len(qwen.moe_layers) == 48
    dots = read("dots_llm1", tmp_path / "dots")
    assert dots.moe is not None
    assert dots.moe_layers == tuple(range(1, 62))
    assert (dots.moe.scores, dots.moe.weight_scale, dots.moe.shared_d_ff) == ("sigmoid", 2.5, 2816)
    assert (dots.moe.num_groups, dots.moe.normalize_weights) == (None, True)
    unread = {"max_window_layers": None, "n_group": None, "topk_group": None}  # without a window and groups
    (tmp_path / "dots" / "config.json").write_text(json.dumps(_COMMON | PUBLISHED["dots_llm1"] | unread))
    assert read_config(tmp_path / "dots")[1] == dots
    gpt2 = read("gpt2", tmp_path / "gpt2")
    assert (gpt2.activation, gpt2.d_ff, gpt2.position_offset) == ("gelu_tanh", 3072, 0)
