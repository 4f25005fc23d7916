"""The machines that a plan is for, and the options of the plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.config.checks import require_choice, require_not_negative, require_positive
from moe.config.run import RunConfig

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass
class ClusterConfig:
    """Equal nodes of equal devices. Rates are from data sheets; `*_efficiency` is the share of them that is reached.

    GB are 1e9 bytes, in one direction; GiB are 2**30 bytes; TFLOP/s count a multiply-add as 2, without sparsity. Every
    field must be stated: a guessed rate would make the plan wrong.
    """

    name: str
    device: str  # as torch names it: "cuda" (AMD's too) or "cpu"
    num_gpus: int  # devices of the cluster
    gpus_per_node: int  # devices of one node
    memory_gib: float  # of a device
    reserved_gib: float  # of it, not available to tensors: driver, communication buffers, fragmentation
    tflops_fp32: float  # peak of a device in float32 products
    tflops_bf16: float | None  # of bfloat16; null: the device has no fast products of this kind, and no plan uses it
    tflops_fp16: float | None  # of float16; null: likewise
    memory_gb_per_second: float  # of a device
    node_gb_per_second: float  # from a device to others of its node
    network_gb_per_second: float  # from a device to other nodes: the node's adapters over its devices
    host_gb_per_second: float  # from a device to the memory of its host
    host_memory_gib: float  # of a node
    host_memory_gb_per_second: float  # of a node
    gemm_efficiency: float  # share of the TFLOP/s that large matrix products reach
    memory_efficiency: float  # share of every memory's rate
    link_efficiency: float  # share of every link's rate
    latency_microseconds: float  # of one collective that sends nothing

    def __post_init__(self) -> None:
        positive = (
            *("num_gpus", "gpus_per_node", "memory_gib", "tflops_fp32", "tflops_bf16", "tflops_fp16"),
            *("memory_gb_per_second", "node_gb_per_second", "network_gb_per_second", "host_gb_per_second"),
            *("host_memory_gib", "host_memory_gb_per_second"),
        )
        require_choice("cluster.device", self.device, ("cuda", "cpu"))
        require_positive("cluster", {name: getattr(self, name) for name in positive})
        for name in ("gemm_efficiency", "memory_efficiency", "link_efficiency"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"cluster.{name} ({getattr(self, name)}) must be above 0 and at most 1")
        require_not_negative("cluster", {"latency_microseconds": self.latency_microseconds})
        if not 0 <= self.reserved_gib < self.memory_gib:
            raise ValueError(
                f"cluster.reserved_gib ({self.reserved_gib}) must be at least 0 and below cluster.memory_gib "
                f"({self.memory_gib})"
            )
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise ValueError(
                f"cluster.num_gpus ({self.num_gpus}) must be a multiple of cluster.gpus_per_node "
                f"({self.gpus_per_node}), or fit one node"
            )

    @property
    def usable_bytes(self) -> int:
        """Bytes of a device's memory that a run can use."""
        return int((self.memory_gib - self.reserved_gib) * 2**30)

    @property
    def num_nodes(self) -> int:
        return max(1, self.num_gpus // self.gpus_per_node)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that the devices compute in."""
        return tuple(name for name in PRECISIONS if self.peak_flops_per_second(name) is not None)

    def peak_flops_per_second(self, precision: str) -> float | None:
        """The data-sheet peak of one device; None if it does not have this arithmetic."""
        tflops: float | None = getattr(self, f"tflops_{precision}")
        return None if tflops is None else tflops * 1e12


@dataclass
class PlanOptions:
    """Values to fix in the plan; None leaves the choice to it."""

    ep_size: int | None = None  # ranks that share the experts of each sparse layer; null: the plan chooses
    dp_replicate: int | None = None  # copies of the whole sharded model; null: the plan chooses
    recompute: bool | None = None  # recompute activations in the backward pass; null: the plan chooses
    cpu_offload: bool | None = None  # keep parameters and optimizer state in host memory; null: the plan chooses
    precision: str | None = None  # fp32, bf16 or fp16; null: the plan chooses
    load: str = "uniform"  # how tokens choose their experts; the other loads are shown beside it
    show: int = 8  # layouts in the table

    def __post_init__(self) -> None:
        names = ("ep_size", "dp_replicate", "show")
        require_positive("plan", {name: getattr(self, name) for name in names})
        require_choice("plan.load", self.load, ("uniform", "zipf", "worst"))
        if self.precision is not None:
            require_choice("plan.precision", self.precision, PRECISIONS)


@dataclass(kw_only=True)
class PlanConfig(RunConfig):
    """A run, the cluster to run it on and the options of the plan."""

    cluster: ClusterConfig
    plan: PlanOptions = field(default_factory=PlanOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = {"ep_size": 1, "dp_replicate": 1, "cpu_offload": False}
        for name, open_value in chosen.items():
            value = getattr(self.parallel, name)
            if value != open_value:
                raise ValueError(
                    f"parallel.{name} ({value}) is chosen by the plan: to fix it, set plan.{name}={value} instead"
                )
        if self.plan.precision is not None and self.cluster.peak_flops_per_second(self.plan.precision) is None:
            raise ValueError(
                f"plan.precision ({self.plan.precision}) is not supported by cluster {self.cluster.name}: "
                f"choose one of {', '.join(self.cluster.precisions)}"
            )
