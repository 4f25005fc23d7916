"""The program behind `train.py` and `moe train`: one run, or with -m several in turn and what came of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moe.checkpoint import DivergedError
from moe.config import RunConfig
from moe.config.errors import in_words
from moe.console import say
from moe.distributed.world import end_process
from moe.overview import overview, print_overview, write_overview
from moe.run import train_until_stopped
from moe.run_folder import short_name
from moe.training.exit_status import DIVERGED, exit_status


def main(runs: Sequence[Sequence[str]], configs: Sequence[RunConfig]) -> None:
    """Train each run in turn; `runs` has the overrides of each of `configs`. With several processes it does not return.

    Of several, one that diverges does not stop the others; the program then ends with its status.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    try:
        status = _train_several(runs, configs) if len(configs) > 1 else _train_one(configs[0])
    except (ValueError, OSError) as error:
        if alone:
            raise
        say(f"error: {in_words(error)}")
        end_process(exit_status(error))
    if not alone:
        end_process(status)
    if status:
        sys.exit(status)


def _train_one(config: RunConfig) -> int:
    train_until_stopped(config)
    return 0


def _train_several(runs: Sequence[Sequence[str]], configs: Sequence[RunConfig]) -> int:
    """Returns the exit status: on rank 0 that of the sweep, on others 0, so that torchrun does not end rank 0 early."""
    folders: list[Path] = []
    status = 0
    for number, config in enumerate(configs, 1):
        _say_once(f"run {number} of {len(configs)}: {config.run_dir or short_name(config)}")
        try:
            run_dir, signal_name = train_until_stopped(config)
        except DivergedError as error:
            _say_once(f"error: {error}")
            status = DIVERGED if _is_first() else 0
            if error.run_dir is not None:  # on rank 0
                folders.append(error.run_dir)
            continue
        folders.append(run_dir)
        if signal_name is not None and number < len(configs):
            _say_what_is_left(signal_name, configs, number)
            return status
    if _is_first() and all(_has_ended(folder) for folder in folders):
        rows = overview(runs, folders)
        print_overview(rows, write_overview(rows), Console())
    return status


def _has_ended(run_dir: Path) -> bool:
    """Not for a run that a signal stopped, nor for a dry run."""
    return (run_dir / "results.json").exists() or (run_dir / "diverged.json").exists()


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say_once(text: str) -> None:
    """Once for all ranks."""
    if _is_first():
        say(text)


def _say_what_is_left(signal_name: str, configs: Sequence[RunConfig], number: int) -> None:
    """Name the runs after the first `number`, which were not started."""
    left = [f"run {i + 1} ({configs[i].run_dir or short_name(configs[i])})" for i in range(number, len(configs))]
    _say_once(
        f"{signal_name}: {len(left)} of {len(configs)} runs are not started: {', '.join(left)}; "
        f"the same command starts them"
    )
