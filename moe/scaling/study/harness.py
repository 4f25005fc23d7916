"""Runs a study from start to end: prepare the text, sweep, choose, train, evaluate. Any step may be interrupted.

<folder>/study.json   the study's definition, which the report reads along with the runs
<folder>/runs/<run>/  run folders of `moe train`, with the evaluations' files
<folder>/started/     which commit started each run, when and with which command
<folder>/logs/  locks/  slurm/
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.compose import differences, from_yaml
from moe.config.study import StudyConfig
from moe.scaling.report.read import read_starts
from moe.scaling.study.design import Design, derive, unbracketed
from moe.scaling.study.files import fill, stored_study, study_folder
from moe.scaling.study.hydra_launch import launch
from moe.scaling.study.manifest import record_start, require_name, write_manifest
from moe.scaling.study.processes import MOE, Job, Outcome, Processes, Step
from moe.scaling.study.runs import MAIN, Run, choose, core_minutes, main_runs, sweep_runs
from moe.scaling.study.sweep import first_choices, winners
from moe.training.divergence import read_divergence

_BEGUN = {"corpus.json", "config.yaml.tmp"}  # files a run folder may hold before the run has begun
Say = Callable[[str], None]


def run_study(study: StudyConfig, say: Say, launcher: Sequence[str] = ()) -> Outcome:
    """Run the study as far as it goes. Calling it again continues it, and does nothing when everything is done.

    `launcher`: Hydra overrides that select a launcher plugin to start the runs. Raises ValueError for an invalid study
    (moe.scaling.study.design), and for a folder that holds another one.
    """
    folder, design = study_folder(study), derive(study)
    for note in unbracketed(design) if study.design == "frontier" else []:
        say(f"note: speedups may be undefined for {note}")
    require_name(folder, study)
    corpus = prepare_corpus(study, design, folder)

    def work(runs: Sequence[Run]) -> Outcome:
        jobs = [make_job(study, folder, run) for run in runs]
        if launcher:
            outcome = launch(folder, jobs, launcher)
        else:
            outcome = Processes(folder, jobs=num_jobs(study), threads=study.threads, say=say).work(jobs)
        outcome.diverged = [job.name for job in jobs if job.has_diverged]
        return outcome

    sweep = sweep_runs(study, design, folder)
    require_same(folder, sweep)
    if sweep:
        write_manifest(folder, study, design, sweep, {}, corpus)
        # sweep runs only choose the learning rate and are not evaluated
        swept = work(sweep)
        if swept.failed or swept.stopped:
            return swept
    chosen = choose(study, design, folder)
    for arm, winner in chosen.items():
        edge = f"; {', '.join(winner['edge'])} at the edge of the grid" if winner["edge"] else ""
        say(f"sweep: {arm} takes {_settings(winner['optim'])}{edge}")
    main = main_runs(study, design, folder, winners(chosen))
    require_same(folder, main)
    write_manifest(folder, study, design, [*sweep, *main], chosen, corpus)
    outcome = work(main)
    if sweep:
        outcome.skipped = [*swept.skipped, *outcome.skipped]
        outcome.done = [*swept.done, *outcome.done]
    return outcome


def run_alone(folder: Path, name: str, say: Say) -> Outcome:
    """One run of the study in `folder`, with its evaluations; a launcher's job calls this.

    Raises ValueError for a run that is not in the study, and for one whose learning rate has not been chosen yet.
    """
    study = replace(stored_study(folder), folder=str(folder))  # the folder may have moved
    planned, known = planned_runs(study, derive(study))
    runs = {run.name: run for run in planned}
    if name not in runs:
        raise ValueError(f"the study in {folder} has no run {name}")
    if runs[name].stage == MAIN and not known:
        raise ValueError(f"{name} takes what the sweep of {folder} chooses, and its runs are not all complete")
    return Processes(folder, jobs=1, threads=study.threads, say=say).work([make_job(study, folder, runs[name])])


def planned_runs(study: StudyConfig, design: Design) -> tuple[list[Run], bool]:
    """All runs, and whether the sweep has chosen; until then the main runs carry its first candidate."""
    folder = study_folder(study)
    sweep = sweep_runs(study, design, folder)
    try:
        choices = winners(choose(study, design, folder))
        known = True
    except ValueError:
        choices = first_choices(study, design)
        known = False
    return [*sweep, *main_runs(study, design, folder, choices)], known


def plan_table(study: StudyConfig) -> str:
    """Every run with its cost and state, and the total in core-minutes at the study's measured rates."""
    design, folder = derive(study), study_folder(study)
    runs, known = planned_runs(study, design)
    lines = [f"{'run':<32} {'parameters':>12} {'active':>12} {'tokens':>12} {'FLOPs':>10} {'minutes':>8}  state"]
    for run in runs:
        minutes, unknown = core_minutes(study, [run])
        job = make_job(study, folder, run)
        state = "left" if job.left else "diverged" if job.has_diverged else "done"
        cells = [f"{run.name:<32} {run.arm.total_params:>12,} {run.arm.active_params:>12,} {run.tokens:>12,}"]
        cells += [f"{run.flops:>10.3e} {'?' if unknown else f'{minutes:.1f}':>8}  {state}"]
        lines.append(" ".join(cells))
    total, unknown = core_minutes(study, runs)
    left, _ = core_minutes(study, [run for run in runs if make_job(study, folder, run).left])
    lines += [f"{len(runs)} runs, {total:.0f} core-minutes by tokens_per_second, {left:.0f} of them left"]
    if unknown:
        lines.append(f"tokens_per_second does not have: {', '.join(unknown)}")
    if not known:
        lines.append("the sweep is not complete: learning rates of the other runs follow from it")
    lines += [f"pair {pair.size}: {pair.sparse.name} {pair.difference:+.2%} FLOPs per token" for pair in design.pairs]
    lines += [f"note: speedups may be undefined for {note}" for note in unbracketed(design)]
    return "\n".join(lines)


