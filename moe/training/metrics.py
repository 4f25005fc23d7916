"""The metrics of a step and the file that stores them. Everything a report shows is read back from that file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from moe.layers.router_losses import RoutingStatistics
from moe.training.over_ranks import RankMetrics


@dataclass(frozen=True)
class RouterMetrics:
    """The routing of one sparse layer in one step."""

    layer: int
    load_max_over_mean: float  # rows of the busiest expert over the mean
    load_cv: float  # rows per expert: standard deviation over the mean
    entropy: float  # of router probabilities, in nats, averaged over tokens
    dropped_fraction: float
    dead_experts: int  # experts without a single row in this step
    tokens_per_expert: list[int] | None  # None except every train.histogram_every steps


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl."""

    step: int
    tokens: int  # seen so far
    flops: float  # useful training FLOPs so far
    seconds: float  # spent in steps so far, over all resumptions
    cross_entropy: float  # nats per token
    load_balance_loss: float | None
    router_z_loss: float | None
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    skipped: bool  # no update was made: loss or gradient was not finite
    routers: list[RouterMetrics]
    ranks: RankMetrics | None = None  # None for one process
    loss_scale: float | None = None  # only with train.precision=fp16


# figures of held-out text by domain and name: {"docs": {"cross_entropy": 2.9, "bits_per_byte": 1.9, ...}}
Validation = dict[str, dict[str, float]]


def router_metrics(layer: int, statistics: RoutingStatistics, *, with_counts: bool) -> RouterMetrics:
    """One layer's statistics as Python numbers; `with_counts` adds the histogram over experts."""
    return RouterMetrics(
        layer=layer,
        load_max_over_mean=float(statistics.load_max_over_mean),
        load_cv=float(statistics.load_cv),
        entropy=float(statistics.entropy),
        dropped_fraction=float(statistics.dropped_fraction),
        dead_experts=int(statistics.dead_experts),
        tokens_per_expert=statistics.tokens_per_expert.tolist() if with_counts else None,
    )


class MetricsFile:
    """metrics.jsonl, opened to continue after `after_step`: lines of later steps and a torn last line are dropped.

    dropped_steps: the number of logged steps that were dropped.
    Raises ValueError, and changes nothing, if a line is damaged.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        self.dropped_steps = 0
        scratch = path.with_suffix(".jsonl.tmp")
        with scratch.open("w") as kept:
            for line, record in _lines(path) if path.exists() else ():
                if record["step"] <= after_step:
                    kept.write(line)
                elif "validation" not in record:
                    self.dropped_steps += 1
        os.replace(scratch, path)
        self._file: IO[str] = path.open("a")

    def step(self, metrics: StepMetrics) -> None:
        self._write(asdict(metrics))

    def validation(self, step: int, domains: Validation) -> None:
        self._write({"step": step, "validation": domains})

    def message(self, text: str) -> None:
        """Messages are only for the display."""

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(_without_nan(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _without_nan(value: Any) -> Any:
    """The record with None for numbers that are not finite, at any depth: JSON has no NaN, but a skipped step does."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    return [_without_nan(part) for part in value] if isinstance(value, (list, tuple)) else value


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl in order. A last line without a newline was torn by a crash and is left out."""
    return list(stream_metrics(path))


def stream_metrics(path: Path) -> Iterator[dict]:
    """Like `read_metrics`, one record at a time: the histograms of a long run take gigabytes.

    A null figure of a validation was not finite and is restored as NaN. Raises ValueError for a damaged line.
    """
    for _, record in _lines(path):
        if "validation" in record:
            record["validation"] = {
                domain: {name: math.nan if figure is None else figure for name, figure in figures.items()}
                for domain, figures in record["validation"].items()
            }
        yield record


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("step"), int)
        and isinstance(record.get("validation", {}), dict)
    )


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Each complete line and its parsed record."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
                if not _is_record(record):
                    raise ValueError("it is no record of a step or a validation")
            except ValueError as error:
                raise ValueError(
                    f"{path} line {number} is damaged ({error}), as a power cut or a full disk leaves it: "
                    f"delete the line, or what is damaged in it, and start the same command again"
                ) from error
            yield line, record
