from .op import NonFiniteScoresError, keep_within_capacity, require_finite, top_k_experts

__all__ = ["NonFiniteScoresError", "keep_within_capacity", "require_finite", "top_k_experts"]
