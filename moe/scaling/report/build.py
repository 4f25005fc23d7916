"""The report's files: report.json, tables as CSV, plots as SVG and PNG, and report.html, which contains all of them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.scaling.report import plots
from moe.scaling.report.analysis import analyse
from moe.scaling.report.page import page
from moe.scaling.report.records import Found


def write(found: Found, folder: Path, *, resamples: int = 1000) -> Path:
    """Write everything into `folder`, report.html last. Returns its path."""
    tree = analyse(found, resamples=resamples)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "report.json", json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    for name, rows in tables(tree).items():
        _write_csv(folder / f"{name}.csv", rows)
    drawings = []
    for name, (title, figure) in plots.figures(tree).items():
        drawing = plots.svg(figure, name)
        _write(folder / f"{name}.svg", drawing + "\n")
        (folder / f"{name}.png").write_bytes(plots.png(figure))
        drawings.append((name, title, drawing))
    _write(folder / "report.html", page(tree, drawings))
    return folder / "report.html"


def tables(tree: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Flat rows, one value per column, for spreadsheets: runs, models, speedups, pairs, fits and experts."""
    runs = [
        {**{k: v for k, v in row.items() if k != "metrics"}, "metric": key, "value": value}
        for row in tree["runs"]
        for key, value in row["metrics"].items()
    ]
    models = [
        {**{k: v for k, v in row.items() if k != "metrics"}, "metric": key, **figures}
        for row in tree["models"]
        for key, figures in row["metrics"].items()
    ]
    found = {"runs": runs, "models": models, "speedups": tree["speedups"], "pairs": tree["pair_differences"]}
    found |= {"fits": tree["fits"], "experts": tree["experts"]}
    return {name: [_flat(row) for row in rows] for name, rows in found.items() if rows}


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parts become columns "part.part"; a list becomes one cell."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return flat


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(scratch, path)


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
