from .experts import Experts
from .feed_forward import FeedForward
from .moe import MoE
from .router import GShardRouter, Routing, TopKRouter
from .router_losses import RoutingStatistics, load_balance_loss, router_z_loss, routing_statistics

__all__ = [
    "Experts",
    "FeedForward",
    "GShardRouter",
    "MoE",
    "Routing",
    "RoutingStatistics",
    "TopKRouter",
    "load_balance_loss",
    "router_z_loss",
    "routing_statistics",
]
