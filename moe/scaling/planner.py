"""Which layouts of a training run fit a cluster and how long they take: all possible ones, from closed forms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from moe.config import RunConfig
from moe.config.cluster import ClusterConfig, PlanConfig
from moe.scaling.activations import row_bytes
from moe.scaling.communication import expert_capacity, plan_exchange, step_rings
from moe.scaling.flops import training_flops
from moe.scaling.links import LinkBytes, step_links
from moe.scaling.memory import RankMemory, layers_with_rows, plan_memory
from moe.scaling.routing_load import RoutingLoad
from moe.scaling.sharding import element_bytes
from moe.scaling.step_time import StepTime, step_time

LOADS = ("uniform", "zipf", "worst")
MOST_TOKENS = 65536  # per rank and micro-batch: beyond it nothing gets faster
HOST_SHARE = 0.9  # of a host's memory, for offloaded state; the rest is for processes and data
Accepts = Callable[[RunConfig, int], object]  # raises ValueError for a layout that cannot run: moe.launch.check_layout


@dataclass(frozen=True)
class Layout:
    """What a plan chooses."""

    dp_replicate: int
    dp_shard: int
    ep_size: int
    recompute: bool
    cpu_offload: bool
    precision: str
    micro_batch_size: int  # sequences per rank
    micro_batches: int

    def overrides(self) -> list[str]:
        """As overrides for train.py."""
        return [
            f"parallel.ep_size={self.ep_size}",
            f"parallel.dp_replicate={self.dp_replicate}",
            f"parallel.cpu_offload={str(self.cpu_offload).lower()}",
            f"train.recompute={str(self.recompute).lower()}",
            f"train.precision={self.precision}",
            f"train.micro_batch_size={self.micro_batch_size}",
        ]


@dataclass(frozen=True)
class LayoutPlan:
    """One layout, its memory per rank and its step time."""

    layout: Layout
    memory: RankMemory
    missing_bytes: int  # on a device; 0 if it fits
    missing_host_bytes: int  # on a node
    step: StepTime | None  # None if it does not fit

    @property
    def fits(self) -> bool:
        return self.missing_bytes == self.missing_host_bytes == 0

    @property
    def seconds(self) -> float:
        assert self.step is not None
        return self.step.seconds


@dataclass(frozen=True)
class Outcome:
    """One layout under one load."""

    load: str
    rows: int  # received by the fullest rank's experts, per layer and micro-batch
    peak_bytes: int
    fits: bool
    seconds: float  # per step
    bottleneck: str


@dataclass(frozen=True)
class Plan:
    """Every layout that can run, best first; if none fits, smallest shortfall first."""

    config: RunConfig
    cluster: ClusterConfig
    layouts: tuple[LayoutPlan, ...]
    refused: tuple[str, ...]  # why others cannot run, without duplicates
    sensitivity: tuple[Outcome, ...]  # the best layout under each load
    rows_limit: int | None  # parallel.rows_limit that makes the best fit any load; None: not needed, or none does
    links: dict[str, LinkBytes]  # bytes a rank sends per step in the best layout
    advice: tuple[str, ...]  # if nothing fits: the smallest changes that make something fit

    @property
    def best(self) -> LayoutPlan | None:
        return self.layouts[0] if self.layouts and self.layouts[0].fits else None


def run_config(config: PlanConfig) -> RunConfig:
    """The run of a plan, with vocab_size filled in: the tokenizer's, if the run would train one."""
    run = RunConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)})
    if run.model.vocab_size is not None:
        return run
    if run.data.tokenizer is not None:
        raise ValueError("model.vocab_size is null: a plan reads no tokenizer; set it to that of data.tokenizer")
    return replace(run, model=replace(run.model, vocab_size=run.data.vocab_size))


def make_plan(config: PlanConfig, accepts: Accepts) -> Plan:
    """Evaluate every layout that `accepts` lets run on all devices of the cluster.

    Raises ValueError for what is not planned, and for fixed axes that do not fit the devices and experts.
    """
    run, cluster = run_config(config), config.cluster
    if run.parallel.ranks_per_node is not None:
        raise ValueError("parallel.ranks_per_node is not planned, only the flat all-to-all is: leave it null")
    _require_axes(run, config)
    layouts, refused = _plan_layouts(run, config, cluster, accepts)
    best = layouts[0] if layouts else None
    if best is None or not best.fits:
        advice = tuple(_advice(run, config, best, accepts))
        return Plan(run, cluster, tuple(layouts), tuple(refused), (), None, {}, advice)
    sensitivity = tuple(_outcomes(run, cluster, best))
    limit = None
    if best.layout.ep_size > 1 and not sensitivity[-1].fits:
        limit = _rows_limit(run, cluster, best)
    return Plan(run, cluster, tuple(layouts), tuple(refused), sensitivity, limit, _links(run, config, best), ())


