"""`moe train`: the same as `python train.py`."""

from __future__ import annotations

from typing import Annotated

import typer

from moe.cli.overrides import Overrides


def train(
    overrides: Overrides = None,
    multirun: Annotated[
        bool, typer.Option("--multirun", "-m", help="Start one run per combination of comma-separated values.")
    ] = False,
) -> None:
    """Train a model, as `python train.py` does, or continue the run that the same command began.

    `moe train +moe=8e train.num_steps=800`. All presets and keys are listed below.
    """
    from moe.compose import compose, expand_multirun

    arguments = [*(["-m"] if multirun else []), *(overrides or [])]
    runs = expand_multirun(arguments)
    configs = [compose(each) for each in runs]
    from moe.multirun import main as run  # after the configuration: a mistyped key should not wait for torch

    run(runs, configs)
