"""The committed time ratios, and whether a run still meets them. Ratios, because times differ between machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from .suite import Held, Suite

TOLERANCE = 0.20  # a median of 7 rounds repeats within about 5% on a quiet machine, another CPU shifts it by more
# Processes that share two cores: one ratio went from 0.89 to 1.27 in five runs of a day, another from 1.3 to 2.1.
TOLERANCE_ACROSS_PROCESSES = 0.60
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
        "tolerance_across_processes": TOLERANCE_ACROSS_PROCESSES,
        "what": "time over time in one interleaved run, median over rounds; smaller is better",
        "ratios": dict(sorted(ratios.items())),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def compare(path: Path, suite: Suite) -> Comparison:
    """Every measured ratio found in the file must be at most (1 + its tolerance) times the committed one.

    A run without any such ratio compares nothing and fails.
    """
    committed = _read(path)
    known = [held for held in suite.held if held.name in committed]
    failures = [
        f"{_against(held, committed)}, at most {1 + _tolerance(held):.2f} times that"
        for held in known
        if not held.value <= committed[held.name] * (1 + _tolerance(held))
    ]
    if not known:
        failures = [
            f"none of the {len(suite.held)} measured ratios is in {path.name}: write it with --write-regression"
        ]
    better = [_against(held, committed) for held in known if held.value < committed[held.name] / (1 + _tolerance(held))]
    return Comparison(len(known), failures, better)


def _tolerance(held: Held) -> float:
    return TOLERANCE_ACROSS_PROCESSES if held.across_processes else TOLERANCE


def _against(held: Held, committed: dict[str, float]) -> str:
    return f"{held.name}: {held.value:.3f}, committed {committed[held.name]:.3f}"


def _read(path: Path) -> dict[str, float]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a file of ratios: its format must be {_FORMAT!r}")
    ratios: dict[str, float] = content["ratios"]
    return ratios
