"""`moe prepare`: the corpus alone, before training."""

from __future__ import annotations

import typer

from moe.cli.overrides import Overrides


def prepare(overrides: Overrides = None) -> None:
    """Read the corpus, train the tokenizer and write the token shards that training needs.

    Also reports how well the vocabulary fits each domain and, with data.mixture.alpha, how often the run reads each.
    """
    from moe.compose import compose
    from moe.data import sampling, vocabulary_report
    from moe.data.prepare import prepare as run

    config = compose(overrides or [])
    corpus = run(config.data)
    typer.echo(vocabulary_report.table(corpus.vocabulary), err=True)
    plans = corpus.mixture(config.data.mixture, config.train.num_steps * config.train.batch_tokens)
    if plans:
        typer.echo(sampling.table(plans), err=True)
    typer.echo(corpus.path)
