"""The `moe` command. One thin file per subcommand; each imports what it runs inside, so that none pays for another."""

from __future__ import annotations

import sys

import typer

from moe.cli.convert import convert
from moe.cli.evaluate import evaluate
from moe.cli.experts import experts
from moe.cli.generate import generate
from moe.cli.instruct import instruct
from moe.cli.kernels import kernels
from moe.cli.launch import launch
from moe.cli.perplexity import perplexity
from moe.cli.plan import plan
from moe.cli.prepare import prepare
from moe.cli.scale import app as scale
from moe.cli.train import train
from moe.cli.translate import translate

app = typer.Typer(
    name="moe", help="Mixture-of-Experts language models.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.command(context_settings={"ignore_unknown_options": True})(train)
app.command()(prepare)
app.add_typer(convert, name="convert")
app.command()(generate)
app.command("eval")(evaluate)
app.command()(perplexity)
app.command()(experts)
app.command()(translate)
app.command()(kernels)
app.command()(launch)
app.add_typer(instruct, name="instruct")
app.command()(plan)
app.add_typer(scale, name="scale")


def main() -> None:
    """Entry point of the console script: user mistakes end in one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
