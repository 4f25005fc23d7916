"""Configurations of the sparse families, in both directions: Mixtral, OLMoE, Qwen3-MoE and dots.llm1.

dots.llm1 has DeepSeek-V3's experts with ordinary attention. DeepSeek-V3's own latent attention is not supported.
"""

from __future__ import annotations

from typing import Any

from moe.config import ModelConfig, MoEConfig
from moe.interop.hf.dense_families import (
    head_dim,
    llama_attention_lacks,
    needs,
    read_llama_attention,
    write_llama_attention,
)
from moe.interop.hf.keys import Keys

_BIAS_RATE = 1e-3  # DeepSeek-V3's; no key states it


def read_mixtral(keys: Keys) -> dict[str, Any]:
    """Mixtral: the weights of the chosen experts sum to 1."""
    keys.only("sliding_window", None, "attention sees all that comes before")
    keys.only(
        "router_jitter_noise", 0.0, "theirs changes what the experts see too; only the router's input has it here"
    )
    return {
        **read_llama_attention(
            keys, norm_eps=1e-5, theta=1e6, num_key_value_heads=8, max_position_embeddings=4096 * 32
        ),
        "d_ff": keys.integer("intermediate_size", 14336),
        "head_dim": head_dim(keys),
        "moe": _experts(
            keys.integer("num_local_experts", 8, "num_experts"),
            keys.integer("num_experts_per_tok", 2),
            normalize_weights=True,
            loss=keys.number("router_aux_loss_coef", 0.001),
        ),
    }


def mixtral_lacks(model: ModelConfig) -> list[str]:
    """Why Mixtral cannot express this model; empty if it can."""
    reasons = llama_attention_lacks(model, qk_norm=None) + _every_layer(model)
    return reasons + _router_lacks(model, normalize_weights=True)


def write_mixtral(model: ModelConfig) -> dict[str, Any]:
    """config.json of a model that Mixtral can express."""
    return {
        **_sparse_keys(model),
        "intermediate_size": model.expert_width,
        "head_dim": model.head_width,
        "num_local_experts": _of(model).num_experts,
        "sliding_window": None,
        "router_jitter_noise": 0.0,
    }


def read_olmoe(keys: Keys) -> dict[str, Any]:
    """OLMoE: queries and keys normalised over all heads together."""
    keys.only("clip_qkv", None, "clipped projections are not expressed")
    return {
        **read_llama_attention(
            keys, norm_eps=1e-5, vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=16,
            max_position_embeddings=4096,
        ),
        "d_ff": keys.integer("intermediate_size", 2048),
        "qk_norm": "full",
        "moe": _experts(
            keys.integer("num_experts", 64, "num_local_experts"),
            keys.integer("num_experts_per_tok", 8),
            normalize_weights=keys.flag("norm_topk_prob", False),
            loss=keys.number("router_aux_loss_coef", 0.01),
        ),
    }  # fmt: skip


def olmoe_lacks(model: ModelConfig) -> list[str]:
    """Why OLMoE cannot express this model; empty if it can."""
    reasons = llama_attention_lacks(model, qk_norm="full") + _every_layer(model) + _router_lacks(model)
    if model.head_width * model.num_heads != model.d_model:
        reasons.append(f"head_dim is {model.head_width}, not d_model / num_heads")
    return reasons


def write_olmoe(model: ModelConfig) -> dict[str, Any]:
    """config.json of a model that OLMoE can express."""
    return {
        **_sparse_keys(model),
        "intermediate_size": model.expert_width,
        "num_experts": _of(model).num_experts,
        "norm_topk_prob": _of(model).normalize_weights,
        "clip_qkv": None,
    }


def read_qwen3_moe(keys: Keys) -> dict[str, Any]:
    """Qwen3-MoE: queries and keys normalised per head; every n-th layer sparse."""
    keys.only("use_sliding_window", False, "attention sees all that comes before")
    keys.ignore("sliding_window", "max_window_layers")  # no effect without use_sliding_window
    step, listed = keys.integer("decoder_sparse_step", 1), keys.listed("mlp_only_layers", int, "whole numbers") or []
    if step < 1:
        raise ValueError(f"{keys.origin}: decoder_sparse_step ({step}) must be at least 1")
    fields = read_llama_attention(
        keys, norm_eps=1e-6, vocab_size=151936, hidden_size=2048, num_hidden_layers=24, num_key_value_heads=4,
        max_position_embeddings=32768,
    )  # fmt: skip
    sparse = [i for i in range(fields["num_layers"]) if (i + 1) % step == 0 and i not in listed]
    first = min(sparse, default=0)
    if sparse != [i for i in range(first, fields["num_layers"]) if (i + 1) % step == 0]:
        raise ValueError(
            f"{keys.origin}: mlp_only_layers ({listed!r}) with decoder_sparse_step ({step}) is not supported: "
            f"besides those that decoder_sparse_step makes dense, only the first layers may be"
        )
    return {
        **fields,
        "d_ff": keys.integer("intermediate_size", 6144),
        "expert_d_ff": keys.integer("moe_intermediate_size", 768),
        "head_dim": head_dim(keys),
        "qk_norm": "head",
        "dense_layers": first if listed else 0,
        "moe": _experts(
            keys.integer("num_experts", 128, "num_local_experts"),
            keys.integer("num_experts_per_tok", 8),
            normalize_weights=keys.flag("norm_topk_prob", False),
            loss=keys.number("router_aux_loss_coef", 0.001),
            moe_every=step,
        ),
    }


