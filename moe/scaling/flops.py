"""Floating-point operations in closed form. A multiply-add is 2.

`useful` counts what the maths needs: every matrix product, attention as the full S x S square (as torch's counter and
the paper do), and no capacity padding or recomputation. `executed` counts what is computed: with rows that pad a
capacity, without rows that are dropped, and with recomputed layers. `paper` is the formula of Artetxe et al. 2021.
"""

from __future__ import annotations

from typing import NamedTuple

from moe.config import ModelConfig

_BACKWARD = 2  # each product has two in the backward pass, one per factor


class FlopsPerToken(NamedTuple):
    """Useful FLOPs of one token in a sequence of a given length."""

    forward: float
    training: float  # forward and backward


class ComponentFlops(NamedTuple):
    """FLOPs per token, by component."""

    attention_projections: float
    attention_scores: float  # QKᵀ and its product with the values
    dense_ffn: float
    experts: float
    shared_experts: float  # the network beside the experts, with its gate
    router: float
    head: float  # with the projections of an embedding narrower than the model
    permutation: float  # weighting the returned rows: no matrix product, and in no total

    @property
    def total(self) -> float:
        """The sum over all matrix products."""
        return sum(self) - self.permutation


def flops_per_token(model: ModelConfig, seq_len: int) -> FlopsPerToken:
    """Useful FLOPs of `model` per token, in sequences of `seq_len` tokens. model.vocab_size must be set."""
    forward = component_flops(model, seq_len).total
    return FlopsPerToken(forward=float(forward), training=float(forward * (1 + _BACKWARD)))


def component_flops(model: ModelConfig, seq_len: int) -> ComponentFlops:
    """Useful forward FLOPs per token, in sequences of `seq_len` tokens. model.vocab_size must be set."""
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is null: set it to count FLOPs")
    d, width, layers = model.d_model, model.embedding_width, model.num_layers
    query, kv = model.num_heads * model.head_width, model.kv_heads * model.head_width
    moe, sparse = model.moe, len(model.moe_layers)
    experts = shared = router = permutation = 0
    if moe is not None:
        experts = moe.top_k * ffn_flops(d, model.expert_width, gated=model.gated)
        router, permutation = router_flops(d, moe.num_experts), 2 * moe.top_k * d
        if moe.shared_d_ff is not None:
            shared = ffn_flops(d, moe.shared_d_ff, gated=model.gated) + (2 * d if moe.shared_gate else 0)
    return ComponentFlops(
        attention_projections=layers * (2 * d * (query + 2 * kv) + 2 * query * d),
        attention_scores=layers * 4 * seq_len * query,
        dense_ffn=(layers - sparse) * ffn_flops(d, model.d_ff, gated=model.gated),
        experts=sparse * experts,
        shared_experts=sparse * shared,
        router=sparse * router,
        head=2 * width * model.vocab_size + (4 * width * d if width != d else 0),
        permutation=sparse * permutation,
    )


def training_flops(model: ModelConfig, seq_len: int) -> ComponentFlops:
    """Useful FLOPs of forward and backward, per token."""
    return ComponentFlops._make((1 + _BACKWARD) * flops for flops in component_flops(model, seq_len))


def executed_flops(
    model: ModelConfig,
    seq_len: int,
    *,
    recompute: bool,
    rows_per_token: float | None = None,
    head_again: bool = False,
) -> ComponentFlops:
    """FLOPs that a training step computes, per token: forward, backward and recomputation.

    rows_per_token: rows the experts of one MoE layer compute, per token: below top_k if a capacity drops, above if its
    slots are padded. None is top_k. head_again: the head's backward recomputes the logits, as the GPU kernels do, which
    never store them.

    A recomputed layer runs up to the last tensor that its backward reads. That is the input of the last projection,
    unless something after it keeps its result: dropout, a norm after it, the weighting of experts.
    """
    useful = component_flops(model, seq_len)
    again = dict.fromkeys(ComponentFlops._fields, 1.0 if recompute else 0.0)
    again["head"] = 1.0 if head_again else 0.0
    if recompute and model.dropout == 0.0 and model.norm_position == "pre":
        share = 2 / 3 if model.gated else 1 / 2  # all but the output projection
        again["dense_ffn"] = share
        if model.moe is not None and model.moe.shared_d_ff is not None and not model.moe.shared_gate:
            again["shared_experts"] = share
    factor = 1.0
    if model.moe is not None and rows_per_token is not None:
        factor = rows_per_token / model.moe.top_k
    executed = {name: flops * (1 + _BACKWARD + again[name]) for name, flops in useful._asdict().items()}
    executed["experts"] *= factor
    executed["permutation"] *= factor
    return ComponentFlops(**executed)


def ffn_flops(d_model: int, d_ff: int, *, gated: bool) -> int:
    """Useful forward FLOPs of one token in one feed-forward network, or one expert."""
    return 2 * (3 if gated else 2) * d_model * d_ff


def router_flops(d_model: int, num_experts: int) -> int:
    """Useful forward FLOPs of one token's projection to the router logits."""
    return 2 * d_model * num_experts


_OTHER_FORMULA = "flops_per_token counts any model"


def paper_training_flops(model: ModelConfig, num_tokens: float, seq_len: int, *, recompute: bool = True) -> float:
    """The paper's training FLOPs (Artetxe et al. 2021), with V = 50,000 whatever the vocabulary.

    Defined for attention heads with total width d_model, d_ff = 4 d_model, and top-2 experts of that width in half of
    the layers, without shared experts; raises ValueError for others.
    """
    moe = model.moe
    if model.d_ff != 4 * model.d_model or model.gated:
        raise ValueError(
            f"the paper's formula holds for d_ff = 4 * d_model ({4 * model.d_model}) and gated=false, "
            f"not for d_ff {model.d_ff} and gated={str(model.gated).lower()}; {_OTHER_FORMULA}"
        )
    if {model.num_heads * model.head_width, model.kv_heads * model.head_width} != {model.d_model}:
        raise ValueError(
            f"the paper's formula holds for queries, keys and values as wide as model.d_model ({model.d_model}); here "
            f"num_heads * head_dim is {model.num_heads} * {model.head_width}, of {model.kv_heads} key-value heads; "
            f"{_OTHER_FORMULA}"
        )
    if moe is not None and (moe.top_k, moe.moe_every, model.expert_width) != (2, 2, model.d_ff):
        raise ValueError(
            f"the paper's formula holds for top_k=2, moe_every=2 and experts as wide as model.d_ff ({model.d_ff}), not "
            f"for top_k={moe.top_k}, moe_every={moe.moe_every} and a width of {model.expert_width}; {_OTHER_FORMULA}"
        )
    if moe is not None and (moe.shared_d_ff is not None or 2 * len(model.moe_layers) != model.num_layers):
        raise ValueError(
            f"the paper's formula holds for experts in half of the layers without model.moe.shared_d_ff; here "
            f"{len(model.moe_layers)} of {model.num_layers} layers have experts and shared_d_ff is {moe.shared_d_ff}; "
            f"{_OTHER_FORMULA}"
        )
    layers, d, vocab = model.num_layers, model.d_model, 50_000
    passes = 4 if recompute else 3  # forward, twice that for the backward, and the recomputed forward
    dense = 24 * passes * num_tokens * layers * d**2 * (1 + seq_len / (6 * d) + vocab / (16 * layers * d))
    return dense if moe is None else dense + 8 * passes * num_tokens * layers * d**2
