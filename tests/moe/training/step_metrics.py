"""What one step of a sparse model logs, for tests of what hears of it."""

from __future__ import annotations

from moe.training.metrics import RouterMetrics, StepMetrics

ROUTER = RouterMetrics(
    layer=1,
    load_max_over_mean=2.0,
    load_cv=0.5,
    entropy=1.0,
    dropped_fraction=0.0,
    dead_experts=0,
    tokens_per_expert=[1, 3],
)
METRICS = StepMetrics(
    step=1,
    tokens=8,
    flops=1e6,
    seconds=0.5,
    cross_entropy=3.0,
    load_balance_loss=1.0,
    router_z_loss=2.0,
    loss=3.1,
    grad_norm=1.0,
    learning_rate=0.1,
    tokens_per_second=16.0,
    skipped=False,
    routers=[ROUTER],
)
