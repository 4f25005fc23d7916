"""Bytes in closed form: what a sparse layer keeps for its backward pass, and what it moves."""

from __future__ import annotations


def moe_activation_bytes(
    num_tokens: int,
    d_model: int,
    d_ff: int,
    num_experts: int,
    top_k: int,
    *,
    element_bytes: int,
    router_bytes: int = 4,
) -> int:
    """Bytes that a dropless MoE layer on the torch path keeps between forward and backward, parameters left out.

    Of R = T·K rows: their inputs (R, D) and outputs (R, D), the pre-activations (R, F), and beside them the gate's or
    the activations (R, F); of T tokens the input (T, D) and the router's probabilities (T, E); indices and normalised
    weights of the choices. A test measures the same with torch's saved_tensors_hooks.
    """
    rows = num_tokens * top_k
    of_rows = rows * 2 * (d_model + d_ff) * element_bytes
    router_input = num_tokens * d_model * router_bytes  # the input itself where it has the router's dtype
    if element_bytes != router_bytes:
        router_input += num_experts * d_model * router_bytes  # and a copy of the router's weight
    of_choices = rows * (5 * _INDEX_BYTES + 2 * router_bytes + 1)  # row order and expert; weights; whether it is kept
    of_tokens = num_tokens * (_INDEX_BYTES + (num_experts + 2) * router_bytes)  # first slot; probabilities and two sums
    return of_rows + router_input + of_choices + of_tokens + (num_experts + 1) * _INDEX_BYTES


_INDEX_BYTES = 8  # int64


def permutation_bytes(num_tokens: int, d_model: int, top_k: int, *, element_bytes: int, training: bool) -> int:
    """Bytes read and written to bring tokens to their experts' rows and back, each pass over memory counted once.

    Forward: gather reads and writes R rows; combine reads R rows and writes T. Backward: the same once more for either,
    and the product of each row with its gradient, which is the gradient of its weight.
    """
    rows = num_tokens * top_k
    gather, combine = 2 * rows, rows + num_tokens
    passes = gather + combine
    if training:
        passes += (rows + num_tokens) + (3 * rows + num_tokens)
    return passes * d_model * element_bytes
