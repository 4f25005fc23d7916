"""The `moe` command. One thin file per subcommand; each imports what it runs inside, so that none pays for another."""

from __future__ import annotations

import sys

import typer

from moe.cli.convert import convert
from moe.cli.generate import generate
from moe.cli.kernels import kernels
from moe.cli.launch import launch
from moe.cli.prepare import prepare
from moe.cli.train import train

app = typer.Typer(
    name="moe", help="Mixture-of-Experts language models.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.command(context_settings={"ignore_unknown_options": True})(train)
app.command()(prepare)
app.command()(convert)
app.command()(generate)
app.command()(kernels)
app.command()(launch)


def main() -> None:
    """Entry point of the console script: user mistakes end in one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
