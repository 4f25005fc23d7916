"""`moe plan`: what a run needs, and how long it takes, on a cluster that you need not have."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, NamedTuple

import typer

from moe.cli.overrides import Overrides


def plan(
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="With cluster=this_machine: measure its rates first.")
    ] = False,
) -> None:
    """Predict parameters, FLOPs, memory, time and the best layout of a run on a cluster, without running anything.

    `moe plan model=6.7b +moe=512e cluster=a100_80gb cluster.num_gpus=512`. To fix a choice, set
    plan.ep_size, plan.dp_replicate, plan.recompute, plan.cpu_offload, plan.precision or train.micro_batch_size.
    """
    from rich.console import Console

    from moe.compose import compose_top
    from moe.config.cluster import PlanConfig
    from moe.launch import check_layout
    from moe.scaling.plan_report import print_plan, to_json
    from moe.scaling.planner import make_plan

    given = list(overrides or [])
    for override in given:
        name, _, value = override.lstrip("+").removeprefix("train.").partition("=")
        if override.lstrip("+").startswith("train.") and name in ("precision", "recompute"):
            raise ValueError(
                f"{override.lstrip('+')} is what a plan chooses: to fix it, set plan.{name}={value} instead"
            )
    config = compose_top("plan", PlanConfig, given)
    if measure:
        if config.cluster.device != "cpu":
            raise ValueError(f"--measure is for cluster=this_machine: {config.cluster.name} is not this computer")
        measured = measure_machine()
        typer.echo(" ".join(f"cluster.{name}={value:.4g}" for name, value in measured._asdict().items()), err=True)
        config = replace(config, cluster=replace(config.cluster, **measured._asdict()))
    found = make_plan(config, check_layout)
    if as_json:
        typer.echo(to_json(found, given))
        return
    print_plan(found, given, Console(), show=config.plan.show)


class MachineRates(NamedTuple):
    """The rates that this computer reaches, named as in a cluster's configuration."""

    tflops_fp32: float
    tflops_bf16: float
    memory_gb_per_second: float
    host_memory_gb_per_second: float


def measure_machine(*, repeats: int = 9, clock: Callable[[], float] = time.perf_counter) -> MachineRates:
    """Measure the rates of this computer's processor with torch's threads, in about a second.

    Times matrix products of the sizes in a small model's layers, and sums of arrays too large for any cache; each is
    the median of `repeats` by `clock`.
    """
    import torch  # no other plan needs it

    def rate(dtype: torch.dtype) -> float:
        a, b = torch.randn(2048, 512, dtype=dtype), torch.randn(512, 2048, dtype=dtype)
        out = torch.empty(2048, 2048, dtype=dtype)
        return 2 * 2048 * 512 * 2048 / _median_seconds(lambda: torch.mm(a, b, out=out), repeats, clock) / 1e12

    x, y = torch.ones(1 << 24), torch.ones(1 << 24)
    out = torch.empty_like(x)
    bandwidth = 3 * 4 * x.numel() / _median_seconds(lambda: torch.add(x, y, out=out), repeats, clock) / 1e9
    return MachineRates(rate(torch.float32), rate(torch.bfloat16), bandwidth, bandwidth)


def _median_seconds(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        started_at = clock()
        run()
        seconds.append(clock() - started_at)
    return statistics.median(seconds)
