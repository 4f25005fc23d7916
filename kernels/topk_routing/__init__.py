from .op import (
    NonFiniteScoresError,
    TopKRouting,
    keep_within_capacity,
    require_finite,
    top_k_experts,
    top_k_routing,
)

__all__ = [
    "NonFiniteScoresError",
    "TopKRouting",
    "keep_within_capacity",
    "require_finite",
    "top_k_experts",
    "top_k_routing",
]
