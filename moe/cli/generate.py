"""`moe generate`: text from a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def generate(
    path: Annotated[Path, typer.Argument(help="a run folder or a checkpoint")],
    prompt: Annotated[list[str] | None, typer.Option(help="a prompt; may be given several times")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="a text file with one prompt a line")] = None,
    tokens: Annotated[int, typer.Option(help="new tokens per prompt", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0.0)] = 0.8,
    top_p: Annotated[float, typer.Option(help="nucleus probability", min=0.0, max=1.0)] = 0.95,
    seed: Annotated[int, typer.Option(help="of the draws", min=0)] = 0,
) -> None:
    """Continue prompts with a trained model; a single prompt is streamed as it is written."""
    from moe.checkpoint import load_model, load_tokenizer
    from moe.generation import continue_texts, stream_text

    prompts = list(prompt or [])
    if prompts_file is not None:
        prompts += [line.rstrip("\n") for line in prompts_file.open(encoding="utf-8")]
    prompts = prompts or [""]
    model, tokenizer = load_model(path), load_tokenizer(path)
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    if len(prompts) == 1:
        typer.echo(prompts[0], nl=False)
        for piece in stream_text(model, tokenizer, prompts[0], tokens, **settings):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()
        return
    for text, continuation in zip(prompts, continue_texts(model, tokenizer, prompts, tokens, **settings), strict=True):
        typer.echo(f"{text}{continuation}\n{'-' * 20}")
