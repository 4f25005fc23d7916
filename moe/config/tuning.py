"""How a trained model is tuned on instructions or on one task. `tune: null` is pretraining."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.config.checks import require_choice, require_fraction, require_not_negative, require_positive


@dataclass
class SingleTaskConfig:
    """One task of a paper's evaluation protocol, whose prompts are trained on (Artetxe et al. 2021)."""

    name: str
    data_dir: str | None = None  # folder of the data sets, as for `moe eval --data-dir`
    protocol: str = "artetxe2021"  # whose prompts: artetxe2021 or xglm
    language: str | None = None  # of a task in several languages
    train_split: str | None = None  # null: the split that demonstrations come from
    evaluation_split: str | None = None  # null: the split that is evaluated
    evaluation_fraction: float | None = None  # of a task with one split: cut off for evaluation, the same for all seeds
    held_out_fraction: float = 0.2  # of the training split, on which the best checkpoint is chosen

    def __post_init__(self) -> None:
        if self.evaluation_fraction is not None and not 0.0 < self.evaluation_fraction < 1.0:
            raise ValueError(f"tune.task.evaluation_fraction ({self.evaluation_fraction}) must be between 0 and 1")
        if self.evaluation_fraction is not None and self.evaluation_split is not None:
            raise ValueError(
                f"tune.task.evaluation_fraction ({self.evaluation_fraction}) cuts the evaluation off the training "
                f"split, and tune.task.evaluation_split ({self.evaluation_split}) names another: give one of them"
            )
        if not 0.0 < self.held_out_fraction < 1.0:
            raise ValueError(f"tune.task.held_out_fraction ({self.held_out_fraction}) must be between 0 and 1")


@dataclass
class TuneConfig:
    """Examples, their mixture and form, and the treatment of a sparse model's routers and experts.

    `None` in the fields of the model keeps the checkpoint's value.
    """

    name: str
    benchmark: str | None = None  # folder written by `moe instruct build`
    task: SingleTaskConfig | None = None  # one task instead of a benchmark: fine-tuning
    # which tasks
    num_tasks: int | None = None  # null: all; subsets are nested, tasks evaluated at level 3 come first
    num_categories: int | None = None  # the largest ones, after always_categories; null: all
    always_categories: list[str] = field(default_factory=list)  # categories that every subset contains
    # how often
    eta: int | None = None  # limit on the examples that count for a task's weight; null: all
    benchmark_shares: dict[str, float] = field(default_factory=dict)  # relative; empty: they follow from eta
    extra_shares: dict[str, float] = field(default_factory=dict)  # of all examples, taken from the largest share
    pretraining_share: float = 0.0  # of the sequences that are text of `data`
    # in which form
    loss_on: str = "target"  # target; suffix: from the first demonstration's answer on; or all
    truncation: str = "left"  # side on which long inputs are cut: left or right
    long_targets: str = "error"  # error or drop
    leading_separator: bool = True  # begin every sequence with a separator
    vary_layout: bool = True  # draw delimiters and lead-ins; false: one fixed layout
    demonstrations_zipf: float | None = None  # exponent of the number of demonstrations; null: none are shown
    max_demonstrations: int = 5  # of one example
    separator: str = "\n\n\n"  # between demonstrations
    # the model
    dropout: float | None = None  # of the model; null: the checkpoint's
    attention_dropout: float | None = None  # null: the checkpoint's
    expert_dropout: float | None = None  # inside experts; null: as dropout
    freeze_router: bool = False  # train everything but the routers
    load_balance_weight: float | None = None  # null: the checkpoint's
    router_z_loss_weight: float | None = None  # null: the checkpoint's
    dropless: bool = False  # train without the checkpoint's capacity
    capacity_factor: float | None = None  # null: the checkpoint's
    eval_capacity_factor: float | None = None  # null: the checkpoint's
    # the result
    keep_best: str | None = None  # by accuracy or cross_entropy on held-out examples; null: keep the last weights

    def __post_init__(self) -> None:
        require_choice("tune.loss_on", self.loss_on, ("target", "suffix", "all"))
        require_choice("tune.truncation", self.truncation, ("left", "right"))
        require_choice("tune.long_targets", self.long_targets, ("error", "drop"))
        if self.keep_best is not None:
            require_choice("tune.keep_best", self.keep_best, ("accuracy", "cross_entropy"))
        counts = ("num_tasks", "num_categories", "eta", "demonstrations_zipf", "max_demonstrations")
        require_positive("tune", {name: getattr(self, name) for name in (*counts, "capacity_factor")})
        require_positive("tune", {"eval_capacity_factor": self.eval_capacity_factor})
        fractions = ("pretraining_share", "dropout", "attention_dropout", "expert_dropout")
        require_fraction("tune", {name: value for name in fractions if (value := getattr(self, name)) is not None})
        weights = {"load_balance_weight": self.load_balance_weight, "router_z_loss_weight": self.router_z_loss_weight}
        require_not_negative("tune", weights, "0 switches it off")
        self._check_source()
        self._check_shares()
        if self.dropless and (self.capacity_factor is not None or self.eval_capacity_factor is not None):
            raise ValueError("tune.dropless=true takes the capacity away: leave tune.capacity_factor out")
        if self.loss_on == "suffix" and self.demonstrations_zipf is None:
            raise ValueError(
                "tune.loss_on=suffix counts the demonstrations' answers, but there are no demonstrations: set "
                "tune.demonstrations_zipf"
            )

    def require_source(self) -> None:
        """Raise ValueError unless the source of the examples is set. Experiments leave that to the user."""
        if self.task is not None and self.task.data_dir is None:
            raise ValueError("tune.task.data_dir must name the folder of the data sets (docs/finetuning.md)")
        if self.task is None and self.benchmark is None:
            raise ValueError("tune.benchmark must name a folder that `moe instruct build` wrote (docs/opt_iml.md)")

    def _check_source(self) -> None:
        if self.task is not None and self.benchmark is not None:
            raise ValueError(f"tune.benchmark ({self.benchmark}) and tune.task ({self.task.name}) exclude each other")
        if self.task is not None:
            of_mixtures = ("num_tasks", "num_categories", "eta", "benchmark_shares", "extra_shares")
            given = [name for name in (*of_mixtures, "demonstrations_zipf") if getattr(self, name)]
            if given:
                raise ValueError(
                    f"tune.{given[0]} chooses among many tasks, but tune.task is a single one: leave it out"
                )
        elif self.keep_best == "accuracy":
            raise ValueError("tune.keep_best=accuracy is measured only on tune.task; use cross_entropy or null")

    def _check_shares(self) -> None:
        for key, table in (("benchmark_shares", self.benchmark_shares), ("extra_shares", self.extra_shares)):
            require_not_negative(f"tune.{key}", table, "0 leaves the benchmark out")
        if self.benchmark_shares and sum(self.benchmark_shares.values()) <= 0:
            raise ValueError("tune.benchmark_shares are all 0: give the benchmarks to train on a share")
        both = sorted(self.benchmark_shares.keys() & self.extra_shares.keys())
        if both:
            raise ValueError(f"{both[0]} is in tune.benchmark_shares and in tune.extra_shares: keep one of them")
        if sum(self.extra_shares.values()) >= 1:
            raise ValueError(
                f"tune.extra_shares ({self.extra_shares}) are of all examples and must leave room for others"
            )
