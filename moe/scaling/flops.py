"""Floating-point operations in closed form. A multiply-add is 2.

`useful` counts what the mathematics needs: every matrix product, attention as the full S x S square, as the counter
of torch and the paper do, and no capacity padding or recomputation. `paper` is the formula of moe_lm.md 3.1.
"""

from __future__ import annotations

from typing import NamedTuple

from moe.config import ModelConfig

_BACKWARD = 2  # each product has two in the backward pass, one for either factor


class FlopsPerToken(NamedTuple):
    """Useful FLOPs of one token in a sequence of a given length."""

    forward: float
    training: float  # forward and backward


def flops_per_token(model: ModelConfig, seq_len: int) -> FlopsPerToken:
    """Useful FLOPs of `model`, whose vocab_size must be set, per token of sequences of `seq_len` tokens."""
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is null: set it to count FLOPs")
    d, width = model.d_model, model.embedding_width
    query, kv = model.num_heads * model.head_width, model.kv_heads * model.head_width
    attention = 2 * d * (query + 2 * kv) + 2 * query * d + 4 * seq_len * query  # projections; QKᵀ and its values
    head = 2 * width * model.vocab_size + (4 * width * d if width != d else 0)
    sparse = len(model.moe_layers)
    dense_ffn = ffn_flops(d, model.d_ff, gated=model.gated)
    forward = model.num_layers * attention + head + (model.num_layers - sparse) * dense_ffn
    if model.moe is not None:
        expert = ffn_flops(d, model.expert_width, gated=model.gated)
        forward += sparse * (router_flops(d, model.moe.num_experts) + model.moe.top_k * expert)
        if model.moe.shared_d_ff is not None:
            shared = ffn_flops(d, model.moe.shared_d_ff, gated=model.gated) + (2 * d if model.moe.shared_gate else 0)
            forward += sparse * shared
    return FlopsPerToken(forward=float(forward), training=float(forward * (1 + _BACKWARD)))


def ffn_flops(d_model: int, d_ff: int, *, gated: bool) -> int:
    """Useful forward FLOPs of one token in one feed-forward network, or one expert."""
    return 2 * (3 if gated else 2) * d_model * d_ff


def router_flops(d_model: int, num_experts: int) -> int:
    """Useful forward FLOPs of one token's projection to the experts' logits."""
    return 2 * d_model * num_experts


def paper_training_flops(model: ModelConfig, num_tokens: float, seq_len: int, *, recompute: bool = True) -> float:
    """The paper's training FLOPs (moe_lm.md 3.1), with V = 50,000 whatever the vocabulary.

    Defined for d_ff = 4 d_model and top-2 experts of that width in every second layer; raises ValueError for others.
    """
    moe = model.moe
    if model.d_ff != 4 * model.d_model or model.gated:
        raise ValueError(f"the paper's formula wants an ungated d_ff of 4 * d_model, not {model.d_ff}")
    if moe is not None and (moe.top_k, moe.moe_every, model.expert_width) != (2, 2, model.d_ff):
        raise ValueError("the paper's formula wants top_k=2, moe_every=2 and experts as wide as d_ff")
    layers, d, vocab = model.num_layers, model.d_model, 50_000
    passes = 4 if recompute else 3  # forward, two of the backward, forward again
    dense = 24 * passes * num_tokens * layers * d**2 * (1 + seq_len / (6 * d) + vocab / (16 * layers * d))
    return dense if moe is None else dense + 8 * passes * num_tokens * layers * d**2
