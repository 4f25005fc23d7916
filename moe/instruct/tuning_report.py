"""Reports of a tuning run, made from its files alone: what it read, and the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moe.checkpoint import list_checkpoints
from moe.instruct.loader import PackingReport


def print_tuning_summary(run_dir: Path, console: Console | None = None) -> None:
    """Print the metrics on held-out examples before and after, a single task's accuracy, and what was read."""
    console = Console() if console is None else console
    results = json.loads((run_dir / "results.json").read_text())
    mixture = json.loads((run_dir / "mixture.json").read_text())
    before = json.loads((run_dir / "before.json").read_text())
    table = Table(title="held-out examples, nats per target token", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("group", "before", "after", "targets"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for group, figures in results["validation"]["groups"].items():
        losses = (before["validation"]["groups"][group]["cross_entropy"], figures["cross_entropy"])
        table.add_row(group, *(f"{loss:.3f}" for loss in losses), f"{figures['num_targets']:,.0f}")
    console.print(table)
    for name in ("held_out", "evaluation"):
        if name in results:
            found = results[name]
            chance = f", chance {found['chance']:.1%}" if "chance" in found else ""
            untuned = f", before {before[name]['accuracy']:.1%}"
            interval = f"[{found['low']:.1%}, {found['high']:.1%}]"
            console.print(f"accuracy, {name}: {found['accuracy']:.1%} {interval}{untuned}{chance}", markup=False)
    if (best := run_dir / "best").is_dir():
        console.print(f"these are of the best weights, in {best}: {list_checkpoints(best)[-1].name}")
    console.print(
        f"{mixture['used']:.1%} of positions held a token, {mixture['counted']:.1%} a target; "
        f"{results['tokens_per_second']:,.0f} positions per second"
    )
    console.print(
        f"[bold]{run_dir}[/bold]: config.yaml metrics.jsonl before.json results.json mixture.json checkpoints/"
    )


def mixture_table(report: PackingReport) -> str:
    """What a run reads, as lines of text."""
    width = max(len("benchmark"), *(len(row.name) for row in report.benchmarks))
    lines = [
        f"{'benchmark':{width}}  {'intended':>8}  {'sampled':>8}  {'examples':>10}  {'positions':>9}  {'targets':>8}"
    ]
    for row in report.benchmarks:
        lines.append(
            f"{row.name:{width}}  {row.intended:8.2%}  {row.sampled:8.2%}  {row.examples:10,}  {row.positions:9.2%}  "
            f"{row.targets:8.2%}"
        )
    lines.append(
        f"{report.sequences:,} sequences ({report.text_sequences:,} of text), {report.examples_per_sequence:.1f} "
        f"examples in one; {report.used:.2%} of positions hold a token, {report.counted:.2%} a target; "
        f"{report.text_counted:.2%} of the targets are text"
    )
    return "\n".join(lines)


def packing_facts(report: PackingReport) -> dict[str, Any]:
    """The same as plain values, for mixture.json."""
    rows = {name: [row._asdict() for row in getattr(report, name)] for name in ("benchmarks", "tasks")}
    return report._asdict() | rows
