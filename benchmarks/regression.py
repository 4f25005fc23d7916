"""The committed time ratios, and whether a run still meets them. Ratios, because times differ between machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from .suite import Suite

TOLERANCE = 0.20  # a median of 7 rounds repeats within about 5% on a quiet machine, another CPU shifts it by more
_FORMAT = "moe.benchmark_ratios"


class Comparison(NamedTuple):
    """The result of --compare."""

    compared: int
    failures: list[str]
    better: list[str]  # by more than the tolerance: the file should be rewritten


def write(path: Path, suite: Suite) -> None:
    """Update the file with this run's ratios; those of other shapes and cases stay."""
    ratios = _read(path) if path.exists() else {}
    ratios |= {held.name: round(held.value, 4) for held in suite.held}
    content = {
        "format": _FORMAT,
        "tolerance": TOLERANCE,
        "what": "time over time in one interleaved run, median over rounds; smaller is better",
        "ratios": dict(sorted(ratios.items())),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def compare(path: Path, suite: Suite) -> Comparison:
    """Every measured ratio found in the file must be at most (1 + tolerance) times the committed one.

    A run without any such ratio compares nothing and fails.
    """
    committed = _read(path)
    measured = {held.name: held.value for held in suite.held}
    known = [name for name in measured if name in committed]
    failures = [
        f"{name}: {measured[name]:.3f}, committed {committed[name]:.3f}, at most {1 + TOLERANCE:.2f} times that"
        for name in known
        if not measured[name] <= committed[name] * (1 + TOLERANCE)
    ]
    if not known:
        failures = [f"none of the {len(measured)} measured ratios is in {path.name}: write it with --write-regression"]
    better = [
        f"{name}: {measured[name]:.3f}, committed {committed[name]:.3f}"
        for name in known
        if measured[name] < committed[name] / (1 + TOLERANCE)
    ]
    return Comparison(len(known), failures, better)


def _read(path: Path) -> dict[str, float]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a file of ratios: its format must be {_FORMAT!r}")
    ratios: dict[str, float] = content["ratios"]
    return ratios
