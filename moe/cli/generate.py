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
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; 0.8 where nothing is said", min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option(help="nucleus probability; 0.95", min=0.0, max=1.0)] = None,
    seed: Annotated[int, typer.Option(help="of the draws", min=0)] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; may be given several times")] = None,
    beams: Annotated[int, typer.Option(help="above 1: beam search, without temperature and top-p", min=1)] = 1,
    length_penalty: Annotated[float, typer.Option(help="beams: above 0 favours longer text")] = 1.0,
) -> None:
    """Continue prompts with a trained model; a single prompt is streamed as it is written."""
    from moe.checkpoint import load_model, load_tokenizer
    from moe.generation import check_sampling, continue_texts, stream_text

    prompts = list(prompt or [])
    if prompts_file is not None:
        prompts += [line.rstrip("\n") for line in prompts_file.open(encoding="utf-8")]
    prompts = prompts or [""]
    settings: dict[str, Any] = {"seed": seed, "stop": [_unescaped(text) for text in stop or []]}
    if beams == 1:
        settings |= {"temperature": 0.8 if temperature is None else temperature}
        settings |= {"top_p": 0.95 if top_p is None else top_p}
    else:  # continue_texts refuses draws beside a search
        settings |= {"temperature": temperature or 0.0, "top_p": 1.0 if top_p is None else top_p}
        settings |= {"num_beams": beams, "length_penalty": length_penalty}
    check_sampling(settings["temperature"], settings["top_p"], seed)  # before the model is read and a prompt printed
    model, tokenizer = load_model(path), load_tokenizer(path)
    if len(prompts) == 1 and beams == 1:
        typer.echo(prompts[0], nl=False)
        for piece in stream_text(model, tokenizer, prompts[0], tokens, **settings):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()
        return
    for text, continuation in zip(prompts, continue_texts(model, tokenizer, prompts, tokens, **settings), strict=True):
        typer.echo(f"{text}{continuation}\n{'-' * 20}")


def _unescaped(text: str) -> str:
    """A line break is hard to type: \\n and \\t stand for the characters."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
