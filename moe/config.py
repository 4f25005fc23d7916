"""Every value a run can be told, with its checks. Standard library only, so that a laptop can plan without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def require_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError naming the key, the value and the choices unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{key} ({value!r}) must be one of: {', '.join(choices)}")


def require_positive(owner: str, fields: dict[str, Any]) -> None:
    """Raise ValueError for the first field that is not above zero. `None` (off) passes."""
    for name, value in fields.items():
        if value is not None and value <= 0:
            raise ValueError(f"{owner}.{name} ({value}) must be above 0")


def require_fraction(owner: str, fields: dict[str, float]) -> None:
    """Raise ValueError for the first field outside [0, 1)."""
    for name, value in fields.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{owner}.{name} ({value}) must be at least 0 and below 1")


@dataclass
class MoEConfig:
    """The sparse half of a model; `model.moe: null` is the dense twin.

    Layer i (counted from 0) is sparse iff (i + 1) % moe_every == 0 (moe_lm.md 4.1, the paper's rule),
    or i % moe_every == 0 where `ModelConfig.moe_placement` is "first".
    """

    name: str
    num_experts: int
    top_k: int
    moe_every: int
    router: str
    scores: str  # of router=topk: "softmax" or "sigmoid"
    normalize_weights: bool
    weight_scale: float  # multiplies the experts' weights
    num_groups: int | None  # group-limited routing: choose within top_groups of num_groups blocks of experts
    top_groups: int | None
    bias_balance_rate: float | None  # auxiliary-loss-free balancing: how far a step moves an expert's bias
    jitter: float | None  # of the router's input, in training
    second_policy: str  # of router=gshard: "all", "sampling" or "random"
    shared_d_ff: int | None  # width of a dense network that every token passes beside its experts
    shared_gate: bool
    capacity_factor: float | None
    eval_capacity_factor: float | None
    load_balance_weight: float
    load_balance_choices: str
    load_balance_scope: str
    load_balance_reduction: str
    router_z_loss_weight: float

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_names()
        if self.router == "gshard":
            self._check_gshard()

    @property
    def draws(self) -> bool:
        """Whether the routers draw random numbers in training."""
        return self.jitter is not None or self.second_policy != "all"

    def _check_numbers(self) -> None:
        require_positive(
            "model.moe",
            {
                "num_experts": self.num_experts,
                "top_k": self.top_k,
                "moe_every": self.moe_every,
                "capacity_factor": self.capacity_factor,
                "eval_capacity_factor": self.eval_capacity_factor,
                "weight_scale": self.weight_scale,
                "num_groups": self.num_groups,
                "top_groups": self.top_groups,
                "bias_balance_rate": self.bias_balance_rate,
                "jitter": self.jitter,
                "shared_d_ff": self.shared_d_ff,
            },
        )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.moe.top_k ({self.top_k}) must be at most model.moe.num_experts ({self.num_experts}); "
                f"a token cannot choose more experts than there are"
            )
        if self.shared_gate and self.shared_d_ff is None:
            raise ValueError(
                "model.moe.shared_gate=true scales the shared network: set its width, model.moe.shared_d_ff"
            )
        if (self.num_groups is None) != (self.top_groups is None):
            raise ValueError(
                f"model.moe.num_groups ({self.num_groups}) and model.moe.top_groups ({self.top_groups}) "
                f"must be given together"
            )

    def _check_names(self) -> None:
        require_choice("model.moe.router", self.router, ("topk", "gshard"))
        require_choice("model.moe.scores", self.scores, ("softmax", "sigmoid"))
        require_choice("model.moe.second_policy", self.second_policy, ("all", "sampling", "random"))
        require_choice("model.moe.load_balance_choices", self.load_balance_choices, ("all", "first"))
        require_choice("model.moe.load_balance_scope", self.load_balance_scope, ("local", "global", "sequence"))
        require_choice("model.moe.load_balance_reduction", self.load_balance_reduction, ("mean", "sum"))
        if self.router == "topk" and self.second_policy != "all":
            raise ValueError(f"model.moe.second_policy ({self.second_policy!r}) is read with router=gshard alone")

    def _check_gshard(self) -> None:
        if self.top_k != 2:
            raise ValueError(
                f"model.moe.top_k ({self.top_k}) must be 2 with router=gshard, which is top-2 by definition; "
                f"use router=topk for another top_k"
            )
        if not self.normalize_weights:
            raise ValueError("model.moe.normalize_weights must be true with router=gshard, which normalises")
        if self.capacity_factor is not None:
            raise ValueError(
                f"model.moe.capacity_factor ({self.capacity_factor}) must be null with router=gshard, "
                f"whose capacity is 2*ceil(T/E) by definition; use router=topk for another capacity"
            )
        others = {
            "scores": (self.scores, "softmax"),
            "weight_scale": (self.weight_scale, 1.0),
            "num_groups": (self.num_groups, None),
            "bias_balance_rate": (self.bias_balance_rate, None),
            "jitter": (self.jitter, None),
        }
        for name, (value, off) in others.items():
            if value != off:
                raise ValueError(f"model.moe.{name} ({value}) is read with router=topk alone, not with router=gshard")


@dataclass
class ModelConfig:
    """The shape of one decoder-only Transformer. `None` means: derived, as the comment beside the field says."""

    name: str
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    max_seq_len: int
    num_kv_heads: int | None = None  # num_heads
    head_dim: int | None = None  # d_model / num_heads
    vocab_size: int | None = None  # the tokenizer's
    embedding_dim: int | None = None  # d_model; another width adds a projection in and out (OPT-350m)
    norm: str = "layernorm"
    norm_position: str = "pre"
    norm_eps: float = 1e-5
    position: str = "sinusoidal"
    position_offset: int = 0  # index of the first position in the table: 2 in fairseq, OPT and XGLM
    rope_theta: float = 10000.0
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True
    qk_norm: str | None = None
    tie_embeddings: bool = True
    scale_embeddings: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init: str = "normal"
    init_std: float = 0.02  # read by init=normal
    expert_d_ff: int | None = None  # d_ff, the paper's rule: an expert is as wide as the dense FFN it replaces
    moe_placement: str = "last"
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        require_positive(
            "model",
            {
                name: getattr(self, name)
                for name in (
                    *("d_model", "d_ff", "num_layers", "num_heads", "max_seq_len", "num_kv_heads", "head_dim"),
                    *("vocab_size", "embedding_dim", "norm_eps", "rope_theta", "init_std", "expert_d_ff"),
                )
            },
        )
        require_fraction("model", {"dropout": self.dropout, "attention_dropout": self.attention_dropout})
        require_choice("model.norm", self.norm, ("layernorm", "rmsnorm"))
        require_choice("model.norm_position", self.norm_position, ("pre", "post"))
        require_choice("model.position", self.position, ("sinusoidal", "learned", "rope"))
        require_choice("model.activation", self.activation, ("gelu", "relu", "silu"))
        require_choice("model.init", self.init, ("normal", "fairseq"))
        require_choice("model.moe_placement", self.moe_placement, ("last", "first"))
        if self.qk_norm is not None:
            require_choice("model.qk_norm", self.qk_norm, ("head", "full"))
        if self.head_dim is None and self.d_model % self.num_heads != 0:
            raise ValueError(
                f"model.d_model ({self.d_model}) must be divisible by model.num_heads ({self.num_heads}); "
                f"change one of them or set model.head_dim"
            )
        if self.num_heads % self.kv_heads != 0:
            raise ValueError(
                f"model.num_heads ({self.num_heads}) must be divisible by model.num_kv_heads ({self.kv_heads}): "
                f"each key-value head serves an equal group of query heads"
            )
        if self.position == "rope" and self.head_width % 2 != 0:
            raise ValueError(f"the head width ({self.head_width}) must be even with model.position=rope")
        if self.position == "sinusoidal" and self.d_model % 2 != 0:
            raise ValueError(f"model.d_model ({self.d_model}) must be even with model.position=sinusoidal")
        if self.moe is not None and self.moe.moe_every > self.num_layers:
            raise ValueError(
                f"model.moe.moe_every ({self.moe.moe_every}) must be at most model.num_layers ({self.num_layers}); "
                f"otherwise no layer has experts"
            )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def expert_width(self) -> int:
        return self.d_ff if self.expert_d_ff is None else self.expert_d_ff

    @property
    def embedding_width(self) -> int:
        return self.d_model if self.embedding_dim is None else self.embedding_dim

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that hold experts, from 0; empty for a dense model."""
        if self.moe is None:
            return ()
        shift = 1 if self.moe_placement == "last" else 0
        return tuple(i for i in range(self.num_layers) if (i + shift) % self.moe.moe_every == 0)


@dataclass
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    name: str
    path: list[str] = field(default_factory=list)  # files, folders and globs of data=text
    text_field: str = "text"  # the column or key that holds the text in .jsonl and .parquet
    tokenizer: str | None = None  # a sentencepiece model file; None trains one on the training split
    tokenizer_type: str = "bpe"
    vocab_size: int = 4096  # of the tokenizer that is trained; a given tokenizer brings its own
    seq_len: int | None = None  # model.max_seq_len
    document_attention: str = "across"
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    cache_dir: str | None = None  # $XDG_CACHE_HOME/moe or ~/.cache/moe
    num_workers: int | None = None  # one per core

    def __post_init__(self) -> None:
        require_choice("data.name", self.name, ("python", "packages", "text"))
        require_choice("data.tokenizer_type", self.tokenizer_type, ("bpe", "unigram"))
        require_choice("data.document_attention", self.document_attention, ("across", "within"))
        require_positive(
            "data", {"vocab_size": self.vocab_size, "seq_len": self.seq_len, "num_workers": self.num_workers}
        )
        require_fraction("data", {"validation_fraction": self.validation_fraction, "test_fraction": self.test_fraction})
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise ValueError(
                f"data.validation_fraction + data.test_fraction "
                f"({self.validation_fraction} + {self.test_fraction}) must leave text to train on"
            )
        if self.name == "text" and not self.path:
            raise ValueError("data.path must name at least one file, folder or glob with data=text")
        if self.name != "text" and self.path:
            raise ValueError(f"data.path ({self.path}) is read only with data=text; this run has data={self.name}")


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
                "clip_norm": self.clip_norm,
            },
        )
        require_fraction("optim", {"beta1": self.beta1, "beta2": self.beta2})
        require_choice("optim.decay", self.decay, ("all", "matrices"))
        require_choice("optim.schedule", self.schedule, ("linear", "cosine", "wsd"))
        for name in ("weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} ({getattr(self, name)}) must not be negative")
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
        if self.max_skipped_steps < 0:
            raise ValueError(f"train.max_skipped_steps ({self.max_skipped_steps}) must not be negative")


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


