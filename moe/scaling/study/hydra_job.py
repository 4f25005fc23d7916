"""One run of a study as a Hydra job, which any launcher plugin can start (hydra_launch.py)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class RunOfStudy:
    """A job's parameters; everything else is in the study's folder."""

    folder: str = MISSING
    run: str = MISSING


@hydra.main(version_base="1.3", config_path=None, config_name="run_of_study")
def work(config: RunOfStudy) -> None:
    """Train and evaluate the run. Failure shows in its files; being stopped ends the other jobs too."""
    from moe.scaling.study.harness import run_alone

    if run_alone(Path(config.folder), config.run, print).stopped:
        raise KeyboardInterrupt


if __name__ == "__main__":
    ConfigStore.instance().store("run_of_study", RunOfStudy)
    try:
        work()
    except KeyboardInterrupt:
        sys.exit(130)  # the shells' code for SIGINT; the harness reports which runs are left
