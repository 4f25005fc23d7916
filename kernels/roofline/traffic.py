"""The order in which programs take tiles, and the memory traffic that it causes through a cache.

A strip is what a tile reads of one operand over its whole inner loop: its rows, or its columns of an expert's matrix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from .tiles import ELEMENT_BYTES, GROUP_ROWS, Tile


class Walk(NamedTuple):
    """The tiles of one kernel in the order in which programs take them."""

    tiles: Sequence[tuple[int, ...]]  # the strips of each tile
    sizes: list[int]  # bytes of each strip
    num_gathered: int = 0  # of the strips, the first ones: rows gathered from tokens, which experts share
    token_share: float = 1.0  # distinct bytes of the gathered strips over all of their bytes: T/R
    stay_bytes: int = 0  # the cache needed for tokens to stay until another expert reads them

    @property
    def requested_bytes(self) -> int:
        """What the tiles read one by one, from cache or memory."""
        sizes = self.sizes
        return sum(sizes[strip] for strips in self.tiles for strip in strips)

    def memory_bytes(self, in_flight: int, cache_bytes: int) -> float:
        """Bytes read from memory when `in_flight` tiles run together over a cache of `cache_bytes`.

        Tiles that run together share each strip: they go through it side by side. From one wave to the next the least
        recently used strips are evicted. Results bypass the cache. If the cache holds stay_bytes, tokens that several
        experts read come from memory once.
        """
        share = self.token_share if cache_bytes >= self.stay_bytes else 1.0
        kept: OrderedDict[int, int] = OrderedDict()
        used, seen, total = 0, set[int](), 0.0
        for first in range(0, len(self.tiles), in_flight):
            for strip in dict.fromkeys(chain.from_iterable(self.tiles[first : first + in_flight])):
                if strip in kept:
                    kept.move_to_end(strip)
                    continue
                size = self.sizes[strip]
                shared = strip < self.num_gathered and strip not in seen
                total += size * share if shared else size
                seen.add(strip)
                kept[strip] = size
                used += size
                while used > cache_bytes:
                    used -= kept.popitem(last=False)[1]
        return total


def row_tiles(expert_rows: list[int], height: int) -> list[tuple[int, int]]:
    """(expert, rows) of each row tile; an expert's last one may be shorter."""
    return [
        (expert, min(height, count - first))
        for expert, count in enumerate(expert_rows)
        for first in range(0, count, height)
    ]


def product_walk(
    expert_rows: list[int], tile: Tile, columns: int, inner: int, left: int, right: int, num_tokens: int | None
) -> Walk:
    """Rows (R, inner) times each expert's matrix (columns, inner), GROUP_ROWS row tiles through all columns together.

    left, right: how many matrices of rows and of weights a tile reads. num_tokens: the tokens rows are gathered from.
    """
    blocks = row_tiles(expert_rows, tile.rows)
    wide = -(-columns // tile.columns)
    sizes = [left * rows * inner * ELEMENT_BYTES for _, rows in blocks]
    busy = {expert: i for i, expert in enumerate(dict.fromkeys(expert for expert, _ in blocks))}
    widths = [min(tile.columns, columns - n * tile.columns) for n in range(wide)]
    for _ in busy:
        sizes += [right * width * inner * ELEMENT_BYTES for width in widths]
    tiles = []
    for group in range(0, len(blocks), GROUP_ROWS):
        together = range(group, min(group + GROUP_ROWS, len(blocks)))
        tiles += [(m, len(blocks) + busy[blocks[m][0]] * wide + n) for n in range(wide) for m in together]
    gathered = len(blocks) if num_tokens is not None else 0
    share, stay = _sharing(expert_rows, num_tokens, left * inner, right * columns * inner)
    return Walk(tiles, sizes, gathered, share, stay)


def outer_walk(
    expert_rows: list[int], tile: Tile, columns: int, inner: int, num_tokens: int | None, gathered_left: bool
) -> Walk:
    """Left (R, columns)ᵀ times right (R, inner) for each expert: all tiles of one expert, then the next expert's."""
    blocks = [(rows, n, k) for rows in expert_rows for n, k in [(-(-columns // tile.rows), -(-inner // tile.columns))]]
    left: list[int] = []
    right: list[int] = []
    starts = []
    for rows, n, k in blocks:
        starts.append((len(left), len(right)))
        left += [rows * min(tile.rows, columns - i * tile.rows) * ELEMENT_BYTES for i in range(n)]
        right += [rows * min(tile.columns, inner - i * tile.columns) * ELEMENT_BYTES for i in range(k)]
    # gathered strips come first
    sizes = left + right if gathered_left else right + left
    of_left, of_right = (0, len(left)) if gathered_left else (len(right), 0)
    tiles = [
        (of_left + starts[e][0] + i, of_right + starts[e][1] + j)
        for e, (_, n, k) in enumerate(blocks)
        for i in range(n)
        for j in range(k)
    ]
    gathered = 0 if num_tokens is None else len(left) if gathered_left else len(right)
    own, other = (columns, inner) if gathered_left else (inner, columns)
    mean = sum(expert_rows) // max(1, sum(rows > 0 for rows in expert_rows))
    share, stay = _sharing(expert_rows, num_tokens, own, mean * other)
    return Walk(tiles, sizes, gathered, share, stay)


def gather_walk(expert_rows: list[int], width: int, num_tokens: int, between: int) -> Walk:
    """Rows of `width` numbers gathered from tokens, expert by expert; `between`: other numbers read with each row."""
    strips = [rows * width * ELEMENT_BYTES for rows in expert_rows]
    mean = sum(expert_rows) // max(1, sum(rows > 0 for rows in expert_rows))
    share, stay = _sharing(expert_rows, num_tokens, width, mean * between)
    return Walk([(e,) for e in range(len(strips))], strips, len(strips), share, stay)


def _sharing(expert_rows: list[int], num_tokens: int | None, width: int, between: int) -> tuple[float, int]:
    """T/R, and the cache for all tokens and all else read between two reads of one token, on average by busy/K experts.

    width: numbers per token. between: other numbers that an expert reads.
    """
    rows, busy = sum(expert_rows), sum(count > 0 for count in expert_rows)
    if num_tokens is None or rows == 0:
        return 1.0, 0
    return num_tokens / rows, ELEMENT_BYTES * (num_tokens * width + busy * num_tokens * between // rows)
