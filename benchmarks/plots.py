"""Layer time against number of experts and against imbalance, from the rows of bench_load."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .loads import ROUTINGS
from .suite import Row

CASE = "load, GELU"


class Point(NamedTuple):
    """One measured load."""

    num_experts: int
    routing: str
    imbalance: float  # rows of the busiest expert, relative to the mean
    to_dense: float  # time relative to the dense twin's


def points(rows: Sequence[Row], loads: Mapping[str, float]) -> list[Point]:
    """The points to draw; rows that failed their check have no time and are left out."""
    found = []
    for row in rows:
        match = re.fullmatch(r"ours (T=.* E=(\d+)) (\S+)", row.name)
        if row.case == CASE and match and row.to_dense is not None:
            load = loads[f"load, {match[1]}, {match[3]}"]
            found.append(Point(int(match[2]), match[3], load, row.to_dense))
    return found


def draw(rows: Sequence[Row], loads: Mapping[str, float], path: Path) -> str | None:
    """Write the plot; return why there is none, or None."""
    drawn = points(rows, loads)
    if not drawn:
        return "bench_load was not run"
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed"
    import matplotlib  # optional and slow to import

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for routing in ROUTINGS:
        line = sorted(point for point in drawn if point.routing == routing)
        left.plot([p.num_experts for p in line], [p.to_dense for p in line], marker="o", label=routing)
    for num_experts in sorted({point.num_experts for point in drawn}):
        line = sorted((p for p in drawn if p.num_experts == num_experts), key=lambda p: p.imbalance)
        right.plot([p.imbalance for p in line], [p.to_dense for p in line], marker="o", label=f"E={num_experts}")
    left.set(xscale="log", xlabel="experts E", ylabel="forward and backward, over the dense twin's")
    right.set(xscale="log", xlabel="rows of the busiest expert over the mean")
    for axes in (left, right):
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return None
