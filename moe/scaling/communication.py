"""Bytes on the wire in closed form."""

from __future__ import annotations

from fractions import Fraction


def all_to_all_bytes(
    num_tokens: int, d_model: int, top_k: int, *, num_ranks: int, element_bytes: int, training: bool
) -> int:
    """Bytes that one rank sends for one MoE layer under expert parallelism, at even load.

    A share (P-1)/P of its T·K rows belongs to experts of other ranks. They travel to the experts and back, and with
    `training` their gradients do too: two all-to-alls forward, two backward (moe_lm.md 4.6).
    """
    passes = 4 if training else 2
    leaving = Fraction(num_ranks - 1, num_ranks) * num_tokens * top_k
    return round(passes * leaving * d_model * element_bytes)
