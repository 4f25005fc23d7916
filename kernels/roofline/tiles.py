"""Tiles of the grouped products, and what one step of their inner loop takes on a processor.

The instructions the compiler chose and how many programs fit on a processor are read from `kernels/aot_costs.csv`,
the compiler's results for each target.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..tiles import HALF_TILES as TILES
from ..tiles import Tile
from .devices import SHARED_BYTES_PER_CYCLE, Device

COSTS = Path(__file__).parents[1] / "aot_costs.csv"
ELEMENT_BYTES = 2  # bfloat16 or float16, whose tensor-core rates the data sheets state
GROUP_ROWS = 8  # row tiles that go through all columns together (GROUP_M of the kernels)

# The share of the peak that mma.sync reaches. On an H100 only wgmma reaches all of it: Luo et al. 2024
# (arXiv 2402.13499) measured 63% on average for mma.sync. No data sheet states it.
MMA_SYNC_SHARE = {"sm_80": 1.0, "sm_90": 0.63}


class Compiled(NamedTuple):
    """What the compiler made of a kernel for one target."""

    programs: int  # that fit on a processor together: the fewest of all variants with this tile
    instruction: str  # "wgmma", "mma.sync" or "mfma"


class Step(NamedTuple):
    """One step of a tile's inner loop on one processor, in cycles of its clock."""

    issue: float  # of tensor-core instructions
    read: float  # of operands from shared memory by those instructions
    fill: float  # of the next blocks into shared memory

    @property
    def cycles(self) -> float:
        """The longer of issue and reading: a lower bound, as if blocks entered shared memory by their own path."""
        return max(self.issue, self.read)

    @property
    def one_path_cycles(self) -> float:
        """The same if reading and filling share one path to shared memory."""
        return max(self.issue, self.read + self.fill)


def choose_tile(rows: int, groups: int, columns: int, inner: int) -> Tile:
    """The tallest tile that the mean load fills at least half, as the kernels choose it. Sizes are in elements.

    Raises ValueError if columns or inner is not a multiple of 16: the kernels then load element by element, which is
    not modelled.
    """
    if columns % 16 or inner % 16:
        raise ValueError(f"columns ({columns}) and inner ({inner}) must be multiples of 16: pad them")
    mean = rows // max(1, min(groups, rows))
    tile = max((tile for tile in TILES if tile.rows <= 2 * mean), default=TILES[0])
    return tile._replace(columns=_power_of_2(columns, tile.columns), inner=_power_of_2(inner, tile.inner))


def outer_tile(columns: int, inner: int) -> Tile:
    """The tile over a weight gradient (columns, inner); its `inner` runs over rows."""
    full = choose_tile(1 << 20, 1, inner, 1 << 20)
    return full._replace(rows=_power_of_2(columns, full.rows))


def _power_of_2(value: int, highest: int) -> int:
    return min(highest, max(16, 1 << (value - 1).bit_length()))


@cache
def _costs() -> tuple[dict[str, str], ...]:
    with COSTS.open(newline="") as file:
        return tuple(csv.DictReader(file))


def compiled(op: str, kernel: str, configuration: str, tile: Tile, target: str) -> Compiled:
    """Resources of a kernel whose configuration contains these words, with the warps and stages of `tile`.

    Raises ValueError if aot_costs.csv has no such kernel: `moe kernels --out kernels/aot_costs.csv` writes it.
    """
    words = set(configuration.split())
    found = [
        row
        for row in _costs()
        if (row["op"], row["kernel"], row["target"]) == (op, kernel, target)
        and words <= set(row["configuration"].split())
        and (int(row["num_warps"]), int(row["num_stages"])) == (tile.num_warps, tile.num_stages)
    ]
    if not found:
        raise ValueError(
            f"{COSTS.name} has no {op} {kernel} for {configuration!r}, {tile.num_warps} warps and "
            f"{tile.num_stages} stages for {target}: run `moe kernels --out kernels/{COSTS.name}` to write it again"
        )
    wide = all(int(row["wgmma_instructions"]) > 0 for row in found)
    instruction = "mfma" if target.startswith("gfx") else "wgmma" if wide else "mma.sync"
    return Compiled(min(int(row["programs_per_processor"]) for row in found), instruction)


def step_of(tile: Tile, matrices: int, instruction: str, device: Device) -> Step:
    """Cycles of one step, `tile.inner` deep, of a tile that multiplies one block of rows by `matrices` blocks.

    Issue: the multiply-adds of all blocks at the processor's peak rate. For wgmma m64nNk16 that is N/2 cycles on an
    H100, for mma.sync m16n8k16 2 cycles on an A100 with all four tensor cores busy; mma.sync on an H100 issues at
    MMA_SYNC_SHARE. Reading, at SHARED_BYTES_PER_CYCLE: wgmma takes both operands from shared memory, each group of
    four warps its 64 rows and all of its columns, again for every matrix. mma.sync and mfma take them from registers:
    the warps form a grid over the tile, and each loads its rows once and its columns of every matrix. Filling: each
    block enters shared memory once. Programs that share a processor share these rates, so their number does not
    matter here.
    """
    rows_bytes = tile.rows * tile.inner * ELEMENT_BYTES
    columns_bytes = tile.columns * tile.inner * ELEMENT_BYTES
    share = MMA_SYNC_SHARE[device.target] if instruction == "mma.sync" else 1.0
    issue = matrices * tile.rows * tile.columns * tile.inner / (device.products_per_cycle * share)
    if instruction == "wgmma":
        groups = max(1, tile.num_warps // 4)
        down = min(groups, max(1, tile.rows // 64))
        read = matrices * (rows_bytes * (groups // down) + columns_bytes * down)
    else:
        down, across = warp_grid(tile)
        read = rows_bytes * across + matrices * columns_bytes * down
    fill = rows_bytes + matrices * columns_bytes
    return Step(issue, read / SHARED_BYTES_PER_CYCLE, fill / SHARED_BYTES_PER_CYCLE)


def warp_grid(tile: Tile) -> tuple[int, int]:
    """Warps down and across a tile: the longer side of a warp's block is halved until every warp has one."""
    down = across = 1
    while down * across < tile.num_warps:
        if tile.rows // down >= tile.columns // across and tile.rows // down > 16:
            down *= 2
        else:
            across *= 2
    return down, across