def prepare_corpus(study: StudyConfig, design: Design, folder: Path) -> dict[str, Any]:
    """Run `moe prepare` once, before parallel runs would all do so. Returns the counts of the training split.

    Raises ValueError if sizes read different text, or a run would read the text more than max_epochs times.
    """
    first = design.arms[0]
    for arm in design.arms:
        if arm.config.data != first.config.data or arm.config.seq_len != first.config.seq_len:
            raise ValueError(
                f"{arm.size}-{arm.name} and {first.size}-{first.name} read different data or sequence lengths: set "
                f"data.* in the study's overrides alone"
            )
    folder.mkdir(parents=True, exist_ok=True)
    command = [*MOE, "prepare", *first.overrides]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"`moe prepare` ended with {done.returncode}"]
        raise ValueError(f"the corpus cannot be prepared: {said[-1].removeprefix('error: ')}")
    corpus = Path(done.stdout.strip().splitlines()[-1])
    meta = json.loads((corpus / "train" / "meta.json").read_text(encoding="utf-8"))
    tokens = int(meta["num_tokens"])
    most = max(tokens for size in study.sizes for tokens in study.budgets(size))
    if study.sweep is not None:
        most = max(most, study.sweep.tokens or 0)
    if study.max_epochs is not None and most > study.max_epochs * tokens:
        raise ValueError(
            f"a budget of {most:,} tokens reads the {tokens:,} training tokens {most / tokens:.2f} times, more than "
            f"max_epochs ({study.max_epochs:g}); give more text, lower the budget or raise max_epochs"
        )
    return {
        "training_tokens": tokens,
        "training_bytes": meta["num_bytes"],
        "domains": meta["domains"],
        "tokenizer": meta["tokenizer"],
        "vocab_size": meta["vocab_size"],
        "epochs_of_the_longest_run": most / tokens,
    }


def start_in_background(arguments: Sequence[str], folder: Path) -> tuple[int, Path]:
    """Start `moe scale run` as a process that outlives this one; return its process id and log."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "harness.log"
    with path.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*MOE, "scale", "run", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process.pid, path


def num_jobs(study: StudyConfig) -> int:
    """Concurrent runs: as many as fit the cores available to this process."""
    if study.jobs is not None:
        return study.jobs
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // study.threads)


def evaluations(study: StudyConfig, folder: Path, run: Run) -> list[Step]:
    """The evaluations of a main run; sweep runs have none."""
    if run.stage != MAIN:
        return []
    run_dir = folder / "runs" / run.name
    steps = []
    for name, arguments in study.evaluations.items():
        output = run_dir / name
        fields = {"run_dir": str(run_dir), "output": str(output), "output_dir": str(output.parent)}
        steps.append(Step(tuple(fill(study, arguments, **fields)), output))
    return steps


def make_job(study: StudyConfig, folder: Path, run: Run) -> Job:
    """A run's training and evaluations, each recorded by `started` before it starts.

    Raises ValueError if the record of earlier starts is damaged, now rather than when other runs are under way.
    """
    read_starts(folder, run.name)
    run_dir = folder / "runs" / run.name
    train = Step(("train", *run.overrides), run_dir / "results.json")

    def started(command: Sequence[str]) -> None:
        _clear_beginnings(run_dir)
        record_start(folder, run, command)

    def gave_up() -> bool:
        return read_divergence(run_dir, run.config.train.max_skipped_steps) is not None

    return Job(run.name, [train, *evaluations(study, folder, run)], started, gave_up)


def _clear_beginnings(run_dir: Path) -> None:
    """Remove the files of a run interrupted before its config.yaml, which `moe train` would take for another run's."""
    if not run_dir.is_dir() or (run_dir / "config.yaml").exists():
        return
    files = list(run_dir.iterdir())
    if {file.name for file in files} <= _BEGUN:
        for file in files:
            file.unlink()


def require_same(folder: Path, runs: Sequence[Run]) -> None:
    """Refuse a folder whose runs differ from what the study defines now: a report would mix two studies."""
    for run in runs:
        stored = folder / "runs" / run.name / "config.yaml"
        if not stored.exists():
            continue
        changed = differences(from_yaml(stored.read_text(encoding="utf-8")), run.config)
        if changed:
            raise ValueError(
                f"{stored.parent} holds another run: {'; '.join(changed)}. The study was changed after it; undo that, "
                f"or give the changed study another folder"
            )


def _settings(optim: dict[str, float]) -> str:
    return ", ".join(f"{key}={value:g}" for key, value in optim.items())
