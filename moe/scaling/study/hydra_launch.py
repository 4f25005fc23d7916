"""Hands runs to a Hydra launcher plugin: joblib here, submitit on a cluster, Ray, RQ, or the built-in `basic`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from moe.scaling.study.processes import Job, Outcome, last_words


def launch(folder: Path, jobs: Sequence[Job], launcher: Sequence[str]) -> Outcome:
    """Return when the launcher has finished, with the outcome read from the runs' files.

    launcher: Hydra overrides such as hydra/launcher=joblib. The first signal is passed on, a second one kills; jobs
    already submitted to a cluster continue. Raises ValueError if the launcher ended before any run began.
    """
    outcome = Outcome(skipped=[job.name for job in jobs if not job.left])
    waiting = [job for job in jobs if job.left]
    if not waiting:
        return outcome
    begun = {job.name: _log_bytes(folder, job) for job in waiting}
    process = subprocess.Popen(_command(folder, waiting, launcher), stdin=subprocess.DEVNULL, start_new_session=True)
    signals = 0

    def pass_on(_: int, __: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGINT if signals == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    unbegun = []
    for job in waiting:
        if not job.left:
            outcome.done.append(job.name)
        elif signals:
            outcome.stopped.append(job.name)
        elif _log_bytes(folder, job) > begun[job.name]:
            outcome.failed[job.name] = last_words(folder, job.name)
        else:
            unbegun.append(job.name)
    if unbegun == [job.name for job in waiting]:
        raise ValueError(
            f"Hydra's launcher ended with {status} and began no run; what it said is above. {' '.join(launcher)} must "
            f"be overrides of Hydra that name an installed plugin, as hydra/launcher=joblib"
        )
    outcome.failed |= {name: f"Hydra's launcher ended with {status} before it began" for name in unbegun}
    return outcome


def _command(folder: Path, jobs: Sequence[Job], launcher: Sequence[str]) -> list[str]:
    return [
        *(sys.executable, "-m", "moe.scaling.study.hydra_job", "--multirun", *launcher),
        f"hydra.sweep.dir={_quoted(str(folder / 'hydra'))}",
        "hydra.sweep.subdir=${run}",
        f"folder={_quoted(str(folder))}",
        f"run={','.join(job.name for job in jobs)}",
    ]


def _quoted(text: str) -> str:
    """Quote for Hydra's grammar, in which commas and = have a meaning."""
    return "'" + text.replace("'", "\\'") + "'"


def _log_bytes(folder: Path, job: Job) -> int:
    path = folder / "logs" / f"{job.name}.log"
    return path.stat().st_size if path.exists() else 0
