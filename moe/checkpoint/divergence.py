"""The error of a run that diverged."""

from __future__ import annotations

from pathlib import Path


class DivergedError(ValueError):
    """Losses, gradients or weights are not finite, and stay so.

    The same command would diverge again, because a run repeats bit for bit: all ranks raise this at the same step, and
    `moe.run_folder` records it.
    """

    exit_status = 3  # of the program (moe.training.exit_status)
    run_dir: Path | None = None  # whose record says so, once there is one
