"""How a model is trained: the optimizer, the steps and how processes share them."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config.checks import require_choice, require_fraction, require_not_negative, require_positive


@dataclass
class OptimConfig:
    """AdamW with decoupled decay and a learning-rate schedule; the scales multiply `lr` for a parameter group."""

    lr: float  # peak learning rate
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.98  # AdamW's
    eps: float = 1e-8  # AdamW's
    weight_decay: float = 0.01  # AdamW's, decoupled
    decay: str = "all"  # which parameters decay: all (as in the paper) or matrices
    embedding_lr_scale: float = 1.0  # multiplies lr for the embeddings
    expert_lr_scale: float = 1.0  # multiplies lr for the experts
    expert_gradient_scale: float = 1.0  # of experts, before clipping; the paper's: √(ranks that share them)
    schedule: str = "linear"  # linear, cosine or wsd (warm-up, stable, decay)
    warmup_steps: int = 0  # steps over which the learning rate rises linearly from 0
    decay_fraction: float = 0.2  # with schedule=wsd: share of the steps that decay
    final_lr_fraction: float = 0.0  # learning rate at the last step, as a share of lr
    clip_norm: float | None = None  # largest L2 norm of the whole gradient; null: no clipping

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
    """How long to train, in what batches and with what arithmetic."""

    num_steps: int  # optimizer steps
    batch_tokens: int  # tokens per optimizer step, over all processes and micro-batches
    micro_batch_size: int | None = None  # sequences per forward pass of a process; null: its whole share of the batch
    precision: str = "fp32"  # fp32, bf16 or fp16 (mixed: weights stay float32)
    recompute: bool = False  # recompute activations in the backward pass: less memory, more time
    compile: bool = False  # torch.compile
    checkpoint_every: int | None = None  # steps; null saves only at the end and when stopped
    keep_last: int = 2  # checkpoints to keep; older ones are deleted
    keep_every: int | None = None  # steps: checkpoints at multiples of it are never deleted
    async_save: bool = False  # write checkpoints in the background, from a copy in host memory
    max_skipped_steps: int = 10  # non-finite updates in a row that are skipped; one more stops the run
    histogram_every: int = 50  # steps between expert histograms in metrics.jsonl and TensorBoard
    keep_freed_memory: bool = True  # on a CPU: keep freed memory in the process (moe.training.allocator)

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

    These fields do not change what is computed, except for dropout draws in experts, which follow the rows
    (docs/gradient_contract.md), so a run may be continued with other values.
    """

    ep_size: int = 1  # ranks that share the experts of each sparse layer
    dp_replicate: int = 1  # copies of the whole sharded model
    reshard_after_forward: bool = True  # FSDP2: free gathered weights between forward and backward
    cpu_offload: bool = False  # FSDP2: keep parameters, gradients and optimizer state in host memory
    ranks_per_node: int | None = None  # two-level all-to-all, within machines and between them; null: a flat one
    overlap_parts: int = 1  # parts of a rank's experts: one computes while the rows of the next travel
    fixed_capacity: bool = False  # in training, with a capacity: send all of it, without waiting for counts
    rows_limit: int | None = None  # most rows a rank's experts take in at once; more go in rounds, recomputed
    timeout_seconds: float = 600.0  # after which a collective reports the ranks that are missing
    dry_run: bool = False  # simulate `ranks` processes on meta tensors, report and stop
    ranks: int | None = None  # processes that a dry run simulates
    dry_run_load: str = "uniform"  # how the simulated tokens choose experts: uniform, zipf or worst

    def __post_init__(self) -> None:
        counts = "ep_size dp_replicate ranks_per_node overlap_parts rows_limit timeout_seconds ranks"
        require_positive("parallel", {name: getattr(self, name) for name in counts.split()})
        require_choice("parallel.dry_run_load", self.dry_run_load, ("uniform", "zipf", "worst"))
        if self.dry_run and self.ranks is None:
            raise ValueError("parallel.ranks must say how many processes parallel.dry_run=true is to simulate")
        if self.fixed_capacity and self.rows_limit is not None:
            raise ValueError(
                f"parallel.rows_limit ({self.rows_limit}) must be null with parallel.fixed_capacity=true: the capacity "
                f"of all tokens bounds a rank's rows already, and says nothing of one round's; leave one of them out"
            )
