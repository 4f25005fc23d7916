"""How a model is trained: the optimizer, the steps and how processes share them."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config.checks import require_choice, require_fraction, require_not_negative, require_positive


@dataclass
class OptimConfig:
    """AdamW with decoupled decay and a learning-rate schedule; the scales multiply `lr` for a parameter group."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay: str = "all"  # "all" parameters (the paper's, moe_lm.md 6) or only "matrices"
    embedding_lr_scale: float = 1.0
    expert_lr_scale: float = 1.0
    expert_gradient_scale: float = 1.0  # before norm and clipping; the paper's is √(ranks that share experts)
    schedule: str = "linear"
    warmup_steps: int = 0
    decay_fraction: float = 0.2  # share of the steps that decay, read by schedule=wsd alone
    final_lr_fraction: float = 0.0  # learning rate at the last step, as a share of lr
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        require_positive(
            "optim",
            {
                "lr": self.lr,
                "eps": self.eps,
                "embedding_lr_scale": self.embedding_lr_scale,
                "expert_lr_scale": self.expert_lr_scale,
                "expert_gradient_scale": self.expert_gradient_scale,
                "clip_norm": self.clip_norm,
            },
        )
        require_fraction("optim", {"beta1": self.beta1, "beta2": self.beta2})
        require_choice("optim.decay", self.decay, ("all", "matrices"))
        require_choice("optim.schedule", self.schedule, ("linear", "cosine", "wsd"))
        require_not_negative("optim", {"weight_decay": self.weight_decay, "warmup_steps": self.warmup_steps})
        for name in ("decay_fraction", "final_lr_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"optim.{name} ({getattr(self, name)}) must be between 0 and 1")


@dataclass
class TrainConfig:
    """How long, how much at a time and with what arithmetic."""

    num_steps: int
    batch_tokens: int  # tokens of one optimizer step, over all micro-batches
    micro_batch_size: int | None = None  # sequences of one forward pass of a process; None is its whole share at once
    precision: str = "fp32"
    recompute: bool = False
    compile: bool = False
    checkpoint_every: int | None = None  # steps; None saves only at the end and when stopped
    keep_last: int = 2  # checkpoints; older ones are deleted
    keep_every: int | None = None  # steps: a checkpoint at a multiple of it is kept for good
    async_save: bool = False  # write checkpoints beside training, from a copy in host memory
    max_skipped_steps: int = 10  # in a row, for a loss or gradient that is not finite; the next one stops the run
    histogram_every: int = 50  # steps between TensorBoard histograms
    keep_freed_memory: bool = True  # on a CPU: moe.training.allocator

    def __post_init__(self) -> None:
        require_positive(
            "train",
            {
                name: getattr(self, name)
                for name in (
                    *("num_steps", "batch_tokens", "micro_batch_size"),
                    *("checkpoint_every", "keep_last", "keep_every", "histogram_every"),
                )
            },
        )
        require_choice("train.precision", self.precision, ("fp32", "bf16", "fp16"))
        require_not_negative("train", {"max_skipped_steps": self.max_skipped_steps})


@dataclass
class ParallelConfig:
    """How the processes that torchrun starts share one model: dp_replicate * dp_shard * ep_size of them.

    None of these fields changes what is computed, but for the draws of dropout in experts, which follow the rows
    (docs/gradient_contract.md); so a run may be continued with others.
    """

    ep_size: int = 1  # ranks that share each sparse layer's experts
    dp_replicate: int = 1  # copies of the whole sharded model
    reshard_after_forward: bool = True  # FSDP2: free the gathered weights between forward and backward
    cpu_offload: bool = False  # FSDP2: parameters, gradients and optimizer state in host memory
    ranks_per_node: int | None = None  # a two-level all-to-all, within nodes and between them; None is a flat one
    overlap_parts: int = 1  # parts of a rank's experts: one computes while the next one's rows travel
    fixed_capacity: bool = False  # send a capacity router's whole capacity, without waiting for counts
    rows_limit: int | None = None  # the most rows a rank's experts take in at once, by recomputing in rounds
    timeout_seconds: float = 600.0  # after which a collective names the ranks that did not come
    dry_run: bool = False  # simulate `ranks` processes on meta tensors, report and stop
    ranks: int | None = None  # of the dry run
    dry_run_load: str = "uniform"  # how the simulated tokens choose experts

    def __post_init__(self) -> None:
        counts = "ep_size dp_replicate ranks_per_node overlap_parts rows_limit timeout_seconds ranks"
        require_positive("parallel", {name: getattr(self, name) for name in counts.split()})
        require_choice("parallel.dry_run_load", self.dry_run_load, ("uniform", "zipf", "worst"))
        if self.dry_run and self.ranks is None:
            raise ValueError("parallel.ranks must say how many processes parallel.dry_run=true is to simulate")
