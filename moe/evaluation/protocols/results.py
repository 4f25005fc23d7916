"""What evaluating a task gives: accuracy by run and group, with all that a reader needs to compare it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe.evaluation.perplexity import perplexity_of

# t of Student's distribution at 0.975 for 1, 2, ... degrees of freedom
_T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_Z975 = 1.959964


class RunResult(NamedTuple):
    """One draw of demonstrations over all questions."""

    credits: tuple[float, ...]  # of each question: 1 right, 0 wrong, 1/n in a tie of n with one that is right
    chosen: tuple[int, ...]  # the first of the best candidates; 0 in a last-word task
    num_ties: int
    mean_shots: float  # demonstrations that found room, per question
    num_cut: int  # questions that lost their beginning to fit max_seq_len
    dropped_fraction: float  # of the experts' choices; above 0 only for a model with an evaluation capacity
    nats: tuple[float, ...]  # of the last word, in a last-word task

    @property
    def accuracy(self) -> float:
        return math.fsum(self.credits) / len(self.credits)


class TaskResult(NamedTuple):
    """All runs of a task in one setting. `settings` says how it was asked."""

    settings: dict[str, Any]
    runs: tuple[RunResult, ...]
    chance: float  # expected accuracy of drawing candidates evenly
    groups: tuple[tuple[str, ...], ...]  # of each question, as "name=value"
    clusters: tuple[str, ...]  # of each question; those of one depend on each other

    @property
    def accuracy(self) -> float:
        """The mean over runs."""
        return math.fsum(run.accuracy for run in self.runs) / len(self.runs)

    @property
    def interval_over_demonstrations(self) -> tuple[float, float] | None:
        """95 % for the mean over draws of demonstrations, the questions being taken as given; None for a single run.

        The papers' own. It says nothing about other questions: twenty of them that are all right have no width.
        """
        return t_interval([run.accuracy for run in self.runs])

    @property
    def group_accuracies(self) -> dict[str, float]:
        """The mean over runs of the accuracy in each group of questions."""
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
        """Of the last word, in a last-word task: exp of its mean nats, inf where no float holds it."""
        nats = [value for run in self.runs for value in run.nats]
        return perplexity_of(math.fsum(nats) / len(nats)) if nats else None

    def as_dict(self) -> dict[str, Any]:
        """For results.json: plain numbers, with the credit of each question so that intervals can be resampled."""
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
    """95 % for the mean of independent `values`, by Student's t; None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    z = _Z975
    # beyond the table the first terms of Cornish and Fisher's expansion, right to 1e-5
    far = z + (z**3 + z) / (4 * (n - 1)) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * (n - 1) ** 2)
    t = _T975[n - 2] if n - 2 < len(_T975) else far
    return mean - t * spread, mean + t * spread
