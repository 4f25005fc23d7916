"""The table of tiles: how large a block of a grouped product one Triton program makes at a time.

Plain numbers, without torch, for the launchers, for tuning and for the roofline alike.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """The block of a product that one program makes at a time, and the registers and stages it takes for that."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    per_processor: int  # programs of this size that fit one processor of an H100 together
    max_registers: int | None = None  # of a thread, where those programs would not fit without a limit
    descriptors: bool = True  # load by tensor descriptors (TMA) where hardware and operands allow it

    @property
    def size(self) -> str:
        """Rows x columns x inner, as names of configurations write it."""
        return f"{self.rows}x{self.columns}x{self.inner}"

    def __str__(self) -> str:
        size = f"{self.size} {self.num_warps} warps {self.num_stages} stages"
        return size if self.descriptors else f"{size} pointers"


# The table. Sizes follow from the shared memory of two or three programs on a processor (227 KiB); the ahead-of-time
# table shows that none of them spills registers. Wider numbers go by pointer: their products do not read shared memory,
# and the fused kernel with float32 spills when a block comes by descriptor (267 instructions on sm_90).
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
