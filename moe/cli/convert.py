"""`moe convert`: weights from one form to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe.cli.overrides import Overrides


def convert(
    source: Annotated[Path, typer.Argument(help="a run folder or a checkpoint")],
    destination: Annotated[Path, typer.Argument(help="a new folder")],
    upcycle: Annotated[str | None, typer.Option(help="a preset of configs/moe: give a dense model experts")] = None,
    granularity: Annotated[int, typer.Option(help="slices each dense network is cut into", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="of the routers", min=0)] = 0,
    overrides: Overrides = None,
) -> None:
    """Put the weights of a checkpoint, of however many ranks, into one model.safetensors.

    `--upcycle 8e` makes a dense model's sparse twin instead, which computes the same function. Overrides change the
    preset: `moe convert runs/dense runs/sparse --upcycle 8e model.moe.top_k=4`.
    """
    if upcycle is None:
        if overrides or granularity != 1 or seed != 0:
            raise ValueError("overrides, --granularity and --seed are read with --upcycle PRESET alone: leave them out")
        from moe.checkpoint import consolidate

        typer.echo(consolidate(source, destination))
        return
    from moe.compose import compose
    from moe.upcycling import upcycle_checkpoint

    moe = compose([f"+moe={upcycle}", *(overrides or [])]).model.moe
    assert moe is not None
    typer.echo(upcycle_checkpoint(source, destination, moe, granularity=granularity, seed=seed))
