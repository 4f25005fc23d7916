"""The configuration of one training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.config.checks import require_choice
from moe.config.data import DataConfig
from moe.config.evaluation import EvalConfig
from moe.config.model import ModelConfig
from moe.config.training import OptimConfig, ParallelConfig, TrainConfig
from moe.config.tuning import TuneConfig


@dataclass
class RunConfig:
    """The configuration of one training run."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tune: TuneConfig | None = None  # null: pretraining; otherwise the model of init_from is tuned
    seed: int = 0  # of the first weights, the order of the data and every random draw
    run_dir: str | None = None  # where the run writes; null: runs/<model>-<moe>-s<seed>-<hash of the configuration>
    init_from: str | None = None  # run folder or checkpoint to take the first weights from
    resume: str = "auto"  # auto: continue what is in run_dir; never: refuse it
    device: str = "auto"  # auto, cpu or cuda
    backend: str = "auto"  # of the kernels: auto, triton, torch or reference

    def __post_init__(self) -> None:
        require_choice("resume", self.resume, ("auto", "never"))
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require_choice("backend", self.backend, ("auto", "triton", "torch", "reference"))
        if not 0 <= self.seed < 2**32:  # this and the step's number form the step's 64-bit seed in torch
            raise ValueError(f"seed ({self.seed}) must be at least 0 and below 2**32 ({2**32})")
        if self.seq_len > self.model.max_seq_len and self.model.position != "rope":
            raise ValueError(
                f"data.seq_len ({self.seq_len}) must be at most model.max_seq_len ({self.model.max_seq_len}): "
                f"model.position={self.model.position} has no positions beyond it"
            )
        if self.train.batch_tokens % self.seq_len != 0:
            raise ValueError(
                f"train.batch_tokens ({self.train.batch_tokens}) must be a multiple of the sequence length "
                f"({self.seq_len}, data.seq_len or model.max_seq_len)"
            )
        if self.batch_size % self.micro_batch_size != 0:
            raise ValueError(
                f"train.batch_tokens ({self.train.batch_tokens}) must be a multiple of train.micro_batch_size * "
                f"sequence length ({self.micro_batch_size} * {self.seq_len} = {self.micro_batch_size * self.seq_len})"
            )

    @property
    def seq_len(self) -> int:
        return self.model.max_seq_len if self.data.seq_len is None else self.data.seq_len

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.train.batch_tokens // self.seq_len

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass."""
        return self.batch_size if self.train.micro_batch_size is None else self.train.micro_batch_size
