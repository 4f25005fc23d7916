"""The table of tiles: how large a block of a grouped product one Triton program computes at a time.

Plain numbers, without torch, for the launchers, tuning and the roofline alike.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """The block of a product that one program computes at a time, and the warps, stages and registers for it."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    per_processor: int  # programs of this size that fit on one processor of an H100
    max_registers: int | None = None  # per thread, where those programs would not fit without a limit
    descriptors: bool = True  # load by tensor descriptors (TMA) where hardware and operands allow it

    @property
    def size(self) -> str:
        """Rows x columns x inner, as written in the names of configurations."""
        return f"{self.rows}x{self.columns}x{self.inner}"

    def __str__(self) -> str:
        size = f"{self.size} {self.num_warps} warps {self.num_stages} stages"
        return size if self.descriptors else f"{size} pointers"


# The table. Sizes let two or three programs share a processor's shared memory (227 KiB); the ahead-of-time table shows
# that none of them spills registers. Wider dtypes load by pointer: their products do not read shared memory, and the
# fused float32 kernel spills when a block is loaded by descriptor (267 instructions on sm_90).
HALF_TILES = (
    Tile(16, 128, 64, 4, 3, 3),
    Tile(32, 128, 64, 4, 3, 3),
    Tile(64, 128, 64, 4, 3, 2),
    Tile(128, 128, 64, 8, 3, 2, max_registers=128),
)
SINGLE_TILES = (
    Tile(16, 64, 32, 4, 3, 3, descriptors=False),
    Tile(32, 64, 32, 4, 3, 3, descriptors=False),
    Tile(64, 64, 32, 4, 3, 3, descriptors=False),
)
DOUBLE_TILES = (Tile(16, 32, 16, 4, 2, 3, descriptors=False),)
