"""`moe perplexity`: evaluate a trained model on any text, domain by domain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

_TIMEOUT_SECONDS = 3600.0  # ranks wait for each other after each domain


def perplexity(
    path: Annotated[Path, typer.Argument(help="Run folder or checkpoint.")],
    texts: Annotated[list[str], typer.Argument(help="Files, folders or globs; each is a domain.")],
    protocol: Annotated[str, typer.Option(help="pile (the paper's) or rolling (lm-eval's).")] = "pile",
    window: Annotated[int | None, typer.Option(help="Tokens per window. Default: the model's max_seq_len.")] = None,
    context: Annotated[int, typer.Option(help="Tokens that the next window reads again; 1: no overlap.", min=1)] = 1,
    text_field: Annotated[str, typer.Option(help="Text field of .jsonl and .parquet rows.")] = "text",
    domain_field: Annotated[str | None, typer.Option(help="Of .jsonl rows, such as meta.pile_set_name.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Per domain; documents are read whole.")] = None,
    in_domain: Annotated[list[str] | None, typer.Option(help="Domain trained on; repeat for several.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for results.json, table.md and plot.png.")] = Path("perplexity"),
) -> None:
    """Report perplexity per token, word and byte of each domain, with a table and a plot.

    `moe perplexity runs/x README.md docs/*.md`; under torchrun the processes share the work.
    """
    from dataclasses import asdict, replace

    from moe.checkpoint import load_model, load_tokenizer
    from moe.distributed.world import end_process, open_world
    from moe.evaluation.text_domains import check_in_domain, plot, read_domains, results, table
    from moe.evaluation.text_perplexity import PROTOCOLS, score_domain

    if protocol not in PROTOCOLS:
        raise ValueError(f"--protocol ({protocol}) must be one of: {', '.join(PROTOCOLS)}")
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"--precision ({precision}) must be one of: fp32, bf16, fp16")
    if (out / "results.json").exists():
        raise ValueError(f"{out} holds the results of an evaluation; choose another --out")
    chosen = replace(PROTOCOLS[protocol], window=window, context=context)
    domains = read_domains(texts, text_field=text_field, domain_field=domain_field, max_bytes=max_bytes)
    check_in_domain(in_domain or [], domains)
    world = open_world(device, timeout_seconds=_TIMEOUT_SECONDS)
    model, tokenizer = load_model(path, device=world.device), load_tokenizer(path)
    scores = {
        name: score_domain(model, tokenizer, documents, chosen, precision=precision, world=world)
        for name, documents in domains.items()
    }
    found = results(scores, in_domain or [])
    if world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        record = {"model": str(path), "tokenizer": tokenizer.hash, "protocol": asdict(chosen), **found}
        text = table(found)
        (out / "table.md").write_text(text)
        plot(out / "plot.png", found)
        scratch = out / "results.json.tmp"
        scratch.write_text(json.dumps(record, indent=1))
        scratch.replace(out / "results.json")  # last and atomically: its presence means complete
        typer.echo(text)
        typer.echo(f"written to {out}")
    world.close()
    if world.size > 1:
        end_process()
