"""What a plan finds: every layout that runs, what each needs, and the way out where none fits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from moe.compose import compose_top
from moe.config import RunConfig
from moe.config.cluster import PlanConfig
from moe.launch import check_layout
from moe.scaling.memory import plan_memory
from moe.scaling.planner import Plan, make_load, make_plan, mfu, run_config, with_layout
from moe.scaling.routing_load import RoutingLoad
from moe.scaling.step_time import step_time
from tests.moe.scaling.filling_load import Filling

SMALL = ["model=125m", "cluster=a100_40gb", "train.batch_tokens=262144"]


def configured(*overrides: str) -> PlanConfig:
    return compose_top("plan", PlanConfig, list({each.split("=")[0]: each for each in overrides}.values()))


def planned(*overrides: str) -> Plan:
    return make_plan(configured(*overrides), check_layout)


def test_layouts_are_exactly_those_that_are_accepted() -> None:
    """Against every product of axes, recompute, offload and precision, tried one by one."""
    config = configured(*SMALL, "+moe=16e", "train.micro_batch_size=4")
    run, expected = run_config(config), set()
    for copies in range(1, 9):
        for shards in range(1, 9):
            for ep_size in range(1, 9):
                parallel = replace(run.parallel, dp_replicate=copies, ep_size=ep_size)
                if copies * shards * ep_size == 8:
                    try:
                        check_layout(replace(run, parallel=parallel), 8)
                    except ValueError:
                        continue
                    expected.add((copies, shards, ep_size))
    plan = make_plan(config, check_layout)
    assert {(e.layout.dp_replicate, e.layout.dp_shard, e.layout.ep_size) for e in plan.layouts} == expected
    assert len(plan.layouts) == len(expected) * 2 * 2 * 3  # recompute, offload, precisions
    assert len(expected) == 10


def test_what_parallelize_refuses_is_no_layout() -> None:
    """768 and 3072 rows of an expert cannot be divided by 5; the reason is kept."""
    plan = planned("model=125m", "+moe=16e", "cluster=a100_40gb", "cluster.num_gpus=5", "train.batch_tokens=20480")
    assert {(e.layout.dp_replicate, e.layout.dp_shard) for e in plan.layouts} == {(5, 1)}
    assert any("cannot be divided" in reason or "must be divisible by the 5 ranks" in reason for reason in plan.refused)


def test_memory_and_time_are_those_of_the_closed_forms() -> None:
    plan = planned(*SMALL, "+moe=16e", "plan.ep_size=4", "plan.load=zipf")
    for entry in plan.layouts[:: len(plan.layouts) // 5]:
        layout = entry.layout
        candidate = with_layout(plan.config, layout)
        share = {"sequences": layout.micro_batch_size, "micro_batches": layout.micro_batches}
        load = RoutingLoad("zipf", 16, 4, 2)
        assert make_load(candidate, "zipf") == load
        assert layout.micro_batch_size * layout.micro_batches * 8 == candidate.batch_size
        assert entry.memory == plan_memory(candidate, 8, load, **share)
        if entry.fits:
            assert entry.step == step_time(candidate, plan.cluster, 8, load, **share)


def test_the_best_is_the_fastest_that_is_not_offloaded() -> None:
    plan = planned(*SMALL, "+moe=16e")
    assert plan.best is plan.layouts[0]
    rest = [entry.seconds for entry in plan.layouts if entry.fits and not entry.layout.cpu_offload]
    assert plan.best.seconds <= min(rest) * 1.01  # equal to three digits
    assert plan.best.layout.precision == "bf16"
    assert 0.2 < mfu(plan.config, plan.cluster, plan.best) < plan.cluster.gemm_efficiency


def test_offloading_leaves_activations_alone_on_the_device() -> None:
    plan = planned(*SMALL, "plan.dp_replicate=1", "plan.recompute=true", "plan.precision=bf16")
    by_offload = {
        entry.layout.cpu_offload: entry.memory for entry in plan.layouts if entry.layout.micro_batch_size == 1
    }
    here, there = by_offload[False], by_offload[True]
    assert there.host_bytes == here.param_bytes + here.gradient_bytes + here.optimizer_bytes
    assert there.param_bytes == there.gradient_bytes == there.optimizer_bytes == here.host_bytes == 0
    assert there.peak_bytes < here.peak_bytes


def test_one_device_holds_everything_and_gathers_nothing() -> None:
    plan = planned("model=125m", "cluster=a100_40gb", "cluster.num_gpus=1", "train.batch_tokens=16384")
    assert {(e.layout.dp_replicate, e.layout.dp_shard, e.layout.cpu_offload) for e in plan.layouts} == {(1, 1, False)}
    assert plan.best is not None
    assert plan.best.memory.param_bytes == 4 * 123_658_752
    assert plan.best.step.sharding == 0.0


def test_bounds_of_the_choices_are_kept() -> None:
    plan = planned(
        *SMALL, "plan.recompute=true", "plan.cpu_offload=false", "plan.precision=fp16", "plan.dp_replicate=2"
    )
    kinds = {
        (e.layout.recompute, e.layout.cpu_offload, e.layout.precision, e.layout.dp_replicate) for e in plan.layouts
    }
    assert kinds == {(True, False, "fp16", 2)}
    assert {e.layout.precision for e in planned("model=125m", "cluster=v100_32gb").layouts} == {"fp32", "fp16"}


def test_what_is_short_and_what_would_help() -> None:
    """The 1.1T model: four nodes are too few, the number of devices that the plan names is enough."""
    plan = planned("model=6.7b", "+moe=512e", "cluster=a100_40gb", "cluster.num_gpus=32")
    nearest = plan.layouts[0]
    assert plan.best is None
    assert nearest.missing_bytes == nearest.memory.peak_bytes - plan.cluster.usable_bytes > 0
    assert all(nearest.missing_bytes <= other.missing_bytes + other.missing_host_bytes for other in plan.layouts)
    (more,) = (line for line in plan.advice if line.startswith("cluster.num_gpus="))
    count = int(re.match(r"cluster\.num_gpus=(\d+)", more)[1])
    assert planned("model=6.7b", "+moe=512e", "cluster=a100_40gb", f"cluster.num_gpus={count}").best is not None
    assert planned("model=6.7b", "+moe=512e", "cluster=a100_40gb", f"cluster.num_gpus={count // 2}").best is None
    (larger,) = (line for line in plan.advice if line.startswith("devices of "))
    gib = re.match(r"devices of (\d+) GiB", larger)[1]
    fitting = planned(
        "model=6.7b", "+moe=512e", "cluster=a100_40gb", "cluster.num_gpus=32", f"cluster.memory_gib={gib}"
    )
    assert fitting.best is not None


def test_the_memory_that_would_be_enough_is_enough() -> None:
    """A figure that is rounded down is short of up to half a GiB."""
    cases = [
        ("memory_gib", "devices of ", ["model=6.7b", "+moe=512e", "cluster=v100_32gb", f"cluster.reserved_gib={part}"])
        for part in (0.4, 2.5, 3.5)
    ]
    cases += [
        ("host_memory_gib", "nodes with ", [f"model={name}", "cluster=a100_40gb", "cluster.host_memory_gib=10"])
        for name in ("2.7b", "6.7b", "13b")
    ]
    for field, words, overrides in cases:
        fixed = [*overrides, f"plan.cpu_offload={str(field == 'host_memory_gib').lower()}", "plan.precision=fp16"]
        (larger,) = (line for line in planned(*fixed).advice if line.startswith(words))
        gib = re.search(r"(\d+) GiB", larger)[1]
        assert planned(*fixed, f"cluster.{field}={gib}").best is not None, (overrides, larger)


def test_a_fixed_choice_that_does_not_fit_is_told_to_open() -> None:
    plan = planned("model=13b", "cluster=a100_40gb", "plan.dp_replicate=8", "plan.cpu_offload=false")
    assert plan.best is None
    assert "leave plan.ep_size, dp_replicate" in plan.advice[0]


def test_a_batch_that_the_devices_cannot_divide() -> None:
    plan = planned("model=125m", "cluster=a100_40gb", "cluster.num_gpus=24")
    assert plan.layouts == ()
    assert "1024 sequences" in plan.refused[0]
    assert [line.split(":")[0] for line in plan.advice] == ["train.batch_tokens=2113536", "cluster.num_gpus=16"]
    assert planned("model=125m", "cluster=a100_40gb", "cluster.num_gpus=24", "train.batch_tokens=2113536").best


def test_imbalance_is_shown_and_bounded() -> None:
    plan = planned("model=125m", "+moe=512e", "cluster=a100_40gb", "cluster.num_gpus=64", "plan.ep_size=64")
    uniform, zipf, worst = plan.sensitivity
    assert uniform.rows < zipf.rows < worst.rows
    assert uniform.seconds < zipf.seconds < worst.seconds
    assert uniform.fits and not worst.fits
    assert plan.best is not None and plan.rows_limit is not None
    limited = with_layout(plan.config, plan.best.layout)
    limited = replace(limited, parallel=replace(limited.parallel, rows_limit=plan.rows_limit))
    share = {"sequences": plan.best.layout.micro_batch_size, "micro_batches": plan.best.layout.micro_batches}
    assert plan_memory(limited, 64, make_load(limited, "worst"), **share).peak_bytes <= plan.cluster.usable_bytes
    full = Filling("uniform", 512, 64, 2, plan.rows_limit)
    assert not plan.best.layout.recompute  # every layer keeps the rows that the limit admits
    assert plan_memory(limited, 64, full, **share).peak_bytes <= plan.cluster.usable_bytes
    dense = planned("model=125m", "cluster=a100_40gb")
    assert [outcome.load for outcome in dense.sensitivity] == ["uniform"]


def test_what_is_not_planned_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.ranks_per_node is not planned"):
        planned(*SMALL, "parallel.ranks_per_node=8")
    with pytest.raises(ValueError, match=r"model\.vocab_size is null: a plan reads no tokenizer"):
        planned("cluster=a100_40gb", "data.tokenizer=some.model")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["plan.ep_size=3"], r"plan\.ep_size \* plan\.dp_replicate \(3 \* 1\) must divide cluster\.num_gpus \(8\)"),
        (["plan.ep_size=4", "plan.dp_replicate=4"], r"\(4 \* 4\) must divide"),
        (["plan.ep_size=8", "model.moe.num_experts=12"], r"plan\.ep_size \(8\) must divide .*num_experts \(12\)"),
    ],
)
def test_fixed_axes_that_no_layout_has_are_refused(overrides: list[str], words: str) -> None:
    """Before, nothing could run and nothing said why."""
    with pytest.raises(ValueError, match=words):
        planned(*SMALL, "+moe=16e", *overrides)
    if len(overrides) == 1:
        with pytest.raises(ValueError, match=r"must divide|this model is dense"):
            planned(*SMALL, *overrides)


def test_what_ranks_that_share_experts_refuse_is_no_layout() -> None:
    """A limit of less than one token of each rank ends a step, a fixed capacity without one the start."""
    one_choice = ["plan.recompute=true", "plan.cpu_offload=false", "plan.precision=bf16", "train.micro_batch_size=1"]
    plan = planned(*SMALL, "+moe=16e", *one_choice, "parallel.rows_limit=8")
    assert {entry.layout.ep_size for entry in plan.layouts} == {1, 2, 4}  # of 8 ranks each may send two rows to one
    assert any("rows_limit (8) must be at least" in reason for reason in plan.refused)
    plan = planned(*SMALL, "+moe=16e", *one_choice, "parallel.fixed_capacity=true")
    assert {entry.layout.ep_size for entry in plan.layouts} == {1}
    assert any("this one drops nothing" in reason for reason in plan.refused)


def test_a_run_of_a_plan_is_the_run_it_would_be() -> None:
    run = run_config(configured(*SMALL, "seed=3"))
    assert type(run) is RunConfig
    assert (run.seed, run.model.vocab_size) == (3, 50264)
