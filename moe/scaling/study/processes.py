"""Runs as processes: several at a time, each holding a lock that outlives whoever started it.

The lock is a file that the child inherits open; the kernel keeps it locked until the last process that holds it ends.
So if the harness is killed its runs continue, and the next harness, or a second one in parallel, waits for them instead
of writing into their folders.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

POLL_SECONDS = 0.2
MOE = (sys.executable, "-c", "from moe.cli import main; main()")  # this installation, whatever is on PATH


class Step(NamedTuple):
    """One command of a job; it is done when its output exists."""

    arguments: tuple[str, ...]  # for `moe`
    output: Path  # a JSON file


@dataclass
class Job:
    """A run: training, then its evaluations."""

    name: str
    steps: list[Step]
    started: Callable[[Sequence[str]], None]  # called with each command before it starts
    gave_up: Callable[[], bool] = lambda: False  # whether training diverged, and would do so again

    @property
    def has_diverged(self) -> bool:
        """Whether there is nothing to evaluate, now or later."""
        return not self.steps[0].output.exists() and self.gave_up()

    @property
    def left(self) -> list[Step]:
        """The steps whose output is missing or incomplete; none after a training that diverged.

        Raises ValueError if training's output, which is atomic, is damaged.
        """
        if self.has_diverged:
            return []
        return [step for number, step in enumerate(self.steps) if not _whole(step.output, refuse=number == 0)]


@dataclass
class Outcome:
    """What happened to the jobs."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # already done
    failed: dict[str, str] = field(default_factory=dict)  # name: reason
    stopped: list[str] = field(default_factory=list)  # by a signal; the same command resumes them
    diverged: list[str] = field(default_factory=list)  # runs to compare that give nothing to compare, now or before


@dataclass
class _Running:
    job: Job
    lock: IO[str]
    process: subprocess.Popen[bytes]
    step: Step
    began: float


class Processes:
    """Works through jobs in order, `jobs` at a time, with `threads` CPU threads each.

    The first SIGINT or SIGTERM is passed on: runs save and end, and nothing new starts. A second one kills them.
    """

    def __init__(self, folder: Path, *, jobs: int, threads: int, say: Callable[[str], None]) -> None:
        self.folder, self.jobs, self.threads, self.say = folder, jobs, threads, say
        self._running: list[_Running] = []
        self._signals = 0

    def work(self, jobs: Sequence[Job]) -> Outcome:
        """Return when all jobs are done, failed or stopped."""
        outcome = Outcome()
        waiting: deque[Job] = deque()
        for job in jobs:
            if job.left:
                waiting.append(job)
            else:
                outcome.skipped.append(job.name)
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        told: set[str] = set()
        try:
            while waiting or self._running:
                if not self._signals:
                    self._fill(waiting, outcome, told)
                elif not self._running:
                    outcome.stopped += [job.name for job in waiting]
                    break
                time.sleep(POLL_SECONDS)
                for running in [each for each in self._running if each.process.poll() is not None]:
                    self._ended(running, outcome)
        except BaseException:
            self._send(signal.SIGTERM)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return outcome

    def _fill(self, waiting: deque[Job], outcome: Outcome, told: set[str]) -> None:
        """Start jobs while there is room; those that another process is running go to the back of the queue."""
        for _ in range(len(waiting)):
            if len(self._running) >= self.jobs:
                return
            job = waiting.popleft()
            lock = self._lock(job.name)
            if lock is None:
                if job.name not in told:
                    told.add(job.name)
                    self.say(f"{job.name} is being computed by another process")
                waiting.append(job)
                continue
            steps = job.left  # another process may have done it in the meantime
            if not steps:
                lock.close()
                outcome.done.append(job.name)
                continue
            self._start(job, steps[0], lock)

    def _start(self, job: Job, step: Step, lock: IO[str]) -> None:
        command = [*MOE, *step.arguments]
        job.started(["moe", *step.arguments])
        step.output.parent.parent.mkdir(parents=True, exist_ok=True)
        step.output.unlink(missing_ok=True)  # incomplete output of an interrupted evaluation
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with (logs / f"{job.name}.log").open("a", encoding="utf-8") as log:
            log.write(f"\n$ moe {' '.join(step.arguments)}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # so that Ctrl-C reaches only this process, which passes it on once
            )
        self.say(f"{job.name}: {step.arguments[0]} started")
        self._running.append(_Running(job, lock, process, step, time.monotonic()))

    def _ended(self, running: _Running, outcome: Outcome) -> None:
        self._running.remove(running)
        name, status = running.job.name, running.process.returncode
        try:
            left = running.job.left
        except ValueError as error:
            running.lock.close()
            outcome.failed[name] = str(error)
            return
        if running.step in left:
            running.lock.close()
            if self._signals:
                outcome.stopped.append(name)
                return
            outcome.failed[name] = (
                f"`moe {running.step.arguments[0]}` ended with {status}: {last_words(self.folder, name)}"
            )
            self.say(f"{name} failed: {outcome.failed[name]}")
            return
        took = f"{running.step.arguments[0]} took {time.monotonic() - running.began:.0f} s"
        self.say(f"{name}: diverged" if running.job.has_diverged else f"{name}: {took}")
        if left and not self._signals:
            self._start(running.job, left[0], running.lock)
            return
        running.lock.close()
        (outcome.stopped if left else outcome.done).append(name)

    def _lock(self, name: str) -> IO[str] | None:
        """The run's lock, or None if another process holds it."""
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        file = (locks / f"{name}.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signals += 1
        self._send(signal.SIGTERM if self._signals == 1 else signal.SIGKILL)

    def _send(self, number: int) -> None:
        for running in self._running:
            if running.process.poll() is None:
                running.process.send_signal(number)


def last_words(folder: Path, name: str) -> str:
    """The last line of a run's log, which says why it failed."""
    path = folder / "logs" / f"{name}.log"
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].strip()} (all of it: {path})"


def _whole(path: Path, *, refuse: bool) -> bool:
    if not path.exists():
        return False
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        if not refuse:
            return False
        raise ValueError(f"{path} is damaged ({error}): delete {path.parent} to train it again") from error
    return True
