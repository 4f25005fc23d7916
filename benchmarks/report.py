"""The measurements as a terminal table, JSON, a section of a Markdown page, and a plot."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from . import plots
from .clock import Clock
from .peers import PEERS
from .suite import Held, Row, Suite

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

Columns = list[tuple[str, int, Any]]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _amount(value: float | None, unit: float) -> str:
    if not value:
        return ""
    return f"{value / unit:.0f}" if value >= 100 * unit else f"{value / unit:.3g}"


def columns() -> Columns:
    """(head, width, text of a row), for terminal and page alike."""
    return [
        ("what", 30, lambda r: f"{r.name}{f' ({r.backend})' if r.backend not in ('', 'auto') else ''}"),
        ("dtype", 6, lambda r: r.dtype),
        ("ms", 8, lambda r: _ms(r.seconds)),
        ("±", 5, lambda r: _percent(r.spread)),
        ("fwd ms", 8, lambda r: _ms(r.forward_seconds)),
        ("wall ms", 8, lambda r: _ms(r.wall_seconds)),
        ("GFLOP", 7, lambda r: _amount(r.useful_flops, 1e9)),
        ("executed", 9, lambda r: _amount(r.executed_flops, 1e9)),
        ("GFLOP/s", 8, lambda r: _amount(r.flops_per_second, 1e9)),
        ("of GEMM", 8, lambda r: _percent(r.gemm_share)),
        ("MB", 7, lambda r: _amount(r.bytes, 1e6)),
        ("of copy", 8, lambda r: _percent(r.bandwidth_share)),
        ("of bound", 9, lambda r: _percent(r.bound_share)),
        ("saved MB", 9, lambda r: _amount(r.saved_bytes, 1e6)),
        ("formula", 8, lambda r: _amount(r.saved_formula, 1e6)),
        ("padded", 7, lambda r: _percent(r.padded_share)),
        ("/ dense", 8, lambda r: _times(r.to_dense)),
        ("/ first", 8, lambda r: _times(r.to_first)),
        ("n", 3, lambda r: str(r.rounds or "")),
    ]


def _row_text(row: Row) -> list[str]:
    return [text(row) for _, _, text in columns()]


def terminal_lines(suite: Suite) -> list[str]:
    """The full report, for a wide terminal."""
    widths = [width for _, width, _ in columns()]
    widths[0] = max([widths[0], *(len(_row_text(row)[0]) for row in suite.rows)])

    def line(cells: Sequence[str]) -> str:
        others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return " ".join([cells[0].ljust(widths[0]), *others])

    lines = [*facts(suite), ""]
    for case, rows in groupby(suite.rows, key=lambda row: row.case):
        lines += [case, line([head for head, _, _ in columns()])]
        for row in rows:
            note = "" if row.check == "ok" else f"  {row.check}"
            lines.append(line(_row_text(row)) + note)
        lines.append("")
    return [*lines, LEGEND, "", *held_lines(suite), *comparison_lines(suite)]


LEGEND = (
    "ms: median over rounds of forward and backward; ±: half of slowest minus fastest round; of GEMM, of copy: share "
    "of the rates measured in the same rounds; of bound: max(FLOPs / GEMM rate, bytes / copy rate) over the time; "
    "saved: activations kept for the backward, measured and by formula; padded: share of multiplied rows that hold no "
    "token; / dense, / first: median of the ratios of each round, below 1 is faster than that; n: rounds. A row "
    "without times failed its check."
)


def facts(suite: Suite) -> list[str]:
    """What was measured, with what, and on what."""
    options = suite.options
    clock = Clock(suite.device, options.threads).ratio_clock
    fewer = "" if options.few_rounds == options.num_rounds else f", {options.few_rounds} where little is required"
    rounds = f"{options.num_rounds} rounds{fewer}"
    lines = [
        f"{machine(suite)['name']}; {options.threads} thread(s); ratios are of {clock}; {rounds}",
        "; ".join(f"{name} {version}" for name, version in versions().items()),
        "measured limits: "
        + "; ".join(f"{name}: {statistics.median(rates) / 1e9:.1f} G/s" for name, rates in suite.limits.items()),
    ]
    asked = [(name, PEERS[name]) for name in options.peers]
    missing = [name for name, peer in asked if not peer.installed]
    unfit = [name for name, peer in asked if peer.installed and peer.gpu and suite.device.type != "cuda"]
    lines.append(f"peers not installed: {', '.join(missing) or 'none'}")
    if unfit:
        lines.append(f"peers that need a GPU: {', '.join(unfit)}")
    if suite.counts:
        equal = sum(suite.counts.values())
        lines.append(f"FLOP counts: {equal} of {len(suite.counts)} equal torch.utils.flop_counter")
    lines += [f"busiest expert over the mean, {case}: {load:.2f}" for case, load in suite.loads.items()]
    return lines


def held_lines(suite: Suite) -> list[str]:
    """Each ratio with its limit and goal."""
    return [f"{_verdict(held):<9}{held.value:8.3f}  {held.name}{_required(held)}" for held in suite.held]


def _verdict(held: Held) -> str:
    if held.limit is not None and not held.value <= held.limit:
        return "MISSED"
    if held.goal is not None and not held.value <= held.goal:
        return "held" if held.limit is not None else "no goal"
    return "" if held.limit is None and held.goal is None else "goal" if held.goal is not None else "held"


def _required(held: Held) -> str:
    limit = "" if held.limit is None else f", at most {held.limit:.3f}"
    return limit + ("" if held.goal is None else f", goal {held.goal:.2f}")


def comparison_lines(suite: Suite) -> list[str]:
    """The result of --compare."""
    found = suite.regressions
    if found is None:
        return []
    lines = [
        "",
        f"--compare: {found.compared} ratios compared, {len(found.failures)} worse, {len(found.better)} better",
    ]
    return [*lines, *(f"WORSE {text}" for text in found.failures), *(f"better {text}" for text in found.better)]


def machine(suite: Suite) -> dict[str, Any]:
    """A description of the device."""
    if suite.device.type == "cuda":
        return {"name": torch.cuda.get_device_name(suite.device), "device": "cuda"}
    found = re.search(r"model name\s*:\s*(.*)", _read("/proc/cpuinfo"))
    name = found.group(1) if found else platform.processor() or platform.machine()
    return {"name": f"{name}, {torch.get_num_threads()} of {_cores()} cores", "device": "cpu"}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:  # not Linux
        return ""


def _cores() -> int:
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of Python and of everything compared."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", *sorted({peer.package for peer in PEERS.values()} - {"torch"})):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, with "modified" if files differ from it; "unknown" outside git."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (", modified" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def as_json(suite: Suite, command: str) -> dict[str, Any]:
    """Everything as plain data; `ratios` maps names to values, as in benchmarks/regression.json."""
    return {
        "format": "moe.benchmarks",
        "command": command,
        "commit": commit(),
        "machine": machine(suite),
        "versions": versions(),
        "threads": suite.options.threads,
        "rounds": suite.options.num_rounds,
        "ratio_clock": Clock(suite.device, suite.options.threads).ratio_clock,
        "limits_per_second": {name: statistics.median(rates) for name, rates in suite.limits.items()},
        "flop_counts_equal_to_torch": suite.counts,
        "load_max_over_mean": suite.loads,
        "rows": [row.__dict__ for row in suite.rows],
        "ratios": {held.name: held.value for held in suite.held},
        "required": {held.name: held.limit for held in suite.held if held.limit is not None},
        "goals": {held.name: held.goal for held in suite.held if held.goal is not None},
    }


def as_markdown(suite: Suite, command: str, plot: str | None) -> str:
    """The page's section, including its markers."""
    lines = [BEGIN, "", f"`{command}`, commit {commit()}.", ""]
    lines += [f"- {fact}" for fact in facts(suite)]
    lines += [
        "",
        f"{LEGEND}",
        "",
        "### Ratios that are held",
        "",
        "| | measured | at most | goal | |",
        "|---|---|---|---|---|",
    ]
    for held in suite.held:
        limit = "" if held.limit is None else f"{held.limit:.3f}"
        goal = "" if held.goal is None else f"{held.goal:.2f}"
        lines.append(f"| {held.name} | {held.value:.3f} | {limit} | {goal} | {_verdict(held)} |")
    if plot is not None:
        lines += ["", f"![time against the number of experts, and against imbalance]({plot})"]
    for case, rows in groupby(suite.rows, key=lambda row: row.case):
        heads = [head for head, _, _ in columns()]
        lines += ["", f"### {case}", "", f"| {' | '.join(heads)} | check |", "|---" * (len(heads) + 1) + "|"]
        lines += [f"| {' | '.join(_row_text(row))} | {row.check} |" for row in rows]
    return "\n".join([*lines, "", END])


