"""`moe translate`: translate between all pairs of languages with a trained model, by demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moe.evaluation.parallel_text import ParallelText
    from moe.evaluation.translation import TranslationProtocol

_TIMEOUT_SECONDS = 3600.0  # ranks wait for each other after each direction, and while the first scores it


def translate(
    path: Annotated[Path, typer.Argument(help="Run folder or checkpoint.")],
    folder: Annotated[Path, typer.Argument(help="Folder of line-aligned files: NTREX-128, FLORES, or CODE.txt.")],
    languages: Annotated[str, typer.Option(help="Comma-separated codes, as in the files' names.")],
    shots: Annotated[int, typer.Option(help="Demonstrations before each line.", min=0)] = 32,
    template: Annotated[str, typer.Option(help="xglm, named, or your own with {source} and {target}.")] = "xglm",
    separator: Annotated[str, typer.Option(help="Between demonstrations: end (of text) or line.")] = "end",
    tokens: Annotated[int, typer.Option(help="Maximum of new tokens per line.", min=1)] = 256,
    beams: Annotated[int, typer.Option(help="Above 1: beam search.", min=1)] = 1,
    length_penalty: Annotated[float, typer.Option(help="With --beams: above 0 favours longer text.")] = 1.0,
    demo_lines: Annotated[
        int, typer.Option(help="Lines set apart for demonstrations if the data has no split for them.", min=1)
    ] = 100,
    limit: Annotated[
        int | None, typer.Option(help="Translate only this many lines of each direction, the first.", min=1)
    ] = None,
    spm: Annotated[Path | None, typer.Option(help="FLORES sentencepiece model, for spBLEU.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the demonstrations.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="New folder for results, table, heat-map and texts.")] = Path("translation"),
) -> None:
    """Translate between all pairs of languages and report BLEU, spBLEU and chrF of each direction.

    Under torchrun the processes share the lines.
    """
    from moe.evaluation.parallel_text import load_parallel
    from moe.evaluation.results import require_writable
    from moe.evaluation.translation import TEMPLATES, TranslationProtocol
    from moe.evaluation.translation_scores import load_spm

    require_writable(out)
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
    _translate_all(
        path, text, codes, protocol, {"demo_lines": demo_lines}, limit=limit, spm=spm, device=device, out=out
    )


def _translate_all(
    path: Path,
    text: ParallelText,
    codes: list[str],
    protocol: TranslationProtocol,
    noted: dict[str, Any],
    *,
    limit: int | None,
    spm: Path | None,
    device: str,
    out: Path,
) -> None:
    """Translate every direction on every rank; rank 0 writes and prints each as it is done, together with `noted`."""
    from dataclasses import asdict
    from itertools import permutations

    from moe.checkpoint import find_checkpoint, load_model, load_tokenizer
    from moe.distributed.world import end_process, open_world
    from moe.evaluation.results import write_results
    from moe.evaluation.translation import translate as translate_direction
    from moe.evaluation.translation_scores import heat_map, record, table
    from moe.generation import find_end_ids

    world = open_world(device, timeout_seconds=_TIMEOUT_SECONDS)
    checkpoint = find_checkpoint(path)  # once: a run that trains on saves others
    model, tokenizer = load_model(checkpoint, device=world.device), load_tokenizer(checkpoint)
    end_ids = find_end_ids(checkpoint, tokenizer)
    records = []
    for source, target in permutations(codes, 2):
        direction = translate_direction(
            model, tokenizer, text, source, target, protocol, limit=limit, end_ids=end_ids, world=world
        )
        if world.rank > 0:
            continue
        (out / "texts").mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{line}\n" for line in direction.hypotheses)
        (out / "texts" / f"{source}-{target}.txt").write_text(lines, encoding="utf-8")
        records.append(record(direction, spm))
        origin = {"model": str(checkpoint), "tokenizer": tokenizer.hash, "layout": text.layout, "files": text.files}
        results = {**origin, "protocol": asdict(protocol), **noted, "directions": records}
        write_results(out / "results.json", results)  # after each: a long run may be interrupted
        shown = {name: records[-1][name] for name in ("bleu", "spbleu", "chrf", "num_queries_cut")}
        typer.echo(f"{source} -> {target}: {shown}")
    if world.rank == 0:
        (out / "table.md").write_text(table(records, codes), encoding="utf-8")
        heat_map(out / "matrix.png", records, codes)
        typer.echo(table(records, codes))
    world.close()
    if world.size > 1:
        end_process()