def with_layout(run: RunConfig, layout: Layout) -> RunConfig:
    """`run` with this layout."""
    parallel = replace(
        run.parallel, ep_size=layout.ep_size, dp_replicate=layout.dp_replicate, cpu_offload=layout.cpu_offload
    )
    train = replace(
        run.train,
        recompute=layout.recompute,
        precision=layout.precision,
        micro_batch_size=layout.micro_batch_size,
    )
    return replace(run, parallel=parallel, train=train)


def make_load(run: RunConfig, name: str) -> RoutingLoad | None:
    """The load of the ranks that share the experts of `run`; None if none do."""
    moe, ep_size = run.model.moe, run.parallel.ep_size
    return None if moe is None or ep_size == 1 else RoutingLoad(name, moe.num_experts, ep_size, moe.top_k)


def mfu(run: RunConfig, cluster: ClusterConfig, plan: LayoutPlan) -> float:
    """Useful FLOPs of a step, divided by its time and the devices' data-sheet peak."""
    peak = cluster.peak_flops_per_second(plan.layout.precision)
    assert peak is not None
    useful = training_flops(run.model, run.seq_len).total * run.train.batch_tokens
    return useful / (plan.seconds * cluster.num_gpus * peak)


def _plan_layouts(
    run: RunConfig, config: PlanConfig, cluster: ClusterConfig, accepts: Accepts
) -> tuple[list[LayoutPlan], list[str]]:
    """All layouts in order, and the reasons why others cannot run."""
    found: list[LayoutPlan] = []
    refused: dict[str, None] = {}
    for mesh in _meshes(run, config, cluster.num_gpus):
        try:
            accepts(with_layout(run, replace(mesh, micro_batch_size=run.train.micro_batch_size or 1)), cluster.num_gpus)
        except ValueError as error:
            refused[str(error)] = None
            continue
        judged: dict[tuple[object, ...], LayoutPlan] = {}
        for layout in _choices(run, config, cluster, mesh):
            width = element_bytes(layout.precision)
            alike = (cluster.peak_flops_per_second(layout.precision), width, replace(layout, precision=""))
            if alike not in judged:  # bfloat16 and float16 do not differ in anything counted here
                judged[alike] = _judge(with_layout(run, layout), config.plan.load, cluster, layout)
            found.append(replace(judged[alike], layout=layout))
    return sorted(found, key=_order), list(refused)


def _require_axes(run: RunConfig, config: PlanConfig) -> None:
    """Raise ValueError for fixed axes that do not fit the devices and experts."""
    moe, ep_size, copies = run.model.moe, config.plan.ep_size or 1, config.plan.dp_replicate or 1
    if config.cluster.num_gpus % (ep_size * copies):
        raise ValueError(
            f"plan.ep_size * plan.dp_replicate ({ep_size} * {copies}) must divide cluster.num_gpus "
            f"({config.cluster.num_gpus}): change them, or set them to null and the plan chooses"
        )
    if ep_size > 1 and moe is None:
        raise ValueError(f"plan.ep_size ({ep_size}) spreads experts, and this model is dense: add +moe=")
    if moe is not None and moe.num_experts % ep_size:
        raise ValueError(
            f"plan.ep_size ({ep_size}) must divide model.moe.num_experts ({moe.num_experts}): change it, or set it to "
            f"null and the plan chooses"
        )


