"""The work of a kernel, and of the two kinds of grouped product: rows times matrices, and rows times rows."""

from __future__ import annotations

from typing import NamedTuple

from .tiles import ELEMENT_BYTES, Tile, outer_tile
from .traffic import Walk, outer_walk, product_walk

INDEX_BYTES = 8  # int64
SINGLE_BYTES = 4  # float32: scores, weights and partial sums


class Run(NamedTuple):
    """Consecutive tiles of a kernel that take the same number of steps."""

    tiles: int
    steps: int


class Work(NamedTuple):
    """What one op of the layer does on any GPU. Its products are tiled if it has a tile."""

    op: str
    name: str
    launches: int  # kernels in total, torch's included
    compulsory_bytes: int  # each tensor read or written once, gathered tokens once
    fixed_bytes: int  # moved whatever the order of tiles; all bytes if there are none
    flops: int = 0  # of its products, without padding
    executed_flops: int = 0  # with the padding of tiles
    recomputed: bool = False  # repeats products that were not kept: none of them is useful
    ops: int = 0  # roughly, outside the tensor cores
    kernel: str = ""  # with the next three: the key into aot_costs.csv
    compiled_op: str = ""
    configuration: str = ""
    tile: Tile | None = None
    matrices: int = 1  # blocks by which a step multiplies one block of rows
    walk: Walk | None = None
    grids: tuple[tuple[Run, ...], ...] = ()  # one per launch

    @property
    def useful_flops(self) -> int:
        """What the mathematics needs."""
        return 0 if self.recomputed else self.flops

    @property
    def intensity(self) -> float:
        """FLOPs per compulsory byte."""
        return self.flops / self.compulsory_bytes

    @property
    def num_tiles(self) -> int:
        """Over all launches."""
        return sum(run.tiles for grid in self.grids for run in grid)

    @property
    def requested_bytes(self) -> int:
        """What tiles read one by one plus all else that is moved: the memory traffic without any cache."""
        return self.fixed_bytes + (0 if self.walk is None else self.walk.requested_bytes)


def product_work(
    op: str,
    name: str,
    expert_rows: list[int],
    tile: Tile,
    columns: int,
    inner: int,
    configuration: str,
    *,
    kernel: str = "product_kernel",
    matrices: int = 1,
    terms: int = 1,
    num_tokens: int | None = None,
    read: int = 0,
    written: int | None = None,
    extra: int = 0,
    helpers: int = 1,
    recomputed: bool = False,
    chunks: list[int] | None = None,
) -> Work:
    """Rows (R, inner) times each expert's (columns, inner) matrix.

    matrices: how many multiply the same rows. terms: how many products, of different rows and matrices, are summed.
    num_tokens: the tokens that rows are gathered from. read, written: bytes of the epilogue; `None` is the product
    itself. extra: bytes moved although the result does not need them. helpers: launches besides the product's: the
    schedule of row tiles, and sums by torch. chunks: rows of each launch if one expert's are cut into several.
    """
    total, busy = sum(expert_rows), sum(rows > 0 for rows in expert_rows)
    deep, wide = -(-inner // tile.inner), -(-columns // tile.columns)
    written = total * columns * ELEMENT_BYTES if written is None else written
    if num_tokens is not None:
        read += total * INDEX_BYTES
    sources = min(total, total if num_tokens is None else num_tokens) * inner * terms
    weights = busy * columns * inner * matrices * terms
    launches = [expert_rows] if chunks is None else [[rows] for rows in chunks]
    grids = tuple((Run(sum(-(-rows // tile.rows) for rows in launched) * wide, deep * terms),) for launched in launches)
    num_tiles = sum(run.tiles for grid in grids for run in grid)
    pairs = matrices * terms
    return Work(
        op=op,
        name=name,
        launches=len(launches) + helpers,
        compulsory_bytes=(sources + weights) * ELEMENT_BYTES + read + written,
        fixed_bytes=read + written + extra,
        flops=2 * total * columns * inner * pairs,
        executed_flops=2 * num_tiles * tile.rows * tile.columns * deep * tile.inner * pairs,
        recomputed=recomputed,
        kernel=kernel,
        compiled_op="grouped_gemm" if kernel == "product_kernel" else op,
        configuration=configuration,
        tile=tile,
        matrices=matrices,
        walk=product_walk(expert_rows, tile, columns, inner, terms, pairs, num_tokens),
        grids=grids,
    )


def outer_work(
    op: str,
    name: str,
    expert_rows: list[int],
    columns: int,
    inner: int,
    configuration: str,
    *,
    num_tokens: int | None = None,
    gathered_left: bool = False,
) -> Work:
    """Left (R, columns)ᵀ times right (R, inner) for each expert, written for all of them.

    num_tokens: the tokens that one side is gathered from, the right one unless gathered_left.
    """
    tile = outer_tile(columns, inner)
    total = sum(expert_rows)
    own, other = (columns, inner) if gathered_left else (inner, columns)  # own: the side that may be gathered
    sources = min(total, total if num_tokens is None else num_tokens) * own + total * other
    per_expert = -(-columns // tile.rows) * -(-inner // tile.columns)
    grid = tuple(Run(per_expert, -(-rows // tile.inner)) for rows in expert_rows)
    moved = len(expert_rows) * columns * inner * ELEMENT_BYTES + (0 if num_tokens is None else total * INDEX_BYTES)
    steps = sum(run.tiles * run.steps for run in grid)
    return Work(
        op=op,
        name=name,
        launches=1,
        compulsory_bytes=sources * ELEMENT_BYTES + moved,
        fixed_bytes=moved,
        flops=2 * total * columns * inner,
        executed_flops=2 * steps * tile.rows * tile.columns * tile.inner,
        kernel="outer_kernel",
        compiled_op=op,
        configuration=configuration,
        tile=tile,
        walk=outer_walk(expert_rows, tile, columns, inner, num_tokens, gathered_left),
        grids=(grid,),
    )