def qwen3_moe_lacks(model: ModelConfig) -> list[str]:
    """Why Qwen3-MoE cannot express this model; empty if it can."""
    reasons = llama_attention_lacks(model, qk_norm="head") + _router_lacks(model)
    if model.moe is not None and model.moe.moe_every > 1:
        reasons += needs(model, moe_placement="last")
    return reasons


def write_qwen3_moe(model: ModelConfig) -> dict[str, Any]:
    """config.json of a model that Qwen3-MoE can express."""
    return {
        **_sparse_keys(model),
        "intermediate_size": model.d_ff,
        "moe_intermediate_size": model.expert_width,
        "head_dim": model.head_width,
        "num_experts": _of(model).num_experts,
        "norm_topk_prob": _of(model).normalize_weights,
        "decoder_sparse_step": _of(model).moe_every,
        "mlp_only_layers": list(range(model.dense_layers)),
        "use_sliding_window": False,
    }


def read_dots1(keys: Keys) -> dict[str, Any]:
    """dots.llm1: sigmoid scores with a balancing bias, groups, shared experts and dense first layers."""
    keys.only("moe_layer_freq", 1, "every layer after the dense ones is sparse")
    keys.only("scoring_func", ("sigmoid", "noaux_tc"), "dots.llm1 scores by sigmoids")
    keys.only("topk_method", "noaux_tc", "dots.llm1 chooses with a bias")
    keys.only("ep_size", 1, "all experts are in the files")
    width = keys.integer("moe_intermediate_size", 1408)
    groups, shared = keys.integer("n_group", None), keys.integer("n_shared_experts")
    fields = read_llama_attention(
        keys, norm_eps=1e-6, vocab_size=152064, hidden_size=4608, num_hidden_layers=62, num_key_value_heads=32
    )
    _require_full_attention(keys, fields["num_layers"])
    one_group = groups in (None, 1)
    top_groups = keys.get("topk_group", 1) if one_group else keys.integer("topk_group", 1)
    return {
        **fields,
        "d_ff": keys.integer("intermediate_size", 10944),
        "expert_d_ff": width,
        "head_dim": head_dim(keys),
        "qk_norm": "head",
        "dense_layers": keys.integer("first_k_dense_replace", 0),
        "moe": _experts(
            keys.integer("n_routed_experts", None, "num_local_experts", "num_experts"),
            keys.integer("num_experts_per_tok", None),
            normalize_weights=keys.flag("norm_topk_prob", False),
            scores="sigmoid",
            weight_scale=keys.number("routed_scaling_factor", 1.0),
            num_groups=None if one_group else groups,
            top_groups=None if one_group else top_groups,
            bias_balance_rate=_BIAS_RATE,
            shared_d_ff=width * shared,
        ),
    }


def dots1_lacks(model: ModelConfig) -> list[str]:
    """Why dots.llm1 cannot express this model; empty if it can."""
    moe = model.moe
    any_value = ("weight_scale", "shared_d_ff", "num_groups", "top_groups")  # it has keys for these
    own = {} if moe is None else {name: getattr(moe, name) for name in any_value}
    reasons = llama_attention_lacks(model, qk_norm="head") + _router_lacks(model, scores="sigmoid", **own)
    if moe is not None:
        if moe.num_groups is not None and moe.num_experts // moe.num_groups < 2:
            reasons.append(f"groups of {moe.num_experts // moe.num_groups} expert, where it adds the scores of two")
        if moe.moe_every != 1:
            reasons.append(f"moe.moe_every is {moe.moe_every}, not 1")
        if moe.shared_d_ff is None or moe.shared_d_ff % model.expert_width != 0:
            reasons.append(
                f"moe.shared_d_ff is {moe.shared_d_ff}, not a multiple of expert_d_ff ({model.expert_width})"
            )
    return reasons