def _meshes(run: RunConfig, config: PlanConfig, num_gpus: int) -> Iterator[Layout]:
    """All ways the axes can multiply to the number of devices; everything else as in `run`."""
    moe, options = run.model.moe, config.plan
    for ep_size in _divisors(num_gpus):
        if (ep_size > 1 and moe is None) or ep_size != (options.ep_size or ep_size):
            continue
        if moe is not None and moe.num_experts % ep_size:
            continue
        for dp_replicate in _divisors(num_gpus // ep_size):
            if dp_replicate == (options.dp_replicate or dp_replicate):
                dp_shard = num_gpus // ep_size // dp_replicate
                yield Layout(dp_replicate, dp_shard, ep_size, False, False, run.train.precision, 1, 1)


def _choices(run: RunConfig, config: PlanConfig, cluster: ClusterConfig, mesh: Layout) -> Iterator[Layout]:
    """The layouts of one mesh."""
    share = run.batch_size // cluster.num_gpus
    given, options = run.train.micro_batch_size, config.plan
    sizes = [size for size in _divisors(share) if size == 1 or size * run.seq_len <= MOST_TOKENS]
    precisions = cluster.precisions if options.precision is None else (options.precision,)
    for recompute in _open(options.recompute):
        for cpu_offload in _open(options.cpu_offload):
            if cpu_offload and cluster.num_gpus == 1:
                continue  # offloading is FSDP2's, which one process does not use
            for precision in precisions:
                for size in sizes if given is None else [given]:
                    yield replace(
                        mesh,
                        recompute=recompute,
                        cpu_offload=cpu_offload,
                        precision=precision,
                        micro_batch_size=size,
                        micro_batches=share // size,
                    )


def _open(option: bool | None) -> tuple[bool, ...]:
    return (False, True) if option is None else (option,)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _memory(candidate: RunConfig, load: str, cluster: ClusterConfig, layout: Layout) -> RankMemory:
    return plan_memory(
        candidate,
        cluster.num_gpus,
        make_load(candidate, load),
        sequences=layout.micro_batch_size,
        micro_batches=layout.micro_batches,
        device=cluster.device,
    )


def _judge(candidate: RunConfig, load: str, cluster: ClusterConfig, layout: Layout) -> LayoutPlan:
    memory = _memory(candidate, load, cluster, layout)
    missing = max(0, memory.peak_bytes - cluster.usable_bytes)
    of_node = min(cluster.num_gpus, cluster.gpus_per_node) * memory.host_bytes
    missing_host = max(0, of_node - int(HOST_SHARE * cluster.host_memory_gib * 2**30))
    step = None
    if missing == missing_host == 0:
        step = _time(candidate, load, cluster, layout)
    return LayoutPlan(layout, memory, missing, missing_host, step)


def _time(candidate: RunConfig, load: str, cluster: ClusterConfig, layout: Layout) -> StepTime:
    return step_time(
        candidate,
        cluster,
        cluster.num_gpus,
        make_load(candidate, load),
        sequences=layout.micro_batch_size,
        micro_batches=layout.micro_batches,
    )


def _order(plan: LayoutPlan) -> tuple[float, ...]:
    """Layouts that fit first, offloading last, by time to three digits, then simplicity; the rest by shortfall."""
    layout = plan.layout
    simple = (layout.recompute, layout.precision != "bf16", layout.dp_replicate, layout.ep_size)
    if plan.fits:
        return (
            0.0,
            float(layout.cpu_offload),
            float(f"{plan.seconds:.2e}"),
            *map(float, simple),
            float(plan.memory.peak_bytes),
        )
    return (1.0, 0.0, float(plan.missing_bytes + plan.missing_host_bytes), *map(float, simple))


def _outcomes(run: RunConfig, cluster: ClusterConfig, best: LayoutPlan) -> Iterator[Outcome]:
    """The best layout under every load; only one outcome if the model is dense or every rank has all experts."""
    candidate = with_layout(run, best.layout)
    tokens = best.layout.micro_batch_size * run.seq_len
    for name in LOADS:
        load = make_load(candidate, name)
        memory = _memory(candidate, name, cluster, best.layout)
        step = _time(candidate, name, cluster, best.layout)
        rows = plan_exchange(candidate, load, tokens).received if load is not None else 0
        fits = memory.peak_bytes <= cluster.usable_bytes
        yield Outcome(name, rows, memory.peak_bytes, fits, step.seconds, step.bottleneck)
        if load is None:
            return


def _rows_limit(run: RunConfig, cluster: ClusterConfig, best: LayoutPlan) -> int | None:
    """The largest power-of-two row limit that free memory allows; None if below even load, or with a capacity."""
    candidate = with_layout(run, best.layout)
    tokens = best.layout.micro_batch_size * run.seq_len
    moe = candidate.model.moe
    assert moe is not None
    kept, widest = row_bytes(candidate)
    of_row = layers_with_rows(candidate) * kept + widest  # the limit lets every layer keep that many rows
    even = candidate.parallel.ep_size * tokens * moe.top_k // candidate.parallel.ep_size
    left = cluster.usable_bytes - best.memory.peak_bytes
    limit = 1 << max(0, (even + left // of_row).bit_length() - 1)
    least = candidate.parallel.ep_size * min(moe.top_k, moe.num_experts // candidate.parallel.ep_size)
    return limit if limit >= max(even, least) and expert_capacity(moe, tokens) is None else None


def _links(run: RunConfig, config: PlanConfig, best: LayoutPlan) -> dict[str, LinkBytes]:
    candidate, cluster = with_layout(run, best.layout), config.cluster
    load = make_load(candidate, config.plan.load)
    exchange = None
    if load is not None:
        exchange = plan_exchange(candidate, load, best.layout.micro_batch_size * run.seq_len)
    rings = step_rings(candidate, cluster.num_gpus, exchange, micro_batches=best.layout.micro_batches)
    layers = best.layout.micro_batches * len(run.model.moe_layers)
    return step_links(rings, exchange, cluster.gpus_per_node, layers)


def _advice(run: RunConfig, config: PlanConfig, nearest: LayoutPlan | None, accepts: Accepts) -> Iterator[str]:
    """The smallest changes after which something fits, each verified."""
    cluster = config.cluster
    if nearest is None:
        yield from _other_shares(run, config, accepts)
        return
    opened = replace(config.plan, ep_size=None, dp_replicate=None, recompute=None, cpu_offload=None, precision=None)
    if opened != config.plan and _fits(replace(config, plan=opened), accepts):
        yield "leave plan.ep_size, dp_replicate, recompute, cpu_offload and precision open: another choice fits"
    if run.train.micro_batch_size not in (None, 1):
        smaller = replace(config, train=replace(config.train, micro_batch_size=1))
        if _fits(smaller, accepts):
            yield "train.micro_batch_size=1: the same batch in more parts"
    for factor in (2, 4, 8, 16, 32):
        more = replace(cluster, num_gpus=_whole_nodes(factor * cluster.num_gpus, cluster))
        if _fits(replace(config, cluster=more), accepts):
            yield f"cluster.num_gpus={more.num_gpus}: so many devices share what is too large for {cluster.num_gpus}"
            break
    needed = -(-nearest.memory.peak_bytes // 2**30) + cluster.reserved_gib
    if nearest.missing_bytes > 0:
        yield f"devices of {math.ceil(needed)} GiB (cluster.memory_gib), {cluster.reserved_gib:g} of them reserved"
    if nearest.missing_host_bytes > 0:
        more_host = cluster.host_memory_gib + nearest.missing_host_bytes / HOST_SHARE / 2**30
        yield f"nodes with {math.ceil(more_host)} GiB for what is offloaded (cluster.host_memory_gib)"


def _other_shares(run: RunConfig, config: PlanConfig, accepts: Accepts) -> Iterator[str]:
    """A batch the devices can divide, or a number of devices that divides the batch."""
    cluster = config.cluster
    share = -(-run.batch_size // cluster.num_gpus) * cluster.num_gpus * run.seq_len
    if share != run.train.batch_tokens and _fits(_with_batch(config, share), accepts):
        yield f"train.batch_tokens={share}: a whole number of sequences for each device"
    fewer = [count for count in range(cluster.num_gpus - 1, 0, -1) if run.batch_size % count == 0]
    whole = [count for count in fewer if count <= cluster.gpus_per_node or count % cluster.gpus_per_node == 0]
    for count in whole[:4]:
        if _fits(replace(config, cluster=replace(cluster, num_gpus=count)), accepts):
            yield f"cluster.num_gpus={count}: the batch can be divided among them"
            return


def _with_batch(config: PlanConfig, batch_tokens: int) -> PlanConfig:
    return replace(config, train=replace(config.train, batch_tokens=batch_tokens))


def _whole_nodes(count: int, cluster: ClusterConfig) -> int:
    """`count` devices, rounded up to whole nodes if they exceed one node."""
    return count if count <= cluster.gpus_per_node else -(-count // cluster.gpus_per_node) * cluster.gpus_per_node


def _fits(config: PlanConfig, accepts: Accepts) -> bool:
    """Whether any layout fits, trying the least demanding: recompute, and micro-batches of one sequence."""
    narrow = "fp32" if config.cluster.precisions == ("fp32",) else config.cluster.precisions[1]
    options = replace(
        config.plan,
        recompute=True if config.plan.recompute is None else config.plan.recompute,
        precision=narrow if config.plan.precision is None else config.plan.precision,
    )
    train = replace(config.train, micro_batch_size=config.train.micro_batch_size or 1)
    least = replace(config, plan=options, train=train)
    layouts, _ = _plan_layouts(run_config(least), least, least.cluster, accepts)
    return bool(layouts) and layouts[0].fits
