"""Results of a task: accuracy by run and by group, and the settings needed to compare it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe.evaluation.perplexity import perplexity_of

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom
_T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_Z975 = 1.959964


class RunResult(NamedTuple):
    """All questions with one draw of demonstrations."""

    credits: tuple[float, ...]  # per question: 1 if right, 0 if wrong, 1/n for a tie of n that contains a right one
    chosen: tuple[int, ...]  # per question, the first of the best candidates; 0 in a last-word task
    num_ties: int
    mean_shots: float  # demonstrations that fit, per question
    num_cut: int  # questions cut at the beginning to fit max_seq_len
    dropped_fraction: float  # of the (token, expert) choices; above 0 only if the model has an evaluation capacity
    nats: tuple[float, ...]  # of the last word, per question, in a last-word task

    @property
    def accuracy(self) -> float:
        return math.fsum(self.credits) / len(self.credits)


class Contrast(NamedTuple):
    """Pairs of questions that differ in one thing alone, such as the gender of a pronoun."""

    name: str
    pairs: tuple[tuple[int, int], ...]  # (a question, the one that is subtracted)


class TaskResult(NamedTuple):
    """All runs of a task in one setting; `settings` records the setting."""

    settings: dict[str, Any]
    runs: tuple[RunResult, ...]
    chance: float  # expected accuracy of choosing candidates at random
    groups: tuple[tuple[str, ...], ...]  # per question, as "name=value"
    clusters: tuple[str, ...]  # per question; those of one cluster are dependent
    contrast: Contrast | None = None

    @property
    def accuracy(self) -> float:
        """The mean over runs."""
        return math.fsum(run.accuracy for run in self.runs) / len(self.runs)

    @property
    def interval_over_demonstrations(self) -> tuple[float, float] | None:
        """95 % interval for the mean over demonstration draws, with the questions fixed; None for a single run.

        This is the papers' interval. It says nothing about other questions: twenty questions that are all right give
        width 0.
        """
        return t_interval([run.accuracy for run in self.runs])

    @property
    def group_accuracies(self) -> dict[str, float]:
        """Accuracy in each group of questions, averaged over runs."""
        members: dict[str, list[int]] = {}
        for i, names in enumerate(self.groups):
            for name in names:
                members.setdefault(name, []).append(i)
        return {
            name: math.fsum(run.credits[i] for run in self.runs for i in rows) / (len(rows) * len(self.runs))
            for name, rows in sorted(members.items())
        }

    @property
    def perplexity(self) -> float | None:
        """Of the last word, in a last-word task: exp of its mean nats, inf if that overflows a float."""
        nats = [value for run in self.runs for value in run.nats]
        return perplexity_of(math.fsum(nats) / len(nats)) if nats else None

    def as_dict(self) -> dict[str, Any]:
        """For results.json: plain values, with the credit of each question so that intervals can be resampled."""
        perplexity = self.perplexity  # JSON has no infinity
        over = self.interval_over_demonstrations
        return {
            "settings": self.settings,
            "accuracy": self.accuracy,
            "interval_over_demonstrations": None if over is None else list(over),
            "perplexity": perplexity if perplexity is not None and math.isfinite(perplexity) else None,
            "chance": self.chance,
            "num_examples": len(self.groups),
            "num_clusters": len(set(self.clusters)),
            "clusters": list(self.clusters) if len(set(self.clusters)) < len(self.clusters) else None,
            "groups": self.group_accuracies,
            "pairs": None if self.contrast is None else [list(pair) for pair in self.contrast.pairs],
            "runs": [
                {
                    "accuracy": run.accuracy,
                    "num_ties": run.num_ties,
                    "mean_shots": run.mean_shots,
                    "num_cut": run.num_cut,
                    "dropped_fraction": run.dropped_fraction,
                    "credits": list(run.credits),
                }
                for run in self.runs
            ],
        }


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % Student's t interval for the mean of independent `values`; None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    z = _Z975
    # beyond the table: first terms of the Cornish-Fisher expansion, accurate to 1e-5
    far = z + (z**3 + z) / (4 * (n - 1)) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * (n - 1) ** 2)
    t = _T975[n - 2] if n - 2 < len(_T975) else far
    return mean - t * spread, mean + t * spread
