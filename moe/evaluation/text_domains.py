"""Files and folders as named domains of whole documents, with a table and plot of their perplexities."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from moe.data.text_files import SUFFIXES, Reading, find_files, read
from moe.evaluation.text_perplexity import TextScore, mean_perplexity

_TABLES = tuple(suffix for suffix in SUFFIXES if not suffix.startswith((".txt", ".tsv")))


def read_domains(
    paths: Sequence[str],
    *,
    text_field: str = "text",
    domain_field: str | None = None,
    max_bytes: int | None = None,
) -> dict[str, list[str]]:
    """Read the documents of each domain, with domains in the order of their first document.

    max_bytes: per domain, in UTF-8; takes the first documents until they reach it, so at least one.

    A plain text or .tsv file is one document; each row of a .jsonl (.gz, .zst) or .parquet file is one. The domain is
    the name of the file, or of the given folder, or whatever @domain matches in a path. domain_field: take it from each
    row of .jsonl files instead, with dots for nested objects: `meta.pile_set_name` splits the Pile's files. Raises
    ValueError for paths without files, rows without the fields, bytes that are not UTF-8 and max_bytes below 1.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes ({max_bytes}) must be at least 1 byte of each domain; leave it out for all")
    domains: dict[str, list[str]] = {}
    for file in find_files(list(paths)):
        if domain_field is not None:
            for domain, text in _rows(file.path, text_field, domain_field):
                domains.setdefault(domain, []).append(text)
            continue
        texts = [document.text for document in read([file], Reading(text_field=text_field))]
        # plain text files are read in pieces, for training; here each is one document
        domains.setdefault(file.domain, []).extend(texts if file.path.name.endswith(_TABLES) else ["".join(texts)])
    if max_bytes is None:
        return domains
    return {name: _first(texts, max_bytes) for name, texts in domains.items()}


def _first(texts: list[str], max_bytes: int) -> list[str]:
    ends = accumulate(len(text.encode()) for text in texts)
    return texts[: sum(end < max_bytes for end in ends) + 1]


def _rows(path: Path, text_field: str, domain_field: str) -> list[tuple[str, str]]:
    if path.suffix != ".jsonl":
        raise ValueError(
            f"domain_field ({domain_field}) needs .jsonl files, and {path} is none: unpack it, or leave out the option"
        )
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from error
            values = [_field(row, text_field), _field(row, domain_field)]
            for name, value in zip((text_field, domain_field), values, strict=True):
                if not isinstance(value, str):
                    raise ValueError(f"{path} line {number} has no text in the field {name!r}: {value!r}")
            found.append((values[1], values[0]))
    return found


def _field(row: Any, name: str) -> Any:
    for part in name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def check_in_domain(in_domain: Sequence[str], domains: Iterable[str]) -> None:
    """Raise ValueError for a name that is not a domain. Cheap, so call it before scoring."""
    known = list(domains)
    unknown = [name for name in in_domain if name not in known]
    if unknown:
        raise ValueError(f"in_domain names {unknown[0]!r}, which is none of the domains: {', '.join(known)}")


def results(scores: Mapping[str, TextScore], in_domain: Sequence[str] = ()) -> dict[str, Any]:
    """For JSON: each domain's figures, and the mean perplexity inside and outside the training domains."""
    check_in_domain(in_domain, scores)
    found: dict[str, Any] = {
        "domains": {name: {**value.figures(), "in_domain": name in in_domain} for name, value in scores.items()}
    }
    for name, inside in (("in_domain", True), ("out_of_domain", False)):
        group = [value for domain, value in scores.items() if (domain in in_domain) == inside]
        found[f"{name}_mean_perplexity"] = mean_perplexity(group) if group else None
    return found


def table(found: Mapping[str, Any]) -> str:
    """The output of `results` as Markdown."""
    lines = [
        "| domain | in domain | perplexity | per word | per byte | bits/byte | tokens | words | bytes | documents |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found["domains"].items():
        lines.append(
            f"| {name} | {'yes' if row['in_domain'] else 'no'} | {_shown(row['token_perplexity'])} | "
            f"{_shown(row['word_perplexity'])} | {_shown(row['byte_perplexity'])} | {row['bits_per_byte']:.4f} | "
            f"{row['num_tokens']} | {row['num_words']} | {row['num_bytes']} | {row['num_documents']} |"
        )
    for name, title in (("in_domain", "mean, in domain"), ("out_of_domain", "mean, out of domain")):
        value = found[f"{name}_mean_perplexity"]
        if value is not None:
            lines.append(f"| {title} | | {value:.4g} | | | | | | | |")
    return "\n".join(lines) + "\n"


def _shown(value: float | None) -> str:
    return "above 1e308" if value is None else f"{value:.4g}"


def plot(path: Path, found: Mapping[str, Any]) -> None:
    """A bar of bits per byte for each domain, the only figure that does not depend on the tokenizer."""
    from matplotlib.figure import Figure  # only reports draw

    rows = sorted(found["domains"].items(), key=lambda item: item[1]["bits_per_byte"])
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:orange" if row["in_domain"] else "tab:blue" for _, row in rows]
    axes.barh([name for name, _ in rows], [row["bits_per_byte"] for _, row in rows], color=colours)
    for place, (_, row) in enumerate(rows):
        axes.annotate(f"ppl {_shown(row['token_perplexity'])}", (row["bits_per_byte"], place), va="center", fontsize=7)
    axes.set_xlabel("bits per byte (orange: in domain)")
    axes.margins(x=0.15)
    figure.savefig(path, dpi=150)
