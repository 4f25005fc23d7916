from .expert_choice_router import ExpertChoiceRouter
from .experts import Experts
from .feed_forward import FeedForward
from .gshard_router import GShardRouter
from .moe import MoE
from .router import Router, TopKRouter
from .router_losses import (
    RoutingStatistics,
    gshard_load_balance_loss,
    load_balance_loss,
    router_z_loss,
    routing_statistics,
)
from .routing import Routing, load_routings, save_routings

__all__ = [
    "ExpertChoiceRouter",
    "Experts",
    "FeedForward",
    "GShardRouter",
    "MoE",
    "Router",
    "Routing",
    "RoutingStatistics",
    "TopKRouter",
    "gshard_load_balance_loss",
    "load_balance_loss",
    "load_routings",
    "router_z_loss",
    "routing_statistics",
    "save_routings",
]
