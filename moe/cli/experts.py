"""`moe experts`: which experts each domain of a finished run uses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def experts(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a complete run.")],
    split: Annotated[str, typer.Option(help="validation or test.")] = "test",
    out: Annotated[
        Path | None, typer.Option(help="Heat-map to write, .png or .svg. Default: RUN_DIR/experts.png.")
    ] = None,
) -> None:
    """Show how far experts specialise by domain, layer by layer, with a heat-map of domains by experts."""
    from moe.evaluation.specialization import plot, read_maps, table

    maps = read_maps(run_dir, split)
    typer.echo(table(maps))
    path = run_dir / "experts.png" if out is None else out
    plot(maps, path)
    typer.echo(path)
