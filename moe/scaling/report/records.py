"""What the report knows about each run, whoever trained it."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import mean
from typing import Any, NamedTuple

DENSE = "dense"
IN_DOMAIN, OUT_OF_DOMAIN, TASK = "in-domain", "out-of-domain", "task"


class Metric(NamedTuple):
    """One measured quantity. Losses are in nats per token, accuracies as written."""

    key: str  # "test/all", "ood/poetry", "task/copa acc"
    group: str  # IN_DOMAIN, OUT_OF_DOMAIN or TASK
    lower_is_better: bool


class Documents(NamedTuple):
    """One domain by document, in an order that all runs share."""

    nats: tuple[float, ...]
    num_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Record:
    """One complete run."""

    name: str
    size: str
    arm: str
    num_experts: int | None
    tokens: int
    seed: int
    costs: dict[str, float]  # "flops", "seconds", "peak_memory_bytes", "parameter_bytes"
    metrics: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)  # for its table row: parameters, learning rate, folder, commit
    documents: dict[str, Documents] = field(default_factory=dict)
    tokens_per_expert: tuple[tuple[int, ...], ...] = ()  # [MoE layer][expert], for the test split


@dataclass(frozen=True)
class Found:
    """A study as found. Incomplete runs are listed in `missing` and counted nowhere."""

    name: str
    design: str
    statement: str
    learning_rate_rule: str
    metrics: tuple[Metric, ...]
    records: tuple[Record, ...]
    missing: dict[str, str]  # run: reason
    pairs: tuple[dict[str, Any], ...] = ()
    tolerance: float | None = None
    sweep: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One model: all seeds of one size, arm and budget."""

    size: str
    arm: str
    num_experts: int | None
    tokens: int
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        return f"{self.size} {self.arm}"

    @property
    def is_dense(self) -> bool:
        return self.num_experts is None

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record.seed for record in self.records)

    def values(self, metric: str) -> list[float]:
        """Values of every seed that has the metric."""
        return [record.metrics[metric] for record in self.records if metric in record.metrics]

    def cost(self, name: str) -> float | None:
        """Mean over seeds; None if any run lacks it."""
        costs = [record.costs[name] for record in self.records if name in record.costs]
        return mean(costs) if len(costs) == len(self.records) else None


def cells(found: Found) -> list[Cell]:
    """The models of a study, by budget, then by FLOPs; seeds in order."""
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in found.records:
        groups.setdefault((record.size, record.arm, record.tokens), []).append(record)
    made = [
        Cell(size, arm, of[0].num_experts, tokens, tuple(sorted(of, key=lambda record: record.seed)))
        for (size, arm, tokens), of in groups.items()
    ]
    return sorted(made, key=lambda cell: (cell.tokens, cell.cost("flops") or 0.0, cell.name))


def dense_family(of: list[Cell], sparse: Cell) -> list[Cell]:
    """The dense models to compare a sparse one with: those of the same token budget."""
    return [cell for cell in of if cell.is_dense and cell.tokens == sparse.tokens]