def require_page(page: Path | None) -> None:
    """Raise ValueError unless `page` can take the section: a new file, or one with both markers exactly once."""
    if page is None or not page.exists():
        return
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"--markdown ({page}) must have {BEGIN} and, below it, {END}, each once; only what is between is written"
        )


def rewrite(page: Path, section: str) -> None:
    """Replace the section between the page's markers, or create the page."""
    require_page(page)
    text = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    page.write_text(before + section + rest.split(END)[1], encoding="utf-8")


def write_files(suite: Suite, json_path: Path | None, page: Path | None, arguments: Sequence[str]) -> list[str]:
    """Write the requested files; return descriptions of them. Plots need matplotlib and are skipped without it."""
    command = " ".join(["python -m pytest", *map(str, arguments)])
    lines = []
    plot = None
    for path in (json_path, page):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            plot = path.with_suffix(".svg")
    if plot is not None:
        missing = plots.draw(suite.rows, suite.loads, plot)
        lines.append(f"wrote {plot}" if missing is None else f"no plot: {missing}")
        plot = plot if missing is None else None
    if json_path is not None:
        json_path.write_text(json.dumps(as_json(suite, command), indent=1) + "\n", encoding="utf-8")
        lines.append(f"wrote {json_path}")
    if page is not None:
        rewrite(page, as_markdown(suite, command, None if plot is None else plot.name))
        lines.append(f"wrote {page}")
    return lines
