from .op import keep_within_capacity, top_k_experts

__all__ = ["keep_within_capacity", "top_k_experts"]
