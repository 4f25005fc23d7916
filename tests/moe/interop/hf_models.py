"""Small models of transformers with random weights, and how they are compared with ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.checkpoint import load_config, load_weights
from moe.model import Transformer

VOCABULARY, LENGTH = 53, 96
SPECIAL = {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 1}


class Case(NamedTuple):
    """A class of transformers and the options of its configuration."""

    model: str
    config: str
    options: dict[str, Any]
    tolerance: float = 1e-9  # of logits in float64, relative to the largest


ROUTED = 1e-6  # their routers are float32 in a float64 model
_ROPE = {"max_position_embeddings": LENGTH, "vocab_size": VOCABULARY, **SPECIAL}


def _fairseq(name: str, **options: Any) -> Case:
    sizes = {"ffn_dim": 22, "max_position_embeddings": LENGTH, "vocab_size": VOCABULARY, "init_std": 0.4}
    return Case(f"{name}ForCausalLM", f"{name}Config", sizes | SPECIAL | options)


def _opt(width: int, heads: int, layers: int, **options: Any) -> Case:
    return _fairseq(
        "OPT", hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers,
        **({"word_embed_proj_dim": width} | options),
    )  # fmt: skip


def _xglm(width: int, heads: int, layers: int, **options: Any) -> Case:
    return _fairseq("XGLM", d_model=width, attention_heads=heads, num_layers=layers, **options)


def _gpt2(width: int, heads: int, layers: int, **options: Any) -> Case:
    sizes = {"n_embd": width, "n_head": heads, "n_layer": layers, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    return Case("GPT2LMHeadModel", "GPT2Config", sizes | SPECIAL | options)


def _modern(name: str, heads: tuple[int, int], tolerance: float, layers: int = 2, **options: Any) -> Case:
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "num_hidden_layers": layers}
    return Case(f"{name}ForCausalLM", f"{name}Config", _ROPE | sizes | options, tolerance)


def _llama(heads: tuple[int, int], **options: Any) -> Case:
    return _modern("Llama", heads, 1e-9, **({"hidden_size": 12, "intermediate_size": 18} | options))


def _mixtral(heads: tuple[int, int], **options: Any) -> Case:
    return _modern("Mixtral", heads, ROUTED, **({"hidden_size": 12, "intermediate_size": 14} | options))


def _olmoe(heads: tuple[int, int], **options: Any) -> Case:
    return _modern("Olmoe", heads, ROUTED, **({"hidden_size": 12, "intermediate_size": 10} | options))


def _qwen3(heads: tuple[int, int], **options: Any) -> Case:
    sizes = {"hidden_size": 10, "intermediate_size": 14, "moe_intermediate_size": 6, "head_dim": 6, "num_experts": 5}
    return _modern("Qwen3Moe", heads, ROUTED, **(sizes | {"num_experts_per_tok": 3} | options))


def _dots1(heads: tuple[int, int], **options: Any) -> Case:
    sizes = {"hidden_size": 10, "intermediate_size": 14, "moe_intermediate_size": 6, "head_dim": 4}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "norm_topk_prob": True}
    return _modern("Dots1", heads, ROUTED, **(sizes | experts | options))


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # of three frequencies one is left, one between and one divided
}
CASES = {
    "opt": _opt(12, 3, 2),
    "opt_untied_gelu": _opt(20, 5, 1, tie_word_embeddings=False, activation_function="gelu"),
    "opt_350m": _opt(12, 2, 3, do_layer_norm_before=False, word_embed_proj_dim=6),
    "opt_no_bias": _opt(14, 7, 1, enable_bias=False, activation_function="gelu_new", word_embed_proj_dim=10),
    "xglm": _xglm(12, 3, 2),
    "xglm_untied_unscaled": _xglm(14, 7, 1, tie_word_embeddings=False, scale_embedding=False),
    "xglm_tanh": _xglm(20, 2, 2, activation_function="gelu_new", pad_token_id=None),
    "gpt2": _gpt2(12, 3, 2),
    "gpt2_untied": _gpt2(20, 5, 1, tie_word_embeddings=False, n_inner=22, layer_norm_epsilon=1e-3),
    "gpt2_relu": _gpt2(14, 2, 3, activation_function="relu"),
    "llama": _llama((3, 1)),
    "llama_tied_head_dim": _llama((4, 2), tie_word_embeddings=True, head_dim=6, rms_norm_eps=1e-3),
    "llama3_scaling": _llama((2, 2), rope_parameters=_LLAMA3, hidden_act="gelu_pytorch_tanh"),
    "llama_linear_scaling": _llama((6, 3), rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}),
    "mixtral": _mixtral((3, 1), num_local_experts=5),
    "mixtral_tied": _mixtral((6, 2), num_local_experts=3, num_experts_per_tok=1, tie_word_embeddings=True),
    "olmoe": _olmoe((3, 1), num_experts=6, num_experts_per_tok=3),
    "olmoe_normalised": _olmoe((2, 2), num_experts=3, num_experts_per_tok=2, norm_topk_prob=True),
    "qwen3_moe": _qwen3((3, 1)),
    "qwen3_moe_every_second": _qwen3((2, 2), layers=4, decoder_sparse_step=2, norm_topk_prob=True),
    "qwen3_moe_first_dense": _qwen3((4, 2), layers=3, mlp_only_layers=[0], tie_word_embeddings=True),
    "dots1": _dots1((3, 1), layers=3, first_k_dense_replace=1, n_group=4, topk_group=2, routed_scaling_factor=2.5),
    "dots1_one_group": _dots1((2, 2), n_shared_experts=2, norm_topk_prob=False),
}
# one of each family, for what need not be tried with all
FAMILIES = ("opt", "opt_350m", "xglm", "gpt2", "llama", "mixtral", "olmoe", "qwen3_moe", "dots1")


def make_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Their model with random numbers in every tensor, norms, biases and balancing biases included."""
    import transformers

    case = CASES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, case.config)(**case.options)
    model = getattr(transformers, case.model)(config).eval()
    scaled = getattr(config, "scale_embedding", False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "embed_positions.weights" in key or "inv_freq" in key:
                continue  # computed, not learned
            is_embedding = any(part in key for part in ("embed", "wte", "wpe"))
            spread = 0.1 if "bias" in key else 1.5 if is_embedding and not scaled else 0.4
            offset = 1.0 if key.endswith("norm.weight") or ".ln_" in key else 0.0
            tensor.copy_(offset + spread * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return model.to(dtype)


def save_theirs(name: str, folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Path:
    """Written by transformers itself."""
    make_model(name, dtype).save_pretrained(folder, **options)
    return folder


def load_theirs(folder: Path, dtype: torch.dtype = torch.float64) -> nn.Module:
    """By AutoModelForCausalLM, strictly, with norms that do not round a float64 model to float32."""
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, trust_remote_code=False, experts_implementation="eager"
    )
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and dtype == torch.float64:
            module.forward = exact_rms_norm.__get__(module)
    return model.eval()


def exact_rms_norm(self: Any, x: Tensor) -> Tensor:
    """Theirs, in the dtype of x: their own is in float32 whatever x is."""
    return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def load_ours(folder: Path, dtype: torch.dtype = torch.float64) -> Transformer:
    """As load_model, in another dtype."""
    config = load_config(folder)
    model = Transformer(config.model, dtype=dtype)
    load_weights(folder, model=model)
    return model.eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """XGLM builds its mask in torch's default dtype, and a float64 model's does not fit float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def expected_dtype(theirs: Any) -> torch.dtype:
    return next(theirs.parameters()).dtype


def some_tokens(rows: int = 3, length: int = 31) -> Tensor:
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def assert_same_logits(ours: Transformer, theirs: Any, tolerance: float) -> None:
    tokens = some_tokens()
    with default_dtype(expected_dtype(theirs)):
        expected = theirs(tokens).logits
    actual = ours(tokens).logits
    assert actual is not None
    assert actual.dtype == expected.dtype
    scale = float(expected.abs().max())
    assert scale > 0.1, "a reference near zero compares nothing"
    error = float((actual - expected).abs().max())
    assert error <= tolerance * scale, f"error {error:.3g} at scale {scale:.3g}"
