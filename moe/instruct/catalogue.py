"""One HTML page of all tasks with samples, readable without server or network; only the search box needs a script."""

from __future__ import annotations

from html import escape
from itertools import islice
from pathlib import Path

from moe.instruct.benchmark import SPLITS, Benchmark, TaskEntry
from moe.instruct.records import Record, read_records

SAMPLES = 3  # per task
_LONGEST_TEXT = 1200  # characters shown of a prompt
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.15em .8em;text-align:left;border-bottom:1px solid #ccc}"
    "details{border-top:1px solid #ccc;padding:.3em 0}summary{cursor:pointer}"
    "summary small{color:#555}pre{white-space:pre-wrap;background:#f5f5f5;padding:.6em;margin:.4em 0}"
    "pre.target{background:#e8f3e8}input{width:100%;font:inherit;padding:.4em}"
)
_SCRIPT = (
    "const box=document.querySelector('input');box.addEventListener('input',()=>{const q=box.value.toLowerCase();"
    "for(const d of document.querySelectorAll('details'))d.hidden=!d.dataset.search.includes(q)})"
)


def write_catalogue(benchmark: Benchmark, path: Path) -> None:
    """Write the page. All data set text is escaped, since it can contain markup."""
    with path.open("w", encoding="utf-8", errors="replace") as file:
        name = escape(benchmark.manifest["name"])
        file.write(f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title><style>{_STYLE}</style>")
        file.write(f"<h1>{name}</h1>{_summary(benchmark)}")
        file.write("<p><input placeholder='search task, category, data source, split' aria-label=search></p>")
        for split in SPLITS:
            entries = sorted(benchmark.tasks(split), key=lambda entry: (entry.category, entry.task))
            file.write(f"<h2>{split}</h2>")
            for entry in entries:
                samples = list(islice(read_records(benchmark.folder / entry.file), SAMPLES))
                file.write(_task(entry, split, samples))
        file.write(f"<script>{_SCRIPT}</script></html>\n")


def _summary(benchmark: Benchmark) -> str:
    rows = "".join(
        f"<tr><td>{split}<td>{item['tasks']}<td>{item['categories']}<td>{item['records']:,}"
        for split, item in ((split, benchmark.manifest["splits"][split]) for split in SPLITS)
    )
    held_out = ", ".join(benchmark.manifest["held_out_categories"]) or "none"
    return (
        f"<table><tr><th>split<th>tasks<th>categories<th>records{rows}</table>"
        f"<p>Categories held out whole: {escape(held_out)}.</p>"
    )


def _task(entry: TaskEntry, split: str, samples: list[Record]) -> str:
    facts = [entry.category, f"{entry.records:,} records", f"{entry.style} style", f"source {entry.data_source}"]
    facts += [entry.level_name] if entry.level_name else []
    search = escape(
        " ".join([entry.task, entry.category, entry.data_source, split, entry.level_name]).lower(), quote=True
    )
    skipped = "".join(f"<li>{count} skipped: {escape(reason)}" for reason, count in entry.skipped.items())
    return (
        f'<details data-search="{search}"><summary>{escape(entry.task)} <small>{escape(" · ".join(facts))}</small>'
        f"</summary><p>Licence: {escape(entry.licence)}</p><ul>{skipped}</ul>"
        f"{''.join(map(_sample, samples))}</details>\n"
    )


def _sample(record: Record) -> str:
    prompt = "\n".join(part for part in (record.instruction, record.input) if part)
    template = f"<p><small>template {escape(record.template)}</small></p>" if record.template else ""
    candidates = f"<p><small>candidates: {escape(_short(' | '.join(record.candidates)))}</small></p>"
    return (
        f"{template}<pre>{escape(_short(prompt))}</pre><pre class=target>{escape(_short(record.targets[0]))}</pre>"
        f"{candidates if record.candidates else ''}"
    )


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"
