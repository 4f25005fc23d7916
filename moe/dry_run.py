"""Simulate a training step of many ranks on one machine without a GPU: the run's own code on tensors without data.

Rank 0 of a process group whose collectives return at once builds the model, runs every forward and backward pass of a
step, the gradient norm and the optimizer, and counts. The report sets the counts beside the closed forms of
`moe.scaling`.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe.config import RunConfig, require_choice
from moe.distributed.all_to_all import count_traffic, exchange_counts
from moe.distributed.collectives import CollectiveCounter
from moe.distributed.expert_parallel import ExpertParallelDispatcher, require_divisible_experts
from moe.distributed.memory_tracker import MemoryTracker, PeakMemory, fake_tensors, simulated_group
from moe.distributed.mesh import make_meshes
from moe.distributed.parallelize import parallelize
from moe.distributed.wire import FlatWire, Journey
from moe.distributed.world import World
from moe.kernels.launch import simulating
from moe.layers.moe import MoE
from moe.layers.routing import Routing
from moe.model import Transformer
from moe.scaling.communication import Collective, plan_exchange, step_collectives
from moe.scaling.memory import RankMemory, plan_memory, rank_share
from moe.scaling.routing_load import RoutingLoad
from moe.training.loss import compute_loss
from moe.training.optimizer import gradient_norm, make_optimizer

CAPABILITY = 90  # launchers make the same choices as on an H100


@dataclass(frozen=True)
class DryRunReport:
    """What rank 0 would hold and send in one step, as counted and as planned."""

    model: str
    ranks: int
    ep_size: int
    dp_replicate: int
    precision: str
    recompute: bool
    sequences: int  # per micro-batch of a rank
    seq_len: int
    micro_batches: int
    load: str  # how the simulated tokens chose their experts, or "capacity": no counts were simulated
    rounds: int  # that rows_limit splits a sparse layer's rows into
    rows_received: int  # by this rank's experts, in one forward pass of one sparse layer
    memory: RankMemory
    planned_memory: RankMemory
    peak_by_kind: dict[str, int]  # bytes at the peak, without the optimizer's
    collectives: dict[str, Collective]
    planned_collectives: dict[str, Collective]
    row_bytes: int  # sent to other ranks by the all-to-alls
    launches: dict[str, int]  # of this library's kernels
    seconds: float  # spent simulating

    def rows(self) -> list[tuple[str, int, int]]:
        """(name, counted, planned) for every figure that has both."""
        names = ("params", "param_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes", "peak_bytes")
        found = [(name, getattr(self.memory, name), getattr(self.planned_memory, name)) for name in names]
        nothing = Collective(0, 0)
        for kind in sorted(self.collectives.keys() | self.planned_collectives.keys()):
            counted, planned = self.collectives.get(kind, nothing), self.planned_collectives.get(kind, nothing)
            found += [(f"{kind} calls", counted.calls, planned.calls), (f"{kind} bytes", counted.bytes, planned.bytes)]
        return found

    def to_json(self) -> str:
        """Everything, as one JSON object."""
        fields = asdict(self)
        for name in ("memory", "planned_memory"):
            fields[name] = getattr(self, name)._asdict()
        for name in ("collectives", "planned_collectives"):
            fields[name] = {kind: count._asdict() for kind, count in getattr(self, name).items()}
        return json.dumps(fields, indent=1)


def dry_run(config: RunConfig) -> DryRunReport:
    """Simulate one step of rank 0 of `config.parallel.ranks` ranks.

    The model runs on fake tensors through its GPU kernels' launchers, which count and start nothing. Attention dropout
    is off: a GPU's fused kernel keeps no mask, but torch's CPU path would. Raises ValueError for settings that are not
    simulated, and for axes that do not multiply to the number of ranks.
    """
    num_ranks = _require(config)
    started_at = time.perf_counter()
    config = replace(config, model=replace(config.model, vocab_size=_vocabulary(config), attention_dropout=0.0))
    sequences, micro_batches = rank_share(config, num_ranks)
    num_tokens = sequences * config.seq_len
    load = _load(config)
    with simulated_group(num_ranks) as group, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing here changes its views in place
        world = World(0, num_ranks, torch.device("cpu"), group, config.parallel.timeout_seconds)
        step = _Step(config, world, load, sequences)
        step.run(micro_batches)
    exchange = None if load is None else plan_exchange(config, load, num_tokens)
    return DryRunReport(
        model=config.model.name if config.model.moe is None else f"{config.model.name} {config.model.moe.name}",
        ranks=num_ranks,
        ep_size=config.parallel.ep_size,
        dp_replicate=config.parallel.dp_replicate,
        precision=config.train.precision,
        recompute=config.train.recompute,
        sequences=sequences,
        seq_len=config.seq_len,
        micro_batches=micro_batches,
        load="none" if load is None else "capacity" if config.parallel.fixed_capacity else load.name,
        rounds=1 if exchange is None else exchange.rounds,
        rows_received=0 if exchange is None else exchange.received,
        memory=step.memory(),
        planned_memory=plan_memory(config, num_ranks, load, sequences=sequences, micro_batches=micro_batches),
        peak_by_kind=step.peak.by_kind,
        collectives=step.collectives,
        planned_collectives=step_collectives(
            config, num_ranks, load, num_tokens=num_tokens, micro_batches=micro_batches
        ),
        row_bytes=step.row_bytes,
        launches=step.launches,
        seconds=time.perf_counter() - started_at,
    )


class SimulatedWire(FlatWire):
    """Exchanges counts as its parent does, then follows a `RoutingLoad`, because no real counts arrived.

    All ranks of the group send the same counts.
    """

    def __init__(self, group: dist.ProcessGroup, load: RoutingLoad) -> None:
        super().__init__(group)
        self.load = load
        self.num_tokens = 0  # tokens whose rows are announced next
        self.capacity: int | None = None

    def announce(self, counts: Tensor) -> Journey:
        exchange_counts(counts, self.group)
        sent = self.load.rows(self.num_tokens, self.capacity)
        return self.journey(sent, [sent[0]] * self.size)


class SimulatedDispatcher(ExpertParallelDispatcher):
    """Tells its wire the number of tokens, and derives the number of rounds from the load."""

    wire: SimulatedWire

    def _round(self, x: Tensor, *arguments: Any) -> Tensor:
        self.wire.num_tokens = x.shape[0]
        self.wire.capacity = None if self.capacity is None else self.capacity(x.shape[0])
        return super()._round(x, *arguments)

    def _num_rounds(self, routing: Routing, limit: int) -> int:
        num_tokens, num_experts = routing.expert_indices.shape[0], routing.tokens_per_expert.numel()
        # like the parent: the rows of each expert, then the most rows and tokens of any rank
        for size, group in ((num_experts, self.group), (2, self.together)):
            dist.all_reduce(routing.tokens_per_expert.new_zeros(size), group=group)
        capacity = None if self.capacity is None else self.capacity(num_tokens)
        return self.wire.load.rounds(num_tokens, limit, capacity)


class _Step:
    """One optimizer step of rank 0 on fake tensors, and its counts."""

    peak: PeakMemory
    launches: dict[str, int]
    collectives: dict[str, Collective]
    row_bytes: int

    def __init__(self, config: RunConfig, world: World, load: RoutingLoad | None, sequences: int) -> None:
        self.config, self.world, self.load = config, world, load
        self.shape = (sequences, config.seq_len)
        self.model = Transformer(config.model, backend="triton", device="meta", recompute=config.train.recompute)
        parallelize(self.model, make_meshes(config.parallel, world.size, world.device.type), config)
        if load is not None:
            _follow(self.model, load)

    def run(self, micro_batches: int) -> None:
        """Forward and backward of each micro-batch, gradient norm, update."""
        model, config = self.model, self.config
        counter = CollectiveCounter()
        with fake_tensors(), simulating(CAPABILITY) as launches, count_traffic() as traffic:
            model.to_empty(device=self.world.device).train()
            self.optimizer = make_optimizer(model, config.optim)
            tokens = torch.zeros(self.shape, dtype=torch.int64)
            with MemoryTracker(model, (tokens,)) as tracker, counter:
                for _ in range(micro_batches):
                    output = model(tokens, tokens)
                    part = compute_loss(output, None, config.model.moe, self.world.group)
                    (part.loss / (micro_batches * self.world.size)).backward()
                    del output, part
                    tracker.next_pass()
            self.gradient_bytes = _storage_bytes(_local(p.grad) for p in model.parameters() if p.grad is not None)
            with counter:
                gradient_norm(model.parameters(), self.world)
            self.optimizer.step()
        self.peak = tracker.peak
        self.launches, self.collectives, self.row_bytes = dict(launches), counter.counts, traffic.row_bytes

    def memory(self) -> RankMemory:
        """Counted memory, after `run`."""
        states = [_local(value) for state in self.optimizer.state.values() for value in state.values()]
        optimizer_bytes = sum(state.numel() * state.element_size() for state in states)
        return RankMemory(
            params=sum(_local(parameter).numel() for parameter in self.model.parameters()),
            param_bytes=self.peak.by_kind["Sharded Param"],
            gradient_bytes=self.gradient_bytes,
            optimizer_bytes=optimizer_bytes,
            activation_bytes=self.peak.activations,
            peak_bytes=self.peak.total + optimizer_bytes,
        )


def _follow(model: Transformer, load: RoutingLoad) -> None:
    """Make every dispatcher of `model` follow `load`."""
    for layer in model.modules():
        if isinstance(layer, MoE) and isinstance(layer.dispatcher, ExpertParallelDispatcher):
            real = layer.dispatcher
            layer.dispatcher = SimulatedDispatcher(
                SimulatedWire(real.group, load),
                real.group,
                options=real.options,
                capacity=real.capacity,
                backend=real.backend,
                together=real.together,
            )


def _require(config: RunConfig) -> int:
    """The number of ranks. Raises ValueError for settings that are not simulated."""
    num_ranks, moe = config.parallel.ranks, config.model.moe
    if num_ranks is None or num_ranks < 2:
        raise ValueError(
            f"parallel.ranks ({num_ranks}) must be at least 2: a dry run simulates how ranks share a model"
        )
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1":
        raise ValueError(f"WORLD_SIZE is {started}: a dry run is one process, start it without torchrun")
    refused: dict[str, tuple[Any, Any]] = {
        "train.compile": (config.train.compile, False),
        "parallel.cpu_offload": (config.parallel.cpu_offload, False),
        "parallel.ranks_per_node": (config.parallel.ranks_per_node, None),
        "data.document_attention": (config.data.document_attention, "across"),
    }
    if moe is not None:
        refused["model.moe.jitter"] = (moe.jitter, None)
        refused["model.moe.second_policy"] = (moe.second_policy, "all")
    for name, (value, simulated) in refused.items():
        if value != simulated:
            raise ValueError(
                f"{name} ({value}) is not simulated; set it to {'null' if simulated is None else simulated}"
            )
    if moe is not None and moe.load_balance_scope == "sequence":
        raise ValueError("model.moe.load_balance_scope=sequence is not simulated: set it to local or global")
    require_choice("backend", config.backend, ("auto", "triton"))
    return num_ranks


def _vocabulary(config: RunConfig) -> int:
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if config.data.tokenizer is not None:
        raise ValueError("model.vocab_size is null: a dry run reads no tokenizer; set it to that of data.tokenizer")
    return config.data.vocab_size  # of the tokenizer that the run would train


def _load(config: RunConfig) -> RoutingLoad | None:
    moe, ep_size = config.model.moe, config.parallel.ep_size
    if moe is None or ep_size == 1:
        return None
    require_divisible_experts(moe.num_experts, ep_size, where="model.moe")
    return RoutingLoad(config.parallel.dry_run_load, moe.num_experts, ep_size, moe.top_k)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def report_folder(config: RunConfig) -> Path:
    """Where the report of `config` goes: run_dir, or a folder that no run uses."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    moe, parallel = config.model.moe, config.parallel
    name = f"{config.model.name}-{'dense' if moe is None else moe.name}-{parallel.ranks}ranks-{parallel.dry_run_load}"
    return Path("runs") / "dry_run" / name


def write_report(report: DryRunReport, folder: Path) -> Path:
    """Print `report` as a table and write it to `folder`/dry_run.json. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dry_run.json").write_text(report.to_json() + "\n")
    console = Console()
    table = Table("figure", "counted", "planned", "difference", title=f"rank 0 of {report.ranks}, {report.model}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, counted, planned in report.rows():
        difference = "equal" if counted == planned else f"{planned / counted - 1:+.2%}" if counted else "missing"
        shown = [_readable(name, value) for value in (counted, planned)]
        table.add_row(name.replace("_", " "), *shown, difference)
    console.print(table)
    console.print(
        f"{report.micro_batches} micro-batches of {report.sequences} sequences of {report.seq_len} tokens; "
        f"load {report.load}, {report.rows_received:,} rows a sparse layer in {report.rounds} rounds; "
        f"{sum(report.launches.values())} kernel launches; {report.seconds:.1f} seconds; {folder / 'dry_run.json'}"
    )
    return folder


def _readable(name: str, value: int) -> str:
    if not name.endswith("bytes"):
        return f"{value:,}"
    return f"{value / 2**30:.3f} GiB" if value >= 2**26 else f"{value:,} B"
