"""`moe generate`: text from a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def generate(
    path: Annotated[Path, typer.Argument(help="Run folder or checkpoint.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt; repeat for several. Default: empty.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with one prompt per line.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens per prompt.", min=1)] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; 0 is greedy. Default: 0.8.", min=0.0)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the likeliest tokens up to this probability. Default: 0.95.", min=0.0, max=1.0),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling. Default: 0.", min=0)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeat for several.")] = None,
    beams: Annotated[int, typer.Option(help="Above 1: beam search instead of sampling.", min=1)] = 1,
    length_penalty: Annotated[
        float | None, typer.Option(help="With --beams: above 0 favours longer text. Default: 1.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
) -> None:
    """Continue prompts with a trained model; a single prompt is streamed.

    `moe generate runs/x --prompt "Once upon" --tokens 200 --stop "\\n"`; \\n and \\t are a line break and a tab.
    """
    from moe.checkpoint import load_model, load_tokenizer
    from moe.distributed.world import choose_device
    from moe.generation import check_sampling, continue_texts, find_end_ids, stream_text

    prompts = list(prompt or [])
    if prompts_file is not None:
        prompts += _read_prompts(prompts_file)
    prompts = prompts or [""]
    settings: dict[str, Any] = {"stop": [_unescaped(text) for text in stop or []]}
    if beams == 1:
        if length_penalty is not None:
            raise ValueError("--length-penalty applies to beam search: set --beams above 1, or leave it out")
        settings |= {"temperature": 0.8 if temperature is None else temperature}
        settings |= {"top_p": 0.95 if top_p is None else top_p, "seed": seed or 0}
        # before the model is loaded and a prompt printed
        check_sampling(settings["temperature"], settings["top_p"], settings["seed"])
    else:
        draws = {"--temperature": temperature, "--top-p": top_p, "--seed": seed}
        given = [name for name, value in draws.items() if value is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)} applies to sampling, not to beam search (--beams {beams}): leave it out"
            )
        settings |= {"num_beams": beams, "length_penalty": 1.0 if length_penalty is None else length_penalty}
    place = choose_device(device)
    model, tokenizer = load_model(path, device=place), load_tokenizer(path)
    settings |= {"end_ids": find_end_ids(path, tokenizer)}
    if len(prompts) == 1 and beams == 1:
        typer.echo(prompts[0], nl=False)
        for piece in stream_text(model, tokenizer, prompts[0], tokens, **settings):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()
        return
    for text, continuation in zip(prompts, continue_texts(model, tokenizer, prompts, tokens, **settings), strict=True):
        typer.echo(f"{text}{continuation}\n{'-' * 20}")


def _read_prompts(file: Path) -> list[str]:
    """The lines of a text file, with or without a byte-order mark."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            prompts = [line.rstrip("\n") for line in lines]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}; convert the file first") from error
    if not prompts:
        raise ValueError(f"{file} holds no prompt: put one on each line")
    return prompts


def _unescaped(text: str) -> str:
    """Replace \\n and \\t by the characters, which are hard to type."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