@dataclass
class EvalConfig:
    """Validation while training, the final figures and the text samples."""

    every: int | None = None  # steps; None validates only at the end
    max_tokens: int | None = None  # per domain while training; None reads the whole split
    prompts: list[str] = field(default_factory=list)
    sample_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        require_positive(
            "eval", {"every": self.every, "max_tokens": self.max_tokens, "sample_tokens": self.sample_tokens}
        )
        if self.temperature < 0:
            raise ValueError(f"eval.temperature ({self.temperature}) must not be negative; 0 is greedy")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"eval.top_p ({self.top_p}) must be above 0 and at most 1")


@dataclass
class RunConfig:
    """One training run, whole."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seed: int = 0
    run_dir: str | None = None  # runs/<model>-<moe>-s<seed>-<config hash>
    init_from: str | None = None  # a run folder or checkpoint whose weights step 0 starts from
    resume: str = "auto"
    device: str = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        require_choice("resume", self.resume, ("auto", "never"))
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require_choice("backend", self.backend, ("auto", "triton", "torch", "reference"))
        if self.seed < 0:
            raise ValueError(f"seed ({self.seed}) must not be negative")
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
        """Sequences of one optimizer step."""
        return self.train.batch_tokens // self.seq_len

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one forward pass."""
        return self.batch_size if self.train.micro_batch_size is None else self.train.micro_batch_size
