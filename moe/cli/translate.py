"""`moe translate`: a trained model between all pairs of languages, by demonstration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def translate(
    path: Annotated[Path, typer.Argument(help="a run folder or a checkpoint")],
    folder: Annotated[Path, typer.Argument(help="line-aligned files: NTREX-128, FLORES, or CODE.txt")],
    languages: Annotated[str, typer.Option(help="codes as in the files' names, with commas between")],
    shots: Annotated[int, typer.Option(help="demonstrations before each line", min=0)] = 32,
    template: Annotated[str, typer.Option(help="xglm, named, or one with {source} and {target}")] = "xglm",
    separator: Annotated[str, typer.Option(help="between demonstrations: end (of text) or line")] = "end",
    tokens: Annotated[int, typer.Option(help="new tokens at most", min=1)] = 256,
    beams: Annotated[int, typer.Option(help="above 1: beam search", min=1)] = 1,
    length_penalty: Annotated[float, typer.Option(help="beams: above 0 favours longer text")] = 1.0,
    demo_lines: Annotated[int, typer.Option(help="set apart where a set has no split for it", min=1)] = 100,
    limit: Annotated[int | None, typer.Option(help="lines of each direction, from the first on", min=1)] = None,
    spm: Annotated[Path | None, typer.Option(help="the FLORES sentencepiece model, for spBLEU")] = None,
    seed: Annotated[int, typer.Option(help="of the demonstrations", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="a folder for results, table, heat-map and texts")] = Path("translation"),
) -> None:
    """Translate between all pairs of languages; BLEU, spBLEU and chrF of each direction."""
    from dataclasses import asdict
    from itertools import permutations

    from moe.checkpoint import load_model, load_tokenizer
    from moe.evaluation.parallel_text import load_parallel
    from moe.evaluation.translation import TEMPLATES, TranslationProtocol
    from moe.evaluation.translation import translate as translate_direction
    from moe.evaluation.translation_scores import heat_map, load_spm, record, table

    protocol = TranslationProtocol(
        template=TEMPLATES.get(template, template),
        num_shots=shots,
        separator=separator,
        max_new_tokens=tokens,
        num_beams=beams,
        length_penalty=length_penalty,
        seed=seed,
    )
    codes = [code.strip() for code in languages.split(",") if code.strip()]
    text = load_parallel(folder, codes, demo_lines=demo_lines)
    if spm is not None:
        load_spm(spm)  # before hours of work, not after
    model, tokenizer = load_model(path), load_tokenizer(path)
    (out / "texts").mkdir(parents=True, exist_ok=True)
    records = []
    for source, target in permutations(codes, 2):
        direction = translate_direction(model, tokenizer, text, source, target, protocol, limit=limit)
        lines = "".join(f"{line}\n" for line in direction.hypotheses)
        (out / "texts" / f"{source}-{target}.txt").write_text(lines, encoding="utf-8")
        records.append(record(direction, spm))
        origin = {"model": str(path), "tokenizer": tokenizer.hash, "layout": text.layout, "files": text.files}
        results = {**origin, "protocol": asdict(protocol), "demo_lines": demo_lines, "directions": records}
        (out / "results.json").write_text(json.dumps(results, indent=1))  # after each: a long run may be ended
        shown = {name: records[-1][name] for name in ("bleu", "spbleu", "chrf", "num_queries_cut")}
        typer.echo(f"{source} -> {target}: {shown}")
    (out / "table.md").write_text(table(records, codes))
    heat_map(out / "matrix.png", records, codes)
    typer.echo(table(records, codes))
