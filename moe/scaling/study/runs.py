"""All training runs of a study, the sweep's winners, and the total cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from moe.config import RunConfig
from moe.config.fields import as_override
from moe.config.study import StudyConfig
from moe.scaling.study.design import Arm, Design
from moe.scaling.study.sweep import Choices, sweeps, transferred
from moe.training.divergence import read_divergence

SWEEP, MAIN = "sweep", "main"


@dataclass(frozen=True)
class Run:
    """One training run and its evaluations."""

    name: str
    stage: str  # "sweep" or "main"
    arm: Arm
    tokens: int  # trained on, in whole steps
    seed: int
    candidate: int | None  # index in the grid, for a sweep run
    optim: dict[str, float]  # the fields set by the sweep
    overrides: tuple[str, ...]  # for `moe train`
    num_steps: int

    @property
    def flops(self) -> float:
        return self.arm.flops_per_token * self.tokens

    @property
    def config(self) -> RunConfig:
        """The composed configuration, built without composing again: a study has many runs of few models."""
        base = self.arm.config
        changes: dict[str, Any] = {key.removeprefix("optim."): value for key, value in self.optim.items()}
        optim = replace(base.optim, **changes)
        train = replace(base.train, num_steps=self.num_steps)
        return replace(base, optim=optim, train=train, seed=self.seed)


def sweep_runs(study: StudyConfig, design: Design, folder: Path) -> list[Run]:
    """The same grid for every arm of the swept size, and the second size's grid; empty without a sweep."""
    if study.sweep is None:
        return []
    runs = []
    for swept in sweeps(study, design):
        tokens = study.budgets(swept.arm.size)[0] if study.sweep.tokens is None else study.sweep.tokens
        for number, optim in enumerate(swept.candidates):
            for seed in study.sweep.seeds:
                name = f"sweep-{swept.arm.size}-{swept.arm.name}-c{number}-s{seed}"
                runs.append(_run(study, folder, name, SWEEP, swept.arm, tokens, seed, optim, number))
    return runs


def main_runs(study: StudyConfig, design: Design, folder: Path, choices: Choices) -> list[Run]:
    """All runs to compare, cheapest first, with the learning rates chosen by the sweep and transferred by its rule.

    Raises ValueError for two budgets that round to the same number of steps: a report would count one seed twice.
    """
    runs = []
    for arm in design.arms:
        made: dict[tuple[int, int], str] = {}  # by tokens and seed
        for tokens in study.budgets(arm.size):
            for seed in study.sizes[arm.size].seeds:
                name = f"{arm.size}-{arm.name}-t{_short(tokens)}-s{seed}"
                optim = transferred(study, design, arm, choices)
                run = _run(study, folder, name, MAIN, arm, tokens, seed, optim, None)
                first = made.setdefault((run.tokens, seed), name)
                if first != name:
                    raise ValueError(
                        f"{first} and {name} both train on {run.tokens:,} tokens, whole steps of "
                        f"{arm.config.train.batch_tokens:,}: leave one of these budgets out of tokens"
                    )
                runs.append(run)
    return sorted(runs, key=lambda run: run.flops)


def choose(study: StudyConfig, design: Design, folder: Path) -> dict[str, Any]:
    """The winner of each sweep by mean cross-entropy on the validation split; the test split is not read.

    {name: {"optim": {...}, "edge": fields whose winner is the smallest or largest of its values, "scores": [...]}}; a
    diverged candidate's score is None. Raises ValueError for a sweep that is incomplete or in which every candidate
    diverged.
    """
    chosen: dict[str, Any] = {}
    runs = sweep_runs(study, design, folder)
    for swept in sweeps(study, design) if study.sweep is not None else []:
        scores: list[dict[str, Any]] = []
        for number, optim in enumerate(swept.candidates):
            own = [run for run in runs if run.arm == swept.arm and run.candidate == number]
            loss = mean(final_loss(folder / "runs" / run.name, run) for run in own)
            told = loss if loss < math.inf else None  # JSON has no infinity
            scores.append({"optim": optim, "validation_cross_entropy": told, "runs": [run.name for run in own]})
        known = [score for score in scores if score["validation_cross_entropy"] is not None]
        if not known:
            raise ValueError(
                f"every candidate of the sweep of {swept.name} diverged: none can be chosen; give sweep.grid lower "
                f"values and the study another folder"
            )
        best = min(known, key=lambda score: score["validation_cross_entropy"])
        edge = [
            key
            for key, values in swept.grid.items()
            if len(values) > 1 and best["optim"][key] in (min(values), max(values))
        ]
        chosen[swept.name] = {"optim": best["optim"], "edge": edge, "scores": scores}
    return chosen


def read_results(run_dir: Path) -> dict[str, Any]:
    """results.json of a complete run. Raises ValueError if it is missing or incomplete."""
    path = run_dir / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{run_dir} has no results.json: the run is not complete") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): delete {run_dir} to train it again") from error
    if not isinstance(results, dict) or "splits" not in results:
        raise ValueError(f"{path} has no field 'splits': it is not a run's results; delete {run_dir} to train it again")
    return results


def final_loss(run_dir: Path, run: Run) -> float:
    """The `validation_loss` of a complete run; infinite for one that gave up because it diverged.

    Raises ValueError for any other run.
    """
    if not (run_dir / "results.json").exists() and read_divergence(run_dir, run.config.train.max_skipped_steps):
        return math.inf
    return validation_loss(read_results(run_dir))


def validation_loss(results: Mapping[str, Any]) -> float:
    """Nats per token over all domains of the validation split; infinite if the run diverged."""
    domains = results["splits"]["validation"]["domains"].values()
    if any(domain["cross_entropy"] is None for domain in domains):  # not finite
        return math.inf
    tokens = sum(domain["num_tokens"] for domain in domains)
    loss = sum(domain["cross_entropy"] * domain["num_tokens"] for domain in domains) / tokens
    return float(loss) if math.isfinite(loss) else math.inf


def core_minutes(study: StudyConfig, runs: Iterable[Run]) -> tuple[float, list[str]]:
    """Single-core minutes at the study's measured tokens_per_second, and the arms missing from that table."""
    total, unknown = 0.0, set()
    for run in runs:
        rate = study.tokens_per_second.get(f"{run.arm.size}-{run.arm.name}")
        if rate is None:
            unknown.add(f"{run.arm.size}-{run.arm.name}")
        else:
            total += run.tokens / rate * study.threads / 60
    return total, sorted(unknown)


def _run(
    study: StudyConfig,
    folder: Path,
    name: str,
    stage: str,
    arm: Arm,
    tokens: int,
    seed: int,
    optim: dict[str, float],
    candidate: int | None,
) -> Run:
    batch = arm.config.train.batch_tokens
    steps = max(1, round(tokens / batch))
    overrides = (
        *arm.overrides,
        *(f"{key}={value!r}" for key, value in optim.items()),
        *(f"train.num_steps={steps}", f"seed={seed}", f"run_dir={as_override(str(folder / 'runs' / name))}"),
    )
    return Run(name, stage, arm, steps * batch, seed, candidate, optim, overrides, steps)


def _short(tokens: int) -> str:
    """A budget for use in a name: 2000000 is 2M, 1500000 is 1.5M; exact, so that no two budgets share a folder."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if tokens >= size:
            return f"{tokens / size:.12g}{unit}"
    return str(tokens)
