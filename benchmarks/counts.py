"""FLOPs and bytes of the rows. Every FLOP count here is checked against torch's counter (bench_flop_counts.py)."""

from __future__ import annotations

from moe.config import ModelConfig
from moe.scaling.flops import ffn_flops, flops_per_token, router_flops
from moe.scaling.memory import moe_activation_bytes, permutation_bytes
from moe.scaling.params import count_params

from .contender import Cost
from .loads import Shape

TRAINING = 3  # forward, and two backward products for each forward product


def experts_forward_flops(num_rows: int, shape: Shape, *, gated: bool) -> int:
    """Forward FLOPs of the experts' networks over `num_rows` rows."""
    return num_rows * ffn_flops(shape.D, shape.F, gated=gated)


def layer_forward_flops(shape: Shape, *, gated: bool) -> int:
    """Forward FLOPs of the whole dropless layer: router and K experts per token."""
    routed = experts_forward_flops(shape.T * shape.K, shape, gated=gated)
    return routed + shape.T * router_flops(shape.D, shape.E)


def dense_forward_flops(shape: Shape, *, gated: bool) -> int:
    """Forward FLOPs of the dense network of equal active FLOPs, with hidden width K·F."""
    return shape.T * ffn_flops(shape.D, shape.K * shape.F, gated=gated)


def head_forward_flops(num_tokens: int, d_model: int, vocab_size: int) -> int:
    """Forward FLOPs of the projection to the vocabulary."""
    return 2 * num_tokens * d_model * vocab_size


def step_flops(config: ModelConfig, num_tokens: int, seq_len: int) -> float:
    """Forward and backward FLOPs of one training step of the model."""
    return flops_per_token(config, seq_len).training * num_tokens


def decode_flops(config: ModelConfig, batch: int, context: int) -> float:
    """FLOPs of one new token for each of `batch` sequences, which then have `context` tokens."""
    return flops_per_token(config, context).forward * batch


def _expert_numbers(shape: Shape, gated: bool) -> int:
    return (3 if gated else 2) * shape.D * shape.F


def layer_cost(
    shape: Shape, *, gated: bool, busy_experts: int, element_bytes: int, note: str = "", formula: bool = False
) -> Cost:
    """Cost of a dropless layer, forward and backward.

    Bytes: the experts in use are read twice, all experts' gradients are written, and rows are permuted. `formula` adds
    the closed-form activation bytes, which are those of the torch path.
    """
    weights = (2 * busy_experts + shape.E) * _expert_numbers(shape, gated) * element_bytes
    moved = permutation_bytes(shape.T, shape.D, shape.K, element_bytes=element_bytes, training=True)
    forward = layer_forward_flops(shape, gated=gated)
    saved = moe_activation_bytes(
        shape.T, shape.D, shape.F, shape.E, shape.K, element_bytes=element_bytes, router_bytes=max(4, element_bytes)
    )
    return Cost(
        flops=TRAINING * forward,
        forward_flops=forward,
        bytes=weights + moved,
        padded_share=0.0,
        saved_formula=saved if formula else None,
        note=note,
    )


def dense_cost(shape: Shape, *, gated: bool, element_bytes: int) -> Cost:
    """Cost of the dense twin: weights read twice and their gradients written; x, y and their gradients moved once."""
    forward = dense_forward_flops(shape, gated=gated)
    numbers = TRAINING * shape.K * _expert_numbers(shape, gated) + 5 * shape.T * shape.D
    return Cost(flops=TRAINING * forward, forward_flops=forward, bytes=numbers * element_bytes)


def experts_cost(num_rows: int, shape: Shape, *, gated: bool, busy_experts: int, element_bytes: int) -> Cost:
    """Cost of the experts alone, on already sorted rows."""
    forward = experts_forward_flops(num_rows, shape, gated=gated)
    numbers = (2 * busy_experts + shape.E) * _expert_numbers(shape, gated) + 5 * num_rows * shape.D
    return Cost(flops=TRAINING * forward, forward_flops=forward, bytes=numbers * element_bytes, padded_share=0.0)


def head_cost(num_tokens: int, d_model: int, vocab_size: int, *, element_bytes: int) -> Cost:
    """Cost of projection and cross-entropy, forward and backward; logits need not exist in memory."""
    forward = head_forward_flops(num_tokens, d_model, vocab_size)
    numbers = TRAINING * vocab_size * d_model + 3 * num_tokens * d_model
    return Cost(flops=TRAINING * forward, forward_flops=forward, bytes=numbers * element_bytes)


def moved_cost(num_bytes: float) -> Cost:
    """Cost of a pure memory operation."""
    return Cost(flops=0.0, bytes=num_bytes)


def step_cost(config: ModelConfig, num_tokens: int, seq_len: int) -> Cost:
    """Cost of a training step in float32 with AdamW.

    Bytes are those of parameters alone: read twice by forward and backward, gradients written, then read by clipping
    and by the update, which reads and writes the parameter and two moments.
    """
    params = count_params(config).total
    return Cost(flops=step_flops(config, num_tokens, seq_len), bytes=4.0 * params * (2 + 3 + 6))


def decode_cost(config: ModelConfig, batch: int, context: int, *, num_busy_experts: int) -> Cost:
    """Cost of one generation step in float32: parameters in use, keys and values are read once."""
    counted = count_params(config)
    assert config.moe is not None
    expert = counted.expert / config.moe.num_experts * num_busy_experts
    keys = 2 * config.num_layers * config.kv_heads * config.head_width * batch * context
    return Cost(flops=decode_flops(config, batch, context), bytes=4.0 * (counted.shared + expert + keys))


def optimizer_bytes(num_params: int) -> float:
    """Bytes of AdamW in float32: gradients read, parameters and two moments read and written."""
    return 4.0 * num_params * 7
