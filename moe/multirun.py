"""The program behind `train.py` and `moe train`: one run, or with -m several in turn."""

from __future__ import annotations

import os
import sys

from moe.config import RunConfig
from moe.config.errors import in_words
from moe.distributed.world import end_process
from moe.run import train_until_stopped
from moe.run_folder import short_name
from moe.training.exit_status import exit_status


def main(configs: list[RunConfig]) -> None:
    """Train each run in turn. With several processes it does not return."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    try:
        for number, config in enumerate(configs, 1):
            if len(configs) > 1:
                _say(f"run {number} of {len(configs)}: {config.run_dir or short_name(config)}")
            _, signal_name = train_until_stopped(config)
            if signal_name is not None and number < len(configs):
                _say_what_is_left(signal_name, configs, number)
                break
    except (ValueError, OSError) as error:
        if alone:
            raise
        print(f"error: {in_words(error)}", file=sys.stderr)  # noqa: T201
        end_process(exit_status(error))
    if not alone:
        end_process()


def _say(text: str) -> None:
    """Tell the user on stderr, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)  # noqa: T201


def _say_what_is_left(signal_name: str, configs: list[RunConfig], number: int) -> None:
    """Name the runs after the first `number`, which were not started."""
    left = [f"run {i + 1} ({configs[i].run_dir or short_name(configs[i])})" for i in range(number, len(configs))]
    _say(
        f"{signal_name}: {len(left)} of {len(configs)} runs are not started: {', '.join(left)}; "
        f"the same command starts them"
    )
