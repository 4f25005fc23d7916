"""Configurations of the dense families, in both directions: OPT, XGLM, GPT-2 and Llama."""

from __future__ import annotations

from typing import Any

from moe.config import ModelConfig, RopeScalingConfig
from moe.interop.hf.keys import Keys

ACTIVATIONS = {  # transformers' names; exports use the first of several for one function
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
LAYER_NORM_EPS = 1e-5  # OPT and XGLM have no key for it
FAIRSEQ_OFFSET = 2  # of their position tables, where fairseq keeps <s> and padding


def activation_of(keys: Keys, name: str, default: str) -> str:
    """Our name of an activation. Raises ValueError for an unsupported one."""
    value = keys.get(name, default)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(f"{keys.origin}: {name} ({value!r}) is not supported; supported are: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def their_activation(activation: str) -> str:
    """transformers' name of our activation."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)


def needs(model: ModelConfig, **wanted: Any) -> list[str]:
    """What a family cannot express of a model: "norm is 'rmsnorm', not 'layernorm'"."""
    found = {name: getattr(model, name) for name in wanted}
    return [f"{name} is {found[name]!r}, not {value!r}" for name, value in wanted.items() if found[name] != value]


def read_opt(keys: Keys) -> dict[str, Any]:
    """OPT of any size, including the 350m variant's post-norm and narrow embeddings."""
    before = keys.flag("do_layer_norm_before", True)
    reason = "the models before transformers 4.20 without a final norm are not expressed"
    keys.only("_remove_final_layer_norm", (False, not before), reason)
    keys.only("layer_norm_elementwise_affine", True, "norms without weights are not expressed")
    keys.only("activation_dropout", 0.0, "dropout inside the feed-forward network is not expressed")
    keys.only("layerdrop", 0.0, "layer dropping in training is not expressed")
    width = keys.integer("hidden_size", 768)
    embedding = keys.integer("word_embed_proj_dim", None)
    return {
        "d_model": width,
        "d_ff": keys.integer("ffn_dim", 3072),
        "num_layers": keys.integer("num_hidden_layers", 12),
        "num_heads": keys.integer("num_attention_heads", 12),
        "max_seq_len": keys.integer("max_position_embeddings", 2048),
        "vocab_size": keys.integer("vocab_size", 50272),
        "embedding_dim": None if embedding in (None, width) else embedding,
        "norm_position": "pre" if before else "post",
        "position": "learned",
        "position_offset": FAIRSEQ_OFFSET,
        "activation": activation_of(keys, "activation_function", "relu"),
        "bias": keys.flag("enable_bias", True),
        "tie_embeddings": keys.flag("tie_word_embeddings", True),
        "dropout": keys.number("dropout", 0.1),
        "attention_dropout": keys.number("attention_dropout", 0.0),
        "init_std": keys.number("init_std", 0.02),
    }


def opt_lacks(model: ModelConfig) -> list[str]:
    """Why OPT cannot express this model; empty if it can."""
    return _fairseq_lacks(model, position="learned", scale_embeddings=False)


def write_opt(model: ModelConfig) -> dict[str, Any]:
    """config.json of a model that OPT can express."""
    return {
        **_fairseq_keys(model),
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "do_layer_norm_before": model.norm_position == "pre",
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": model.embedding_width,
        "enable_bias": model.bias,
        "layer_norm_elementwise_affine": True,
    }


def read_xglm(keys: Keys) -> dict[str, Any]:
    """XGLM, which also covers the paper's dense models."""
    keys.only("add_cross_attention", False, "cross-attention is not expressed")
    keys.only("activation_dropout", 0.0, "dropout inside the feed-forward network is not expressed")
    keys.only("layerdrop", 0.0, "layer dropping in training is not expressed")
    padding = keys.integer("pad_token_id", None)
    if padding is not None and padding >= FAIRSEQ_OFFSET:
        raise ValueError(
            f"{keys.origin}: pad_token_id ({padding}) is not supported: XGLM zeroes the embedding of the position "
            f"with that number, and those from {FAIRSEQ_OFFSET} on are in use; it must be below that, or null"
        )
    return {
        "d_model": keys.integer("d_model", 1024, "hidden_size"),
        "d_ff": keys.integer("ffn_dim", 4096),
        "num_layers": keys.integer("num_layers", 24, "num_hidden_layers"),
        "num_heads": keys.integer("attention_heads", 16, "num_attention_heads"),
        "max_seq_len": keys.integer("max_position_embeddings", 2048),
        "vocab_size": keys.integer("vocab_size", 256008),
        "position": "sinusoidal",
        "position_offset": FAIRSEQ_OFFSET,
        "activation": activation_of(keys, "activation_function", "gelu"),
        "tie_embeddings": keys.flag("tie_word_embeddings", True),
        "scale_embeddings": keys.flag("scale_embedding", True),
        "dropout": keys.number("dropout", 0.1),
        "attention_dropout": keys.number("attention_dropout", 0.1),
        "init_std": keys.number("init_std", 0.02),
    }


def xglm_lacks(model: ModelConfig) -> list[str]:
    """Why XGLM cannot express this model; empty if it can."""
    reasons = _fairseq_lacks(model, position="sinusoidal", norm_position="pre", bias=True)
    return reasons + needs(model, embedding_width=model.d_model)


def write_xglm(model: ModelConfig) -> dict[str, Any]:
    """config.json of a model that XGLM can express."""
    return {
        **_fairseq_keys(model),
        "d_model": model.d_model,
        "num_layers": model.num_layers,
        "attention_heads": model.num_heads,
        "activation_dropout": 0.0,
        "scale_embedding": model.scale_embeddings,
        "add_cross_attention": False,
    }


def read_gpt2(keys: Keys) -> dict[str, Any]:
    """GPT-2 of any size."""
    keys.only("scale_attn_weights", True, "attention is always scaled here")
    keys.only("scale_attn_by_inverse_layer_idx", False, "attention is scaled alike in all layers here")
    keys.only("add_cross_attention", False, "cross-attention is not expressed")
    keys.ignore("reorder_and_upcast_attn", "n_ctx")  # the first affects rounding only, the second repeats n_positions
    keys.ignore(*(f"summary_{name}" for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")))
    dropout = keys.number("resid_pdrop", 0.1)
    keys.only(
        "embd_pdrop", dropout, f"one dropout serves embeddings and layers here, and resid_pdrop is {dropout}", 0.1
    )
    width, inner = keys.integer("n_embd", 768, "hidden_size"), keys.integer("n_inner", None)
    return {
        "d_model": width,
        "d_ff": 4 * width if inner is None else inner,
        "num_layers": keys.integer("n_layer", 12, "num_hidden_layers"),
        "num_heads": keys.integer("n_head", 12, "num_attention_heads"),
        "max_seq_len": keys.integer("n_positions", 1024, "max_position_embeddings"),
        "vocab_size": keys.integer("vocab_size", 50257),
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "position": "learned",
        "activation": activation_of(keys, "activation_function", "gelu_new"),
        "tie_embeddings": keys.flag("tie_word_embeddings", True),
        "dropout": dropout,
        "attention_dropout": keys.number("attn_pdrop", 0.1),
        "init_std": keys.number("initializer_range", 0.02),
    }


def gpt2_lacks(model: ModelConfig) -> list[str]:
    """Why GPT-2 cannot express this model; empty if it can."""
    reasons = needs(model, position="learned", position_offset=0, norm_position="pre", bias=True)
    return reasons + _plain_lacks(model) + needs(model, embedding_width=model.d_model, scale_embeddings=False)


def write_gpt2(model: ModelConfig) -> dict[str, Any]:
    """config.json of a model that GPT-2 can express."""
    return {
        "vocab_size": model.vocab_size,
        "n_positions": model.max_seq_len,
        "n_embd": model.d_model,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.d_ff,
        "activation_function": their_activation(model.activation),
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.attention_dropout,
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.init_std,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": model.tie_embeddings,
    }


def read_llama(keys: Keys) -> dict[str, Any]:
    """Llama of any size, including the extended contexts of 3.1 and later."""
    keys.only("mlp_bias", False, "a gate with a bias is not expressed")
    keys.ignore("pretraining_tp")  # only changes the order of additions
    return {
        **read_llama_attention(keys, norm_eps=1e-6),
        "d_ff": keys.integer("intermediate_size", 11008),
        "head_dim": head_dim(keys),
    }


def llama_lacks(model: ModelConfig) -> list[str]:
    """Why Llama cannot express this model; empty if it can."""
    return llama_attention_lacks(model, qk_norm=None) + needs(model, moe=None)


def write_llama(model: ModelConfig) -> dict[str, Any]:
    """config.json of a model that Llama can express."""
    return {
        **write_llama_attention(model),
        "intermediate_size": model.d_ff,
        "head_dim": model.head_width,
        "mlp_bias": False,
    }


def read_llama_attention(keys: Keys, *, norm_eps: float, theta: float = 10000.0, **default: int) -> dict[str, Any]:
    """What Llama and the modern sparse families have in common: all but the feed-forward part and the head width."""
    keys.only("attention_bias", False, "biases in attention alone are not expressed")
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32} | default
    keys.only("tie_encoder_decoder", False, "there is no encoder")
    length = keys.integer("max_position_embeddings", default.get("max_position_embeddings", 2048))
    base, scaling = _rope(keys, theta, length)
    return {
        "d_model": keys.integer("hidden_size", sizes["hidden_size"]),
        "num_layers": keys.integer("num_hidden_layers", sizes["num_hidden_layers"]),
        "num_heads": keys.integer("num_attention_heads", sizes["num_attention_heads"]),
        "num_kv_heads": _kv_heads(keys, default.get("num_key_value_heads")),
        "max_seq_len": length,
        "vocab_size": keys.integer("vocab_size", sizes["vocab_size"]),
        "norm": "rmsnorm",
        "norm_eps": keys.number("rms_norm_eps", norm_eps),
        "position": "rope",
        "rope_theta": base,
        "rope_scaling": scaling,
        "activation": activation_of(keys, "hidden_act", "silu"),
        "gated": True,
        "bias": False,
        "tie_embeddings": keys.flag("tie_word_embeddings", False),
        "attention_dropout": keys.number("attention_dropout", 0.0),
        "init_std": keys.number("initializer_range", 0.02),
    }


def _kv_heads(keys: Keys, default: int | None) -> int | None:
    """None, also given as null, means as many as there are heads."""
    if keys.get("num_key_value_heads", default) is None:
        return None
    count: int = keys.integer("num_key_value_heads", default)
    return count


def head_dim(keys: Keys) -> int | None:
    """The head width; None if it is hidden_size / num_attention_heads, which `read_llama_attention` reads."""
    width: int | None = keys.integer("head_dim", None)
    usual = keys.get("hidden_size", None), keys.get("num_attention_heads", None)
    return None if width is not None and None not in usual and width * usual[1] == usual[0] else width


def llama_attention_lacks(model: ModelConfig, *, qk_norm: str | None) -> list[str]:
    """What none of the families with Llama's attention can express."""
    reasons = needs(model, norm="rmsnorm", norm_position="pre", position="rope", gated=True, bias=False)
    return reasons + needs(model, qk_norm=qk_norm, embedding_width=model.d_model, scale_embeddings=False)


def write_llama_attention(model: ModelConfig) -> dict[str, Any]:
    """The keys of `read_llama_attention`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        scaling = model.rope_scaling
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": their_activation(model.activation),
        "max_position_embeddings": model.max_seq_len,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_parameters": rope,
        "attention_bias": False,
        "attention_dropout": model.attention_dropout,
    }


def _rope(keys: Keys, theta: float, max_seq_len: int) -> tuple[float, RopeScalingConfig | None]:
    """The base and the scaling, from transformers 5's rope_parameters or the two keys that preceded it."""
    base = keys.number("rope_theta", theta)
    tables = {name: keys.get(name, None) or {} for name in ("rope_scaling", "rope_parameters")}
    named = "rope_scaling" if tables["rope_scaling"] else "rope_parameters"
    origin = f"{keys.origin}: {named}"
    if not isinstance(tables[named], dict):
        raise ValueError(f"{origin} ({tables[named]!r}) must be an object, or null for none")
    if all(tables.values()) and tables["rope_scaling"] != tables["rope_parameters"]:
        raise ValueError(f"{origin} and rope_parameters are both given and differ ({tables}): remove the wrong one")
    given = dict(tables[named])
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    base = _pop(given, "rope_theta", origin) if "rope_theta" in given else base
    partial = given.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ValueError(
            f"{origin}.partial_rotary_factor ({partial}) is not supported: it must be 1, since whole heads are rotated"
        )
    scaling = None
    if kind == "linear":
        scaling = RopeScalingConfig("linear", _pop(given, "factor", origin))
    elif kind == "llama3":
        given.setdefault("original_max_position_embeddings", max_seq_len)
        scaling = RopeScalingConfig(
            "llama3",
            _pop(given, "factor", origin),
            _pop(given, "low_freq_factor", origin),
            _pop(given, "high_freq_factor", origin),
            int(_pop(given, "original_max_position_embeddings", origin)),
        )
    elif kind != "default":
        raise ValueError(f"{origin}: rope_type ({kind!r}) is not supported; supported are: default, linear, llama3")
    if given:
        raise ValueError(
            f"{origin}.{min(given)} ({given[min(given)]!r}) is not known for rope_type {kind!r}; remove it if it does "
            f"not change the model"
        )
    return base, scaling


def _pop(given: dict[str, Any], name: str, origin: str) -> float:
    if not isinstance(given.get(name), (int, float)):
        raise ValueError(f"{origin}.{name} ({given.get(name)!r}) must be a number")
    return float(given.pop(name))


def _plain_lacks(model: ModelConfig) -> list[str]:
    """What none of the pre-Llama families can express."""
    reasons = needs(model, norm="layernorm", gated=False, qk_norm=None, moe=None, kv_heads=model.num_heads)
    if model.head_width * model.num_heads != model.d_model:
        reasons.append(f"head_dim is {model.head_width}, not d_model / num_heads")
    return reasons


def _fairseq_lacks(model: ModelConfig, **wanted: Any) -> list[str]:
    wanted |= {"position_offset": FAIRSEQ_OFFSET, "norm_eps": LAYER_NORM_EPS}
    return needs(model, **wanted) + _plain_lacks(model)


def _fairseq_keys(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "ffn_dim": model.d_ff,
        "max_position_embeddings": model.max_seq_len,
        "activation_function": their_activation(model.activation),
        "dropout": model.dropout,
        "attention_dropout": model.attention_dropout,
        "layerdrop": 0.0,
        "init_std": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }
