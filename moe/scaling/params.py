"""Parameter counts in closed form; a test makes them equal to the modules'."""

from __future__ import annotations

from typing import NamedTuple

from moe.config import ModelConfig


class ParamCount(NamedTuple):
    """Parameters of one model."""

    total: int
    active: int  # touched by one token: top_k experts of each sparse layer instead of all
    shared: int  # outside the experts
    expert: int  # in all experts of all layers


def count_params(model: ModelConfig) -> ParamCount:
    """Count the parameters of `model`, whose vocab_size must be set (moe_lm.md 2). A tied embedding counts once."""
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is null: set it to count the parameters")
    d, width = model.d_model, model.embedding_width
    per_layer = _attention(model) + 2 * _norm(model)
    shared = model.num_layers * per_layer + model.vocab_size * width
    if model.position == "learned":
        shared += (model.max_seq_len + model.position_offset) * d
    if width != d:
        shared += 2 * width * d
    if not model.tie_embeddings:
        shared += model.vocab_size * width
    if model.norm_position == "pre":
        shared += _norm(model)
    sparse = len(model.moe_layers)
    shared += (model.num_layers - sparse) * ffn_params(d, model.d_ff, gated=model.gated, bias=model.bias)
    if model.moe is None:
        return ParamCount(total=shared, active=shared, shared=shared, expert=0)
    shared += sparse * (d * model.moe.num_experts + shared_expert_params(model))  # routers and what all tokens pass
    one_expert = ffn_params(d, model.expert_width, gated=model.gated, bias=model.bias)
    expert = sparse * model.moe.num_experts * one_expert
    active = shared + sparse * model.moe.top_k * one_expert
    return ParamCount(total=shared + expert, active=active, shared=shared, expert=expert)


def ffn_params(d_model: int, d_ff: int, *, gated: bool, bias: bool) -> int:
    """Parameters of one feed-forward network, or of one expert."""
    return (3 if gated else 2) * d_model * d_ff + (d_ff + d_model if bias else 0)


def shared_expert_params(model: ModelConfig) -> int:
    """Parameters of the network beside the experts of one sparse layer, with its gate; 0 where there is none."""
    moe = model.moe
    if moe is None or moe.shared_d_ff is None:
        return 0
    gate = model.d_model if moe.shared_gate else 0
    return gate + ffn_params(model.d_model, moe.shared_d_ff, gated=model.gated, bias=model.bias)


def _attention(model: ModelConfig) -> int:
    query, kv = model.num_heads * model.head_width, model.kv_heads * model.head_width
    count = model.d_model * (query + 2 * kv) + query * model.d_model
    if model.bias:
        count += query + 2 * kv + model.d_model
    if model.qk_norm == "head":
        count += 2 * model.head_width
    elif model.qk_norm == "full":
        count += query + kv
    return count


def _norm(model: ModelConfig) -> int:
    return (2 if model.norm == "layernorm" else 1) * model.d_model
