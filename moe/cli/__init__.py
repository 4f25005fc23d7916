"""The `moe` command. One thin file per subcommand; each imports inside the function, so that none pays for another."""

from __future__ import annotations

from typing import Annotated

import typer

from moe import __version__
from moe.cli.convert import convert
from moe.cli.evaluate import evaluate
from moe.cli.experts import experts
from moe.cli.generate import generate
from moe.cli.instruct import instruct
from moe.cli.kernels import kernels
from moe.cli.launch import launch
from moe.cli.overrides import ListsKeys, ListsKeysOfPlan
from moe.cli.perplexity import perplexity
from moe.cli.plan import plan
from moe.cli.prepare import prepare
from moe.cli.scale import app as scale
from moe.cli.train import train
from moe.cli.translate import translate
from moe.training.exit_status import end_with

app = typer.Typer(
    name="moe",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=ListsKeys, context_settings={"ignore_unknown_options": True})(train)
app.command(cls=ListsKeys)(prepare)
app.add_typer(convert, name="convert")
app.command()(generate)
app.command("eval")(evaluate)
app.command()(perplexity)
app.command()(experts)
app.command()(translate)
app.command()(kernels)
app.command(cls=ListsKeys)(launch)
app.add_typer(instruct, name="instruct")
app.command(cls=ListsKeysOfPlan)(plan)
app.add_typer(scale, name="scale")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train, evaluate, convert and plan Mixture-of-Experts language models."""


def main() -> None:
    """Entry point of the console script: an expected error is one line and an exit status, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        end_with(error)
