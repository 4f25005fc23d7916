"""The shape of a model."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config.checks import require_choice, require_fraction, require_not_negative, require_positive


@dataclass
class MoEConfig:
    """The sparse part of a model; `model.moe: null` is its dense twin.

    Layer i (counted from 0) is sparse iff (i + 1) % moe_every == 0 (Artetxe et al. 2021, the paper's rule),
    or i % moe_every == 0 where `ModelConfig.moe_placement` is "first"; the first `ModelConfig.dense_layers` never are.
    """

    name: str
    num_experts: int  # experts per sparse layer
    top_k: int  # experts per token
    moe_every: int  # one layer in every moe_every is sparse
    router: str  # topk or gshard
    scores: str  # with router=topk: softmax or sigmoid
    normalize_weights: bool  # divide a token's expert weights by their sum
    weight_scale: float  # multiplies the expert weights
    num_groups: int | None  # with top_groups: blocks of experts, of which each token uses the best top_groups
    top_groups: int | None  # blocks of experts that a token may choose from
    bias_balance_rate: float | None  # auxiliary-loss-free balancing: how far a step moves an expert's bias; null: off
    jitter: float | None  # multiplies the router's input by 1 ± jitter in training; null: off
    second_policy: str  # with router=gshard: all, sampling or random
    shared_d_ff: int | None  # width of a shared dense network that every token also passes; null: none
    shared_gate: bool  # scale the shared network by a learned sigmoid gate
    capacity_factor: float | None  # rows per expert in training, times the mean; null: dropless
    eval_capacity_factor: float | None  # the same in evaluation
    load_balance_weight: float  # of the load-balance loss
    load_balance_choices: str  # what it counts: all choices, or first choices
    load_balance_scope: str  # what it balances: local (micro-batch of a rank), global or sequence
    load_balance_reduction: str  # over sparse layers: mean or sum
    router_z_loss_weight: float  # of the router z-loss

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
        if self.jitter is not None and self.jitter >= 1.0:
            raise ValueError(
                f"model.moe.jitter ({self.jitter}) must be below 1: the factor is between 1 - jitter and 1 + jitter"
            )
        weights = {"load_balance_weight": self.load_balance_weight, "router_z_loss_weight": self.router_z_loss_weight}
        require_not_negative("model.moe", weights, "0 switches it off")
        self._check_groups()

    def _check_groups(self) -> None:
        if self.num_groups is None and self.top_groups is None:
            return
        if self.num_groups is None or self.top_groups is None:
            raise ValueError(
                f"model.moe.num_groups ({self.num_groups}) and model.moe.top_groups ({self.top_groups}) "
                f"must be given together"
            )
        if self.num_experts % self.num_groups != 0:
            raise ValueError(
                f"model.moe.num_groups ({self.num_groups}) must divide model.moe.num_experts ({self.num_experts})"
            )
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"model.moe.top_groups ({self.top_groups}) must be at most model.moe.num_groups ({self.num_groups})"
            )
        room = self.top_groups * (self.num_experts // self.num_groups)
        if self.top_k > room:
            raise ValueError(
                f"model.moe.top_k ({self.top_k}) must be at most the {room} experts of model.moe.top_groups "
                f"({self.top_groups}) of {self.num_groups} groups"
            )

    def _check_names(self) -> None:
        require_choice("model.moe.router", self.router, ("topk", "gshard"))
        require_choice("model.moe.scores", self.scores, ("softmax", "sigmoid"))
        require_choice("model.moe.second_policy", self.second_policy, ("all", "sampling", "random"))
        require_choice("model.moe.load_balance_choices", self.load_balance_choices, ("all", "first"))
        require_choice("model.moe.load_balance_scope", self.load_balance_scope, ("local", "global", "sequence"))
        require_choice("model.moe.load_balance_reduction", self.load_balance_reduction, ("mean", "sum"))
        if self.router == "topk" and self.second_policy != "all":
            raise ValueError(f"model.moe.second_policy ({self.second_policy!r}) applies only with router=gshard")

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
            "eval_capacity_factor": (self.eval_capacity_factor, None),
        }
        for name, (value, off) in others.items():
            if value != off:
                raise ValueError(f"model.moe.{name} ({value}) applies only with router=topk, not with router=gshard")


@dataclass
class RopeScalingConfig:
    """Rotary frequencies of a model whose context was lengthened after pretraining (moe.layers.position)."""

    kind: str  # linear or llama3
    factor: float  # how many times longer the context became
    low_freq_factor: float = 1.0  # with kind=llama3
    high_freq_factor: float = 4.0  # with kind=llama3
    original_max_seq_len: int | None = None  # with kind=llama3

    def __post_init__(self) -> None:
        require_choice("model.rope_scaling.kind", self.kind, ("linear", "llama3"))
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")
        require_positive("model.rope_scaling", {name: getattr(self, name) for name in names})
        if self.kind == "linear":
            return
        if self.original_max_seq_len is None:
            raise ValueError("model.rope_scaling.original_max_seq_len must be set with kind=llama3")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor ({self.low_freq_factor}) must be below high_freq_factor "
                f"({self.high_freq_factor})"
            )


@dataclass
class ModelConfig:
    """The shape of one decoder-only Transformer. `None` means derived, as the comment beside the field says."""

    name: str
    d_model: int  # width of the residual stream
    d_ff: int  # width of the dense feed-forward networks
    num_layers: int  # Transformer layers
    num_heads: int  # query heads
    max_seq_len: int  # longest sequence, in tokens
    num_kv_heads: int | None = None  # key-value heads; null: num_heads
    head_dim: int | None = None  # null: d_model / num_heads
    vocab_size: int | None = None  # null: the tokenizer's
    embedding_dim: int | None = None  # null: d_model; another width adds a projection in and out (OPT-350m)
    norm: str = "layernorm"  # layernorm or rmsnorm
    norm_position: str = "pre"  # pre or post
    norm_eps: float = 1e-5  # added to the variance
    position: str = "sinusoidal"  # sinusoidal, learned or rope
    position_offset: int = 0  # index of the first position in the table: 2 in fairseq, OPT and XGLM
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: RopeScalingConfig | None = None  # of a model whose context was lengthened; null: none
    activation: str = "gelu"  # gelu, gelu_tanh, relu or silu
    gated: bool = False  # gated feed-forward networks (SwiGLU with silu)
    bias: bool = True  # of linear layers, experts and LayerNorms
    qk_norm: str | None = None  # normalise queries and keys: by head, or full width; null: off
    tie_embeddings: bool = True  # share the embedding with the output layer
    scale_embeddings: bool = False  # multiply embeddings by √d_model
    dropout: float = 0.0  # of embeddings, residual branches and experts
    attention_dropout: float = 0.0  # of attention weights
    init: str = "normal"  # normal or fairseq
    init_std: float = 0.02  # with init=normal
    expert_d_ff: int | None = None  # width of an expert; null: d_ff, as in the paper
    moe_placement: str = "last"  # which layer of each moe_every is sparse: first or last
    dense_layers: int = 0  # number of first layers that stay dense (DeepSeek-V3)
    moe: MoEConfig | None = None  # the experts, set by +moe=PRESET; null: a dense model

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
        require_choice("model.activation", self.activation, ("gelu", "relu", "silu", "gelu_tanh"))
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
        if self.position != "rope" and self.rope_scaling is not None:
            raise ValueError(f"model.rope_scaling applies only with model.position=rope, not {self.position}")
        if self.position == "sinusoidal" and self.d_model % 2 != 0:
            raise ValueError(f"model.d_model ({self.d_model}) must be even with model.position=sinusoidal")
        if self.moe is not None and self.moe.moe_every > self.num_layers:
            raise ValueError(
                f"model.moe.moe_every ({self.moe.moe_every}) must be at most model.num_layers ({self.num_layers}); "
                f"otherwise no layer has experts"
            )
        if self.dense_layers < 0 or (self.moe is not None and not self.moe_layers):
            raise ValueError(
                f"model.dense_layers ({self.dense_layers}) must be at least 0 and leave a sparse layer among the "
                f"{self.num_layers} layers; lower it, or leave model.moe out"
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
        return tuple(i for i in range(self.dense_layers, self.num_layers) if (i + shift) % self.moe.moe_every == 0)
