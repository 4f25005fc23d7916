"""Parameter counts in closed form; a test checks that they equal the modules'."""

from __future__ import annotations

from typing import NamedTuple

from moe.config import ModelConfig


class ParamCount(NamedTuple):
    """Parameters of one model."""

    total: int
    active: int  # touched by one token: top_k experts of each MoE layer instead of all
    shared: int  # outside the experts
    expert: int  # in all experts of all layers


def count_params(model: ModelConfig) -> ParamCount:
    """Count the parameters of `model`, whose vocab_size must be set. A tied embedding counts once."""
    parts = component_params(model)
    shared = parts.total - parts.experts
    active = shared
    if model.moe is not None:
        active += parts.experts // model.moe.num_experts * model.moe.top_k
    return ParamCount(total=parts.total, active=active, shared=shared, expert=parts.experts)


class ComponentParams(NamedTuple):
    """Parameters of one model, by component."""

    embedding: int  # with learned positions, and the projections of an embedding narrower than the model
    attention: int
    norms: int
    dense_ffn: int
    experts: int
    shared_experts: int  # the networks beside the experts, with their gates
    routers: int
    head: int  # 0 if tied to the embedding

    @property
    def total(self) -> int:
        return sum(self)


def component_params(model: ModelConfig) -> ComponentParams:
    """The parameters counted by `count_params`, by component. model.vocab_size must be set."""
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is null: set it to count the parameters")
    d, width, layers, sparse = model.d_model, model.embedding_width, model.num_layers, len(model.moe_layers)
    positions = (model.max_seq_len + model.position_offset) * d if model.position == "learned" else 0
    num_experts = 0 if model.moe is None else model.moe.num_experts
    expert = ffn_params(d, model.expert_width, gated=model.gated, bias=model.bias)
    return ComponentParams(
        embedding=model.vocab_size * width + positions + (2 * width * d if width != d else 0),
        attention=layers * _attention(model),
        norms=(2 * layers + (model.norm_position == "pre")) * _norm(model),
        dense_ffn=(layers - sparse) * ffn_params(d, model.d_ff, gated=model.gated, bias=model.bias),
        experts=sparse * num_experts * expert,
        shared_experts=sparse * shared_expert_params(model),
        routers=sparse * num_experts * d,
        head=0 if model.tie_embeddings else model.vocab_size * width,
    )


def ffn_params(d_model: int, d_ff: int, *, gated: bool, bias: bool) -> int:
    """Parameters of one feed-forward network or one expert."""
    return (3 if gated else 2) * d_model * d_ff + (d_ff + d_model if bias else 0)


def shared_expert_params(model: ModelConfig) -> int:
    """Parameters of one MoE layer's shared network, with its gate; 0 if there is none."""
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
