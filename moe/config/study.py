"""A compute-matched study: what is trained and compared, and at what cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe.config.checks import require_choice, require_positive

DESIGNS = ("frontier", "matched")


@dataclass
class SizeConfig:
    """One size of the ladder: its dense model and its sparse models."""

    overrides: list[str] = field(default_factory=list)  # of `moe train`, as model=ladder_64
    dense: bool = True
    experts: list[int] = field(default_factory=list)  # one sparse model for each count
    seeds: list[int] = field(default_factory=lambda: [0])
    tokens: list[int] | None = None  # budgets of this size; None is the study's

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("sizes.*.seeds must name at least one seed")
        _require_distinct("sizes.*", {"experts": self.experts, "seeds": self.seeds, "tokens": self.tokens})
        if not self.dense and not self.experts:
            raise ValueError("sizes.*.dense is false and sizes.*.experts is empty: the size has no model; drop it")


@dataclass
class SecondSweepConfig:
    """A sweep of the dense model at another size: the two together measure how the winner changes with the width."""

    size: str
    grid: dict[str, list[float]]  # the fields of sweep.grid, with values of their own


@dataclass
class SweepConfig:
    """The same grid for every arm, at one size; a rule carries the winner on the validation split to all sizes."""

    size: str
    grid: dict[str, list[float]]  # fields of optim and their values, such as optim.lr: [0.002, 0.004]
    seeds: list[int] = field(default_factory=lambda: [0])
    tokens: int | None = None  # None is the size's first budget
    width_power: float = 0.0  # optim.lr of another size is the winner's times (its d_model / the swept one's) ** this
    second: SecondSweepConfig | None = None  # measures a power for each field instead of width_power

    def __post_init__(self) -> None:
        require_positive("sweep", {"tokens": self.tokens})
        grids = [self.grid] if self.second is None else [self.grid, self.second.grid]
        if not all(grid and all(grid.values()) for grid in grids) or not self.seeds:
            raise ValueError("sweep's grids and seeds must name at least one value each, or leave `sweep` out")
        _require_distinct("sweep", {"seeds": self.seeds})
        for grid in grids:
            _require_distinct("sweep.grid", grid)
        for key in self.grid:
            if not key.startswith("optim."):
                raise ValueError(
                    f"sweep.grid.{key} must be a field of optim, such as optim.lr: both arms share all else"
                )
        if self.second is not None:
            self._check_second(self.second)

    def _check_second(self, second: SecondSweepConfig) -> None:
        if set(second.grid) != set(self.grid):
            raise ValueError(
                f"sweep.second.grid must have the fields of sweep.grid ({', '.join(self.grid)}), not "
                f"{', '.join(second.grid)}"
            )
        if second.size == self.size:
            raise ValueError(f"sweep.second.size ({self.size}) must be another size than sweep.size")
        if self.width_power:
            raise ValueError(f"width_power ({self.width_power}) states what sweep.second measures: give only one")
        for key, values in (*self.grid.items(), *second.grid.items()):
            if min(values) <= 0.0:
                raise ValueError(
                    f"sweep's {key} ({min(values)}) must be above 0: sweep.second takes powers of its ratios"
                )


@dataclass
class StudyConfig:
    """A whole study. Every run follows from it."""

    name: str
    design: str  # "frontier" or "matched": moe.scaling.study.design
    sizes: dict[str, SizeConfig]
    tokens: list[int]  # budgets; each is a separate run, because the schedule ends with it
    overrides: list[str] = field(default_factory=list)  # of every run
    sparse_overrides: list[str] = field(default_factory=lambda: ["+moe={experts}e"])
    vary: str = "experts"  # of design=matched: whose width is solved for, "experts" or "dense"
    tolerance: float = 0.01  # of design=matched: the largest relative difference of FLOPs per token
    width_multiple: int = 8  # of the width that is solved for
    sweep: SweepConfig | None = None  # None: the learning rates that the overrides state
    max_epochs: float | None = 1.0  # of the corpus that a run may read
    data_folder: str | None = None  # replaces {data_folder} in overrides and evaluations
    evaluations: dict[str, list[str]] = field(default_factory=dict)  # file of a run folder: arguments of `moe`
    folder: str | None = None  # studies/<name>
    threads: int = 1  # of one run
    jobs: int | None = None  # runs at a time; None is cores / threads
    tokens_per_second: dict[str, float] = field(default_factory=dict)  # measured, of <size>-<arm>; only for estimates
    slurm: dict[str, Any] = field(default_factory=dict)  # fields of moe.launch.SlurmJob, read by --submit

    def __post_init__(self) -> None:
        require_choice("design", self.design, DESIGNS)
        require_choice("vary", self.vary, ("experts", "dense"))
        numbers = ("width_multiple", "max_epochs", "threads", "jobs")
        require_positive("study", {name: getattr(self, name) for name in numbers})
        require_positive("tokens_per_second", self.tokens_per_second)
        if not self.sizes or not self.tokens:
            raise ValueError("a study needs at least one entry in `sizes` and one in `tokens`")
        _require_distinct("study", {"tokens": self.tokens})
        if not 0.0 < self.tolerance < 1.0:
            raise ValueError(f"tolerance ({self.tolerance}) must be between 0 and 1; the designs are made for 0.01")
        for name, size in self.sizes.items():
            _require_file_name("sizes", name)
            for tokens in self.budgets(name):
                if tokens <= 0:
                    raise ValueError(f"tokens ({tokens}, of size {name}) must be above 0")
            if self.design == "matched" and not size.experts:
                raise ValueError(f"sizes.{name}.experts is empty: design=matched compares pairs; add a count")
        swept = {} if self.sweep is None else {"sweep.size": self.sweep.size}
        if self.sweep is not None and self.sweep.second is not None:
            swept["sweep.second.size"] = self.sweep.second.size
        for field_name, size_name in swept.items():
            if size_name not in self.sizes:
                raise ValueError(f"{field_name} ({size_name}) must be one of sizes: {', '.join(self.sizes)}")

    def budgets(self, size: str) -> list[int]:
        """Training tokens of each run of one size."""
        own = self.sizes[size].tokens
        return self.tokens if own is None else own


def _require_distinct(owner: str, fields: Mapping[str, Sequence[float] | None]) -> None:
    """Raise ValueError for the first field with a repeated value: one training would be counted as two."""
    for name, values in fields.items():
        twice = [value for place, value in enumerate(values or ()) if value in (values or ())[:place]]
        if twice:
            raise ValueError(f"{owner}.{name} has {twice[0]} twice: each value is a separate run, remove one")


def _require_file_name(owner: str, name: str) -> None:
    """Raise ValueError for a name that cannot be part of folder and job names."""
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise ValueError(f"{owner}.{name!r} becomes part of file names: use only letters, digits and . - _")
