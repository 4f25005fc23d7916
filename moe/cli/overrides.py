"""The argument that every command with a configuration takes, and the help that lists its keys."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Overrides = Annotated[list[str] | None, typer.Argument(help="Hydra overrides, such as +moe=512e train.num_steps=800.")]


class ListsKeys(TyperCommand):
    """A command on a run's configuration: its help ends like that of `python train.py --help`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Like typer's, which prints by itself; what the formatter is given is printed after that."""
        super().format_help(ctx, formatter)
        formatter.write(f"\n{self.keys()}\n")

    def keys(self) -> str:
        """The presets, and all keys with their defaults and meanings."""
        from moe.compose import usage

        return usage()


class ListsKeysOfPlan(ListsKeys):
    """The same for a plan, which has a cluster and options of its own."""

    def keys(self) -> str:
        """The presets, and all keys with their defaults and meanings."""
        from moe.compose import usage
        from moe.config.cluster import PlanConfig

        return usage("plan", PlanConfig, to_choose=["cluster"])
