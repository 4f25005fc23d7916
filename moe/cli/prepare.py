"""`moe prepare`: the corpus alone, before training."""

from __future__ import annotations

import typer

from moe.cli.overrides import Overrides


def prepare(overrides: Overrides = None) -> None:
    """Read the corpus, train the tokenizer and write the token shards that training would need."""
    from moe.compose import compose
    from moe.data.prepare import prepare as run

    corpus = run(compose(overrides or []).data)
    typer.echo(corpus.path)
