"""The argument that every command with a configuration takes."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="Hydra overrides, such as +moe=512e train.num_steps=800.")]
