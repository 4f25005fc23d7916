"""The roofline of a step: against a count by hand, against real steps on this processor, and what changes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe.compose import compose, compose_top
from moe.config import RunConfig
from moe.config.cluster import ClusterConfig, PlanConfig
from moe.scaling.flops import executed_flops
from moe.scaling.params import count_params
from moe.scaling.routing_load import RoutingLoad
from moe.scaling.step_time import OPTIMIZER_BYTES, StepTime, step_time

ROOT = Path(__file__).parents[3]
WITHIN = 0.25  # of what is measured


def cluster(name: str = "a100_80gb", **changes: object) -> ClusterConfig:
    return replace(compose_top("plan", PlanConfig, [f"cluster={name}"]).cluster, **changes)


def timed(config: RunConfig, on: ClusterConfig, num_ranks: int, load: str | None = None) -> StepTime:
    moe = config.model.moe
    routing = None
    if load is not None and moe is not None:
        routing = RoutingLoad(load, moe.num_experts, config.parallel.ep_size, moe.top_k)
    return step_time(config, on, num_ranks, routing, sequences=4, micro_batches=1)


DENSE = ["model=1.3b", "train.precision=bf16", "train.batch_tokens=1048576"]
SPARSE = [*DENSE, "+moe=64e", "parallel.ep_size=64"]


def test_the_sum_of_a_dense_step_by_hand() -> None:
    config, on = compose(DENSE), cluster()
    step = timed(config, on, 1)
    flops = executed_flops(config.model, 2048, recompute=False, head_again=True)
    rate, bandwidth = 0.75 * 312e12, 0.85 * 2039e9
    assert step.arithmetic == pytest.approx(flops.total * 4 * 2048 / rate, rel=1e-12)  # every product is bound by it
    assert step.optimizer == pytest.approx(OPTIMIZER_BYTES * count_params(config.model).total / bandwidth, rel=1e-12)
    assert step.all_to_all == step.sharding == step.host == 0.0
    assert step.seconds == sum(step.parts.values())
    assert step.bottleneck == "arithmetic"


def test_each_rate_moves_the_part_that_it_bounds() -> None:
    config, on = compose(SPARSE), cluster(num_gpus=64)
    base = timed(config, on, 64, "uniform")
    halves = {
        "tflops_bf16": "arithmetic",
        "memory_gb_per_second": "optimizer",
        "network_gb_per_second": "all_to_all",
    }
    for field, part in halves.items():
        slower = timed(config, replace(on, **{field: getattr(on, field) / 2}), 64, "uniform")
        assert getattr(slower, part) == pytest.approx(2 * getattr(base, part), rel=0.02), field
        assert slower.seconds > base.seconds
    assert base.all_to_all_link == "across nodes"
    one_node = timed(config, replace(on, gpus_per_node=64), 64, "uniform")
    assert (one_node.all_to_all_link, one_node.all_to_all < base.all_to_all / 5) == ("within nodes", True)


def test_the_bottleneck_is_named_by_what_is_slow() -> None:
    config = compose(SPARSE)
    slow_network = cluster(num_gpus=64, network_gb_per_second=0.5)
    assert timed(config, slow_network, 64, "uniform").bottleneck == "all-to-all across nodes"
    assert timed(config, cluster(num_gpus=64, memory_gb_per_second=20.0), 64, "uniform").bottleneck == (
        "memory bandwidth"
    )
    assert timed(config, cluster(num_gpus=64, latency_microseconds=1e4), 64, "uniform").bottleneck == (
        "latency of collectives"
    )
    offloaded = compose([*SPARSE, "parallel.cpu_offload=true"])
    assert timed(offloaded, cluster(num_gpus=64, host_gb_per_second=0.1), 64, "uniform").bottleneck == (
        "host link and memory"
    )
    assert timed(compose(DENSE), cluster(num_gpus=64, network_gb_per_second=0.05), 64).bottleneck == (
        "sharding across nodes"
    )


def test_what_travels_beside_computation_is_hidden_by_it() -> None:
    config = compose([*SPARSE, "parallel.overlap_parts=1"])
    slow = cluster(num_gpus=64, network_gb_per_second=5.0)
    flat = timed(compose([*SPARSE, "model.moe.num_experts=128"]), slow, 64, "uniform")
    overlapped = timed(compose([*SPARSE, "model.moe.num_experts=128", "parallel.overlap_parts=2"]), slow, 64, "uniform")
    assert 0.45 < overlapped.all_to_all / flat.all_to_all < 1.0
    assert timed(config, cluster(num_gpus=64), 64, "uniform").sharding == 0.0


def test_one_rank_with_most_rows_holds_all_others_up() -> None:
    config, on = compose(SPARSE), cluster(num_gpus=64)
    uniform, zipf, worst = (timed(config, on, 64, load) for load in ("uniform", "zipf", "worst"))
    assert uniform.seconds < zipf.seconds < worst.seconds
    # one expert of 64 takes one row of each token: 32 times its share of two
    assert worst.all_to_all == pytest.approx(32 * uniform.all_to_all, rel=0.01)


def test_rows_of_small_experts_fill_no_tile() -> None:
    many = compose([*DENSE, "+moe=64e", "model.moe.num_experts=4096", "model.expert_d_ff=128"])
    few = compose([*DENSE, "+moe=64e", "model.moe.num_experts=64", "model.expert_d_ff=128"])
    assert timed(many, cluster(), 1).seconds > 1.2 * timed(few, cluster(), 1).seconds


def test_arithmetic_that_a_device_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"v100_32gb has no fast arithmetic of train\.precision=bf16"):
        timed(compose(DENSE), cluster("v100_32gb"), 1)


REAL = {
    "sparse": [
        *("+moe=64e", "model.d_model=256", "model.d_ff=1024", "model.expert_d_ff=512", "model.vocab_size=4096"),
        "train.batch_tokens=1024",
    ],
    "recomputed": [
        *("model.d_model=512", "model.d_ff=2048", "model.num_heads=8", "model.num_layers=6", "model.vocab_size=8192"),
        *("train.batch_tokens=512", "train.recompute=true"),
    ],
}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("name", REAL)
def test_real_steps_take_what_is_planned(name: str) -> None:
    """Time of the processor and memory of a real process, with the rates of this very run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(Path(__file__).with_name("measured_step.py")), *REAL[name]]
    output = subprocess.run(program, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout
    figures = json.loads(output)
    assert figures["planned_seconds"] == pytest.approx(figures["seconds"], rel=WITHIN)
    assert figures["planned_bytes"] == pytest.approx(figures["bytes"], rel=WITHIN)