def write_dots1(model: ModelConfig) -> dict[str, Any]:
    """config.json of a model that dots.llm1 can express."""
    moe = _of(model)
    assert moe.shared_d_ff is not None
    return {
        **_sparse_keys(model),
        "intermediate_size": model.d_ff,
        "moe_intermediate_size": model.expert_width,
        "head_dim": model.head_width,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_d_ff // model.expert_width,
        "n_group": moe.num_groups or 1,
        "topk_group": moe.top_groups or 1,
        "first_k_dense_replace": model.dense_layers,
        "norm_topk_prob": moe.normalize_weights,
        "routed_scaling_factor": moe.weight_scale,
        "sliding_window": None,
        "layer_types": ["full_attention"] * model.num_layers,
    }


def _require_full_attention(keys: Keys, num_layers: int) -> None:
    """dots.llm1 has a window in the layers named by layer_types, or else in those from max_window_layers on."""
    window, first = keys.get("sliding_window", 4096), keys.get("max_window_layers", 62)
    kinds = keys.listed("layer_types", str, "names")
    if kinds is None:
        windowed = window is not None and keys.integer("max_window_layers", 62) < num_layers
    else:
        windowed = any(kind != "full_attention" for kind in kinds)
    if windowed:
        raise ValueError(
            f"{keys.origin}: sliding_window ({window}), max_window_layers ({first}), layer_types ({kinds}) are not "
            f"supported: only attention to all earlier tokens is (full_attention in every layer)"
        )


def _experts(
    num_experts: int | None,
    top_k: int | None,
    *,
    normalize_weights: bool,
    loss: float | None = None,
    moe_every: int = 1,
    **changes: Any,
) -> MoEConfig:
    """The sparse part. loss: router_aux_loss_coef, of a loss that is top_k at perfect balance where ours is 1."""
    if num_experts is None or top_k is None:
        raise ValueError(
            f"config.json must give the number of experts ({num_experts}) and how many a token chooses ({top_k})"
        )
    fields: dict[str, Any] = {
        "router": "topk",
        "scores": "softmax",
        "weight_scale": 1.0,
        "num_groups": None,
        "top_groups": None,
        "bias_balance_rate": None,
        "jitter": None,
        "second_policy": "all",
        "shared_d_ff": None,
        "shared_gate": False,
        "capacity_factor": None,
        "eval_capacity_factor": None,
        "load_balance_weight": 0.0 if loss is None else loss * top_k,
        "load_balance_choices": "all",
        "load_balance_scope": "local",
        "load_balance_reduction": "mean",
        "router_z_loss_weight": 0.0,
    }
    return MoEConfig(
        name=f"{num_experts}e_top{top_k}",
        num_experts=num_experts,
        top_k=top_k,
        moe_every=moe_every,
        normalize_weights=normalize_weights,
        **(fields | changes),
    )


def _of(model: ModelConfig) -> MoEConfig:
    assert model.moe is not None
    return model.moe


def _sparse_keys(model: ModelConfig) -> dict[str, Any]:
    moe = _of(model)
    keys: dict[str, Any] = {**write_llama_attention(model), "num_experts_per_tok": moe.top_k}
    if moe.scores == "softmax":
        keys["router_aux_loss_coef"] = moe.load_balance_weight / moe.top_k
    return keys


def _every_layer(model: ModelConfig) -> list[str]:
    if model.moe is None or len(model.moe_layers) == model.num_layers:
        return []
    return [f"layers {[*model.moe_layers]} of {model.num_layers} are sparse, not all"]


def _router_lacks(model: ModelConfig, **wanted: Any) -> list[str]:
    """What a family's routing cannot express. Training-only settings, such as jitter and capacity, do not matter."""
    if model.moe is None:
        return ["moe is None, a dense model"]
    plain = {"router": "topk", "scores": "softmax", "weight_scale": 1.0, "num_groups": None, "top_groups": None}
    wanted = plain | {"shared_d_ff": None, "shared_gate": False, "eval_capacity_factor": None} | wanted
    found = {name: getattr(model.moe, name) for name in wanted}
    reasons = [
        f"moe.{name} is {found[name]!r}, not {value!r}" for name, value in wanted.items() if found[name] != value
    ]
    has_bias = model.moe.bias_balance_rate is not None
    if has_bias != (wanted["scores"] == "sigmoid"):
        reasons.append(f"the router has {'a' if has_bias else 'no'} balancing bias (moe.bias_balance_rate)")
    return reasons
