"""The tables of `moe kernels`: each Triton kernel's resource use per GPU, and its fastest tiles on the local one."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe.kernels import tuning
from moe.kernels.aot import KernelCost

COLUMNS = {
    "warps": "num_warps",
    "stages": "num_stages",
    "registers": "registers",
    "spills": "spill_instructions",
    "stack": "stack_bytes",
    "shared": "shared_bytes",
    "resident": "programs_per_processor",
    "tensor": "tensor_instructions",
    "wgmma": "wgmma_instructions",
    "async": "async_copies",
    "tma": "tma_copies",
}


def print_table(rows: Sequence[KernelCost]) -> None:
    """One line per kernel, configuration and target; shared memory and stack in bytes, the rest counts."""
    table = Table(box=None)
    for name in ("op", "kernel", "configuration", "target"):
        table.add_column(name, overflow="fold")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        figures = ["error"] if row.error is not None else [str(getattr(row, field)) for field in COLUMNS.values()]
        table.add_row(row.op, row.kernel, row.configuration, row.target, *figures)
    Console(width=180).print(table)


def write_csv(rows: Sequence[KernelCost], path: Path) -> None:
    """Write the same figures to a file that can be diffed: nothing in it varies from run to run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_KEYS, *COLUMNS.values()])
        writer.writerows([[getattr(row, name) for name in (*_KEYS, *COLUMNS.values())] for row in rows])


def print_winners(device: str = "cuda") -> None:
    """Measure the candidate tiles of the grouped GEMMs at `tuning.SHAPES`: one line per tile, fastest first.

    Raises ValueError without a GPU.
    """
    table = Table(box=None)
    for name in ("kernel", "dtype", "rows", "experts", "columns", "inner", "tile", "ms", "TFLOP/s"):
        table.add_column(name, justify="left" if name in ("kernel", "dtype", "tile") else "right")
    for problem in tuning.problems():
        figures = [str(value).removeprefix("torch.") for value in problem]
        flops = 2 * problem.rows * problem.columns * problem.inner
        for tile, milliseconds in tuning.tune(problem, device):
            table.add_row(*figures, str(tile), f"{milliseconds:.3f}", f"{flops / milliseconds / 1e9:.0f}")
    Console(width=180).print(table)


_KEYS = ("op", "kernel", "configuration", "target")
