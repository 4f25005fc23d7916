"""The runs of a sweep in one table, made from the files that they left."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def overview(runs: Sequence[Sequence[str]], folders: Sequence[Path]) -> list[Row]:
    """A row per run: the overrides in which the runs differ, what came of it, and its folder.

    runs: the overrides of each run, in the same order; folders: where each is complete or has diverged.
    """
    differ = [place for place, values in enumerate(zip(*runs, strict=True)) if len(set(values)) > 1]
    rows = []
    for overrides, folder in zip(runs, folders, strict=True):
        chosen = [overrides[place].lstrip("+").partition("=") for place in differ]
        rows.append({key: value for key, _, value in chosen} | _outcome(folder) | {"run_dir": str(folder)})
    return rows


def write_overview(rows: Sequence[Row]) -> Path | None:
    """Write sweep-<hash of the folders>.csv beside the runs; None if their folders are not all in one place."""
    folders = [Path(row["run_dir"]) for row in rows]
    if len({folder.parent for folder in folders}) > 1:
        return None
    digest = hashlib.sha256("\n".join(folder.name for folder in folders).encode()).hexdigest()[:8]
    path = folders[0].parent / f"sweep-{digest}.csv"
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(scratch, path)
    return path


def print_overview(rows: Sequence[Row], path: Path | None, console: Console) -> None:
    """The same rows, rounded, and where `write_overview` put them."""
    table = Table(title="runs", title_justify="left", box=box.SIMPLE_HEAD)
    for name in rows[0]:
        digits = name in _DIGITS  # these are never wrapped
        table.add_column(
            name.replace("_", "\n"), overflow="fold", justify="right" if digits else "left", no_wrap=digits
        )
    for row in rows:
        table.add_row(*(_shown(name, value) for name, value in row.items()))
    console.print(table)
    if path is not None:
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)


_DIGITS = {"steps": 0, "validation_loss": 4, "bits_per_byte": 4, "seconds": 0}


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,.{_DIGITS[name]}f}" if name in _DIGITS else str(value)


def _outcome(folder: Path) -> Row:
    if not (folder / "results.json").exists():
        record = json.loads((folder / "diverged.json").read_text(encoding="utf-8"))
        figures = {"steps": record["step"], "validation_loss": None, "bits_per_byte": None}
        return figures | {"seconds": record["seconds"], "outcome": "diverged"}
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    loss, bits = _validation(results)
    figures = {"steps": results["steps"], "validation_loss": loss, "bits_per_byte": bits}
    return figures | {"seconds": results["seconds"], "outcome": "complete"}


def _validation(results: dict[str, Any]) -> tuple[float | None, float | None]:
    """Nats per token and bits per byte of the whole validation split; None where a loss was not finite."""
    if "splits" not in results:  # a tuning run
        figures = results["validation"]["groups"]["all"]
        return figures["cross_entropy"], figures.get("bits_per_byte")
    domains = results["splits"]["validation"]["domains"].values()
    if any(domain["cross_entropy"] is None for domain in domains):
        return None, None
    nats = math.fsum(domain["cross_entropy"] * domain["num_tokens"] for domain in domains)
    tokens, size = (sum(domain[name] for domain in domains) for name in ("num_tokens", "num_bytes"))
    return nats / tokens, nats / size / math.log(2)
