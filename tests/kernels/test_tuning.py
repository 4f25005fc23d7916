"""Tiles are the table's until `tune` measured others, and candidates keep the order of the sums."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moe.kernels import tuning
from moe.kernels.launch import recording
from moe.kernels.tiles import DOUBLE_TILES, HALF_TILES, SINGLE_TILES, Tile
from moe.kernels.tuning import CANDIDATES, Problem

CPU, META = torch.device("cpu"), torch.device("meta")
PROBLEM = Problem("product", torch.bfloat16, rows=65536, groups=8, columns=4096, inner=1024)
SHARED_BYTES = 227 * 1024  # that one program may have from sm_90 on


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    tuning.forget()
    yield
    tuning.forget()


def speeds(**milliseconds: float) -> dict[Tile, float]:
    """Times of the half tiles by their height: r16=..., r32=..."""
    return {tile: milliseconds.get(f"r{tile.rows}", 9.0) for tile in HALF_TILES}


def test_candidates_begin_with_the_table_and_reduce_in_its_blocks() -> None:
    for kernel in CANDIDATES:
        for default in HALF_TILES:
            found = tuning.candidates(PROBLEM._replace(kernel=kernel), default, 90)
            assert found[0] == default
            assert found[1] == default._replace(descriptors=False)
            assert len(found) > len(set(found[:2]))
            assert len(set(found)) == len(found)
            assert {tile.inner for tile in found} == {default.inner}
            assert set(found[2:]) <= set(CANDIDATES[kernel])


def test_candidates_fit_a_processor() -> None:
    for tile in (*HALF_TILES, *(tile for tiles in CANDIDATES.values() for tile in tiles)):
        shared = tile.num_stages * (tile.rows + tile.columns) * tile.inner * 2 + 1024
        assert shared * tile.per_processor <= SHARED_BYTES, tile
        assert tile.rows * tile.columns <= 128 * 32 * tile.num_warps, tile  # at most 128 registers for the sums


def test_candidates_are_no_larger_than_the_problem() -> None:
    def sizes(**changes: object) -> set[tuple[int, int]]:
        found = tuning.candidates(PROBLEM._replace(**changes), HALF_TILES[2], 100)
        return {(tile.rows, tile.columns) for tile in found[2:]}

    assert sizes() == {(64, 128), (64, 256), (128, 128), (128, 256)}
    assert sizes(columns=128) == {(64, 128), (128, 128)}
    assert sizes(rows=8 * 32) == {(64, 128), (64, 256)}  # such tiles are filled half
    assert sizes(rows=8) == set()
    assert sizes(kernel="outer", columns=64) == set()
    assert sizes(kernel="outer", inner=128) == {(128, 128)}


@pytest.mark.parametrize(
    ("problem", "table", "capability"),
    [
        (PROBLEM, HALF_TILES[3], 0),
        (PROBLEM, HALF_TILES[3], 80),
        (PROBLEM._replace(dtype=torch.float32), SINGLE_TILES[2], 90),
        (PROBLEM._replace(dtype=torch.float64), DOUBLE_TILES[0], 90),
        (PROBLEM._replace(columns=1000), SINGLE_TILES[1], 90),
    ],
)
def test_elsewhere_the_table_is_all_there_is(problem: Problem, table: Tile, capability: int) -> None:
    assert tuning.candidates(problem, table, capability) == (table,)


def test_the_fastest_is_kept_and_measured_once() -> None:
    measured = []

    def measure(tile: Tile) -> float:
        measured.append(tile)
        return speeds(r32=1.0, r64=2.0)[tile]

    assert tuning.winner(PROBLEM, CPU) is None
    found = tuning.keep_fastest(PROBLEM, CPU, HALF_TILES, measure)
    assert [result.tile.rows for result in found[:2]] == [32, 64]
    assert measured == list(HALF_TILES)
    assert tuning.winner(PROBLEM, CPU) == HALF_TILES[1]
    assert tuning.keep_fastest(PROBLEM, CPU, HALF_TILES, measure) == found
    assert len(measured) == len(HALF_TILES)
    tuning.forget()
    assert tuning.winner(PROBLEM, CPU) is None


def test_of_equal_ones_the_table_stays() -> None:
    assert tuning.keep_fastest(PROBLEM, CPU, HALF_TILES[::-1], lambda tile: 1.0)[0].tile == HALF_TILES[-1]


def test_a_winner_is_for_its_bucket() -> None:
    tuning.keep_fastest(PROBLEM, CPU, HALF_TILES, speeds(r16=1.0).__getitem__)
    assert tuning.winner(PROBLEM._replace(rows=65536 + 8), CPU) == HALF_TILES[0]  # mean loads 8192 and 8193
    others = {"rows": 65535, "groups": 4, "columns": 2048, "inner": 2048, "kernel": "outer", "dtype": torch.float16}
    for field, value in others.items():
        assert tuning.winner(PROBLEM._replace(**{field: value}), CPU) is None, field
    assert tuning.winner(PROBLEM, META) is None
    assert tuning.winner(PROBLEM._replace(rows=0), CPU) is None


def test_launchers_start_the_winner_and_else_the_table() -> None:
    pytest.importorskip("triton", reason="Triton has packages for Linux only")
    from moe.kernels.grouped_gemm import triton_impl

    def started() -> list[tuple[int, int, int]]:
        rows = torch.empty(65536, 1024, dtype=torch.bfloat16, device=META)
        weight = torch.empty(8, 4096, 1024, dtype=torch.bfloat16, device=META)
        offsets = torch.empty(9, dtype=torch.int64, device=META)
        with recording(90) as launches:
            triton_impl.outer(triton_impl.product(rows, weight, offsets), rows, offsets)
        blocks = [(entry.arguments.get("BLOCK_M"), entry.arguments.get("BLOCK_N")) for entry in launches[1:]]
        return [(m, n, entry.num_stages) for (m, n), entry in zip(blocks, launches[1:], strict=True)]

    table = started()
    assert table == [(128, 128, 3), (None, 128, 3)]
    for kernel, tiles in CANDIDATES.items():
        problem = PROBLEM._replace(kernel=kernel)
        tuning.keep_fastest(problem, META, tiles, lambda tile: -tile.columns * tile.num_stages)
    assert started() == [(128, 256, 4), (None, 128, 4)]
    tuning.forget()
    assert started() == table


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device \(cpu\) must be a GPU of this machine"):
        tuning.tune(PROBLEM, "cpu")
    with pytest.raises(ValueError, match=r"kernel \('sort'\) must be one of: product, outer"):
        tuning.candidates(PROBLEM._replace(kernel="sort"), HALF_TILES[0], 90)


@pytest.mark.parametrize("problem", tuning.problems(), ids=str)
def test_what_is_measured_is_the_problem(problem: Problem) -> None:
    """The operands of a trial, without data: their sizes, and that each candidate starts."""
    pytest.importorskip("triton", reason="Triton has packages for Linux only")
    from moe.kernels.grouped_gemm import triton_impl

    choices = tuning.candidates(problem, triton_impl.table_tile(problem), 90)
    assert len(choices) > 2
    with recording(90) as launches:
        start = triton_impl.trial_of(problem, META)
        for tile in choices:
            start(tile)
    products = [entry for entry in launches if "out" in entry.arguments]  # beside them, a schedule for each height
    assert len(products) == len(choices)
    for entry in products:
        sizes = ("num_rows", "num_experts", "N", "K")
        assert [entry.arguments[name] for name in sizes] == [*problem[2:]]
        assert entry.arguments["out"].dtype == problem.dtype
