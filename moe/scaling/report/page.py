"""report.html: a single file with its figures, tables, style and script inside. It makes no network requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from moe.scaling.report.page_parts import SCRIPT, STYLE

Tree = dict[str, Any]


class Value(NamedTuple):
    """A table cell: the displayed text, and the number it is sorted by (None: by its text)."""

    text: str
    number: float | None = None


def page(tree: Tree, drawings: Sequence[tuple[str, str, str]]) -> str:
    """The whole page. drawings: name, title and <svg> element of each figure."""
    sections = [
        ("found", "What was found", _findings(tree)),
        ("speedups", "Speedups", _speedups(tree)),
        *((f"figure-{name}", title, f"<figure>{drawing}</figure>") for name, title, drawing in drawings),
        ("models", "Models", _models(tree)),
        ("pairs", "Pairs", _pairs(tree)),
        ("fits", "Power laws", _fits(tree)),
        ("experts", "Experts", _experts(tree)),
        ("sweep", "Learning rates", _sweep(tree)),
        ("runs", "Runs", _runs(tree)),
        ("missing", "Not complete", _missing(tree)),
        ("reading", "How to read this", _READING),
    ]
    shown = [(name, title, content) for name, title, content in sections if content]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in shown)
    body = "".join(
        f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>' for name, title, content in shown
    )
    name = escape(tree["name"])
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{name}: dense and sparse at matched compute</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<header><h1>{name}</h1>{_header(tree)}</header>\n"
        f"<nav>{links}</nav>\n<main>{body}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def table(name: str, head: Sequence[str], rows: Sequence[Sequence[Value | str]]) -> str:
    """A table that the page's script sorts by the clicked column."""
    cells = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escape(title)}</button></th>' for title in head
    )
    lines = []
    for row in rows:
        parts = [Value(cell) if isinstance(cell, str) else cell for cell in row]
        marks = ["" if part.number is None else f' class="n" data-value="{part.number!r}"' for part in parts]
        lines.append(
            "<tr>" + "".join(f"<td{m}>{escape(p.text)}</td>" for m, p in zip(marks, parts, strict=True)) + "</tr>"
        )
    return (
        f'<input type="search" data-filter="{name}" placeholder="filter rows" aria-label="filter rows">'
        f'<div class="scroll"><table id="table-{name}"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def number(value: float | None, digits: int = 4) -> Value:
    """A number as displayed; None is a dash, sorted last."""
    if value is None:
        return Value("–", math.inf)
    if isinstance(value, int) and abs(value) < 10**6:
        return Value(str(value), float(value))
    return Value(f"{value:.{digits}g}", float(value))


def _header(tree: Tree) -> str:
    tolerance = "" if tree["tolerance"] is None else f" Tolerance: {tree['tolerance']:.2%}."
    facts = [f"{len(tree['runs'])} runs complete", f"{len(tree['missing'])} not"]
    if tree["corpus"]:
        facts.append(f"{tree['corpus']['training_tokens']:,} training tokens")
        facts.append(f"at most {tree['corpus']['epochs_of_the_longest_run']:.2f} epochs")
    notes = "".join(f"<p>{escape(note)}</p>" for note in tree["notes"])
    return (
        f'<p><span class="badge">design: {escape(tree["design"])}</span> {escape(tree["statement"] + tolerance)}</p>'
        f"<p>{escape(tree['learning_rate_rule'])}</p>{notes}<p class='quiet'>{escape(' · '.join(facts))}</p>"
    )


def _first_space(tree: Tree) -> list[Tree]:
    return [row for row in tree["speedups"] if row["space"] != "log-perplexity"]


def _findings(tree: Tree) -> str:
    """One line per arm and kind of text: the range of its speedups, and how many models have none."""
    lines = []
    summaries = [m["key"] for m in tree["metrics"] if m["key"].endswith("/all")]
    keys = summaries or [m["key"] for m in tree["metrics"]]
    for arm in dict.fromkeys(row["arm"] for row in tree["speedups"]):
        for key in keys:
            rows = [r for r in _first_space(tree) if (r["arm"], r["metric"], r["cost"]) == (arm, key, "flops")]
            known = [row["speedup"] for row in rows if row["speedup"] is not None]
            if not rows:
                continue
            said = "no speedup is bracketed"
            if known:
                spread = f"{min(known):.2f}" if len(known) == 1 else f"{min(known):.2f} to {max(known):.2f}"
                said = f"dense models need {spread} times its FLOPs to be as good"  # below 1 they need fewer
            rest = (
                f"; {len(rows) - len(known)} of {len(rows)} models are not bracketed" if len(known) < len(rows) else ""
            )
            lines.append(f"<li><b>{escape(arm)}</b> on {escape(key)}: {said}{rest}.</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _speedups(tree: Tree) -> str:
    head = ["size", "arm", "tokens", "metric", "value", "sparse FLOPs", "dense FLOPs", "speedup"]
    head += ["95% over seeds", "95% over documents", "in log-perplexity", "in seconds", "in peak memory", "between"]
    known: dict[tuple[Any, ...], Tree] = {}
    for row in tree["speedups"]:
        known[row["size"], row["arm"], row["tokens"], row["metric"], row["cost"], row["space"]] = row
    rows: list[list[Value | str]] = []
    for row in [each for each in _first_space(tree) if each["cost"] == "flops"]:
        key = (row["size"], row["arm"], row["tokens"], row["metric"])
        others = [
            known.get((*key, "flops", "log-perplexity")),
            known.get((*key, "seconds", row["space"])),
            known.get((*key, "peak_memory_bytes", row["space"])),
        ]
        factor = number(row["speedup"], 3) if row["speedup"] is not None else Value("not bracketed", math.inf)
        cells = [number(row["value"]), number(row["sparse_cost"]), number(row["dense_cost"]), factor]
        cells += [_interval(row["over_seeds"]), _interval(row["over_documents"])]
        cells += [number(None if other is None else other["speedup"], 3) for other in others]
        between = row["why"] if row["between"] is None else " and ".join(dict.fromkeys(row["between"]))
        rows.append([row["size"], row["arm"], number(row["tokens"]), row["metric"], *cells, between])
    return table("speedups", head, rows) if rows else ""


def _interval(found: Tree | None) -> Value:
    if found is None:
        return Value("–", math.inf)
    if found.get("fewest_seeds") == 1:
        return Value("one seed", math.inf)
    if found["low"] is None:
        return Value(f"bracketed in {found['bracketed']:.0%}", math.inf)
    share = "" if found["bracketed"] == 1 else f" ({found['bracketed']:.0%} bracketed)"
    return Value(f"{found['low']:.3g} to {found['high']:.3g}{share}", found["low"])


def _models(tree: Tree) -> str:
    head = ["size", "arm", "tokens", "parameters", "active", "FLOPs", "seconds", "peak memory", "metric", "mean"]
    head += ["standard deviation", "seeds"]
    rows: list[list[Value | str]] = []
    for model in tree["models"]:
        shape = [number(model.get(key)) for key in ("total_params", "active_params", "flops", "seconds")]
        for key, figures in model["metrics"].items():
            spread = number(figures["standard_deviation"], 2)
            own = [*shape, number(model["peak_memory_bytes"]), key, number(figures["mean"], 5), spread]
            rows.append([model["size"], model["arm"], number(model["tokens"]), *own, number(figures["seeds"])])
    return table("models", head, rows) if rows else ""


def _pairs(tree: Tree) -> str:
    head = ["size", "dense", "sparse", "dense FLOPs/token", "sparse FLOPs/token", "difference"]
    counts: list[list[Value | str]] = []
    for pair in tree["pairs"]:
        flops = [number(pair[f"{arm}_flops_per_token"]) for arm in ("dense", "sparse")]
        difference = Value(f"{pair['difference']:+.2%}", pair["difference"])
        counts.append([pair["size"], pair["dense"], pair["sparse"], *flops, difference])
    text = table("pair-flops", head, counts) if counts else ""
    rows: list[list[Value | str]] = []
    for row in tree["pair_differences"]:
        spread = number(row["standard_deviation_over_seeds"], 2)
        seeds = " ".join(map(str, row["seeds"]))
        documents = row["over_documents"]
        over = Value("–", math.inf)
        if documents is not None:
            over = Value(f"{documents['low']:.4g} to {documents['high']:.4g}", documents["low"])
        difference = Value(f"{row['difference']:+.4f}", row["difference"])
        own = [row["size"], row["sparse"], row["dense"], number(row["tokens"]), row["metric"]]
        rows.append([*own, difference, spread, seeds, over])
    head = ["size", "sparse", "less dense", "tokens", "metric", "difference", "standard deviation", "seeds"]
    head += ["95% over documents"]
    return text + (f"<h3>Sparse less dense</h3>{table('pairs', head, rows)}" if rows else "")


def _fits(tree: Tree) -> str:
    head = [
        "arm",
        "tokens",
        "metric",
        "law",
        "exponent",
        "95% over seeds",
        "offset",
        "95% over seeds",
        "points",
        "error",
    ]
    rows: list[list[Value | str]] = []
    for fit in tree["fits"]:
        law = "a (C/C0)^-b + c" if fit["with_offset"] else "a (C/C0)^-b"
        low, high = fit["exponent_interval"]
        exponent = Value("one seed", math.inf) if fit["fewest_seeds"] == 1 else Value(f"{low:.3g} to {high:.3g}", low)
        low, high = fit["offset_interval"]
        offset = Value("–", math.inf)
        if fit["with_offset"]:
            offset = Value("one seed", math.inf) if fit["fewest_seeds"] == 1 else Value(f"{low:.3g} to {high:.3g}", low)
        own = number(fit["offset"], 3) if fit["with_offset"] else number(None)
        cells = [number(fit["exponent"], 3), exponent, own, offset, number(fit["points"]), number(fit["residual"], 2)]
        rows.append([fit["arm"], number(fit["tokens"]), fit["metric"], law, *cells])
    return table("fits", head, rows) if rows else ""


def _experts(tree: Tree) -> str:
    head = ["size", "arm", "tokens", "sparse layer", "experts", "without a token", "busiest / mean"]
    head += ["coefficient of variation", "entropy / maximum", "seeds"]
    keys = ["sparse_layer", "experts", "dead", "max_over_mean", "coefficient_of_variation", "entropy_share", "seeds"]
    rows = [
        [row["size"], row["arm"], number(row["tokens"]), *(number(row[key], 3) for key in keys)]
        for row in tree["experts"]
    ]
    return table("experts", head, rows) if rows else ""


def _sweep(tree: Tree) -> str:
    rows: list[list[Value | str]] = []
    for arm, winner in tree["sweep"].items():
        for score in winner["scores"]:
            settings = ", ".join(f"{key}={value:g}" for key, value in score["optim"].items())
            chosen = score["optim"] == winner["optim"]
            edge = f" (edge of the grid: {', '.join(winner['edge'])})" if chosen and winner["edge"] else ""
            mark = f"chosen{edge}" if chosen else ""
            loss = score["validation_cross_entropy"]
            shown = "diverged" if loss is None else number(loss, 5)
            rows.append([arm, settings, shown, mark, " ".join(score["runs"])])
    head = ["arm", "settings", "nats per token, validation split", "", "runs"]
    return table("sweep", head, rows) if rows else ""


def _runs(tree: Tree) -> str:
    head = ["run", "size", "arm", "tokens", "seed", "FLOPs", "seconds", "tokens/s", "threads", "settings", "folder"]
    head += ["commits", "changed since"]
    rows: list[list[Value | str]] = []
    for run in tree["runs"]:
        settings = ", ".join(f"{key}={value:g}" for key, value in (run.get("optim") or {}).items())
        changed = {None: "", True: "yes", False: "no"}[run.get("changed_since_commit")]
        rows.append(
            [run["run"], run["size"], run["arm"], number(run["tokens"]), number(run["seed"]), number(run.get("flops"))]
            + [number(run.get(key)) for key in ("seconds", "tokens_per_second", "num_threads")]
            + [settings, run.get("run_dir") or "", " ".join(run.get("commits") or []), changed]
        )
    return table("runs", head, rows) if rows else ""


def _missing(tree: Tree) -> str:
    return table("missing", ["run", "why"], [[name, why] for name, why in tree["missing"].items()])


_READING = """<p><b>Speedup</b>: what dense models would have spent to be as good as a sparse one, over what it spent.
The dense cost lies between the two neighbouring dense models, one worse and one better, linearly in the metric and
logarithmically in cost; where there is no such pair it is <i>not bracketed</i>, and nothing is extrapolated. The value
is a perplexity for text and a score for tasks; the interpolation in log-perplexity stands beside it.</p>
<p><b>Over seeds</b>: percentiles over trainings drawn anew. <b>Over documents</b>: percentiles over test documents
drawn anew, the same ones for every model, where there are at least 10. The first says what another training would
give, the second what other text of the kind would; neither contains the other. With two or three seeds the first is
a rough range.</p>
<p><b>all</b>: over all tokens of training's own domains (test split), or the mean over domains outside of them.
Learning rates were chosen on the validation split; nothing was chosen on the test split.</p>"""
