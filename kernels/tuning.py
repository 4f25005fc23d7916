"""Tile sizes of the grouped products: a fixed table, candidates beside it, and the fastest of them by measurement.

The table decides unless `tune` was called: it depends only on shapes and the kind of GPU, so two runs start the same
programs and give the same bits. `tune` measures on the GPU at hand, once per kernel, dtype, shape bucket and device,
and keeps the winner for this process; `forget` goes back to the table. Nothing is written to disk. Products inside the
fused expert networks use the winner too, except the first and the one with the activation's gradient: their epilogues
need their own tiles, and the column tiles of the latter determine the order of a sum.

All candidates of a kernel and dtype share `inner`, the block of the reduction, and each program reduces all of it from
front to back: whichever wins, a result is the same sum, block by block in the same order. What an instruction does
inside a block is up to the hardware: below 64 rows a tile uses other tensor-core instructions (mma.sync instead of
wgmma), whose rounding NVIDIA does not document as equal. So a winner of another height may differ in the last bit, and
a run that must repeat bit for bit should keep to the table, or to one `tune` whose winners it states.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .launch import capability_of
from .tiles import Tile

# What `tune` measures besides the table's tile on sm_90 and later, by kernel, for 16-bit dtypes. Larger blocks and more
# stages need the registers and shared memory there; elsewhere, and for wider dtypes, there is only the table.
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "product": (
        Tile(64, 128, 64, 4, 4, 2),
        Tile(64, 256, 64, 8, 3, 1),
        Tile(128, 128, 64, 8, 4, 1),
        Tile(128, 256, 64, 8, 3, 1),
        Tile(128, 256, 64, 8, 4, 1),
    ),
    "outer": (
        Tile(128, 128, 64, 8, 4, 1),
        Tile(128, 256, 64, 8, 3, 1),
        Tile(128, 256, 64, 8, 4, 1),
    ),
}


class Problem(NamedTuple):
    """The product that a tile is chosen for: `groups` matrices of (columns, inner), and `rows` rows in total."""

    kernel: str  # a key of CANDIDATES
    dtype: torch.dtype
    rows: int
    groups: int
    columns: int
    inner: int


class Measurement(NamedTuple):
    """How long one launch with a tile took."""

    tile: Tile
    milliseconds: float


# (rows, experts, d_ff, d_model) that `moe kernels --tune` measures, into and out of the experts, with gradients:
# 16 thousand tokens in the shapes of OLMoE 1B-7B, Mixtral 8x7B and the paper's 125M model with 512 experts
SHAPES = ((8 * 16384, 64, 1024, 2048), (2 * 16384, 8, 14336, 4096), (2 * 16384, 512, 3072, 768))

_measured: dict[tuple[object, ...], list[Measurement]] = {}  # filled only by `tune`, emptied by `forget`


def problems(dtype: torch.dtype = torch.bfloat16) -> list[Problem]:
    """Both kernels in both directions at SHAPES."""
    return [
        Problem(kernel, dtype, rows, groups, columns, inner)
        for rows, groups, d_ff, d_model in SHAPES
        for kernel in CANDIDATES
        for columns, inner in ((d_ff, d_model), (d_model, d_ff))
    ]


def candidates(problem: Problem, default: Tile, capability: int) -> tuple[Tile, ...]:
    """The table's tile first, then the same with the other way of loading, then CANDIDATES no larger than needed.

    capability: 90 for sm_90, 0 without an NVIDIA GPU. Raises ValueError for a kernel without candidates.
    """
    if problem.kernel not in CANDIDATES:
        raise ValueError(f"kernel ({problem.kernel!r}) must be one of: {', '.join(CANDIDATES)}")
    if capability < 90 or problem.dtype.itemsize != 2 or problem.columns % 16 or problem.inner % 16:
        return (default,)
    width = problem.inner if problem.kernel == "outer" else problem.columns
    fitting = [tile for tile in CANDIDATES[problem.kernel] if tile.columns <= max(width, 128)]
    height = problem.columns if problem.kernel == "outer" else 2 * (problem.rows // max(1, problem.groups))
    fitting = [tile for tile in fitting if tile.rows <= height and tile.inner == default.inner]
    return tuple(dict.fromkeys((default, default._replace(descriptors=not default.descriptors), *fitting)))


def winner(problem: Problem, device: torch.device) -> Tile | None:
    """What `tune` found for problems of this bucket on this device; None if it was not called."""
    return _measured[key][0].tile if _measured and (key := _bucket(problem, device)) in _measured else None


def tune(problem: Problem, device: torch.device | str = "cuda") -> list[Measurement]:
    """Measure the candidates on a GPU, keep the fastest for this process, and return all, fastest first.

    A bucket is measured only once. Operands are random, rows are spread evenly over the experts, and weights are laid
    out as stored. Raises ValueError if the device is not a GPU: the table needs no tuning.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            f"device ({device}) must be a GPU of this machine, because tuning measures on it; without one, use the "
            "table"
        )
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    launchers = importlib.import_module(".grouped_gemm.triton_impl", __package__)  # loads Triton
    choices = candidates(problem, launchers.table_tile(problem), capability_of(device))
    with torch.cuda.device(device):
        start = launchers.trial_of(problem, device)
        return keep_fastest(problem, device, choices, lambda tile: _milliseconds(lambda: start(tile)))


def keep_fastest(
    problem: Problem, device: torch.device, choices: Sequence[Tile], measure: Callable[[Tile], float]
) -> list[Measurement]:
    """Measure each choice unless done before, and remember. The first of equals wins, so the table's tile stands."""
    key = _bucket(problem, device)
    if key not in _measured:
        found = [Measurement(tile, measure(tile)) for tile in choices]
        _measured[key] = sorted(found, key=lambda measurement: measurement.milliseconds)
    return list(_measured[key])


def forget() -> None:
    """Go back to the table."""
    _measured.clear()


def _milliseconds(start: Callable[[], None], warm_up: int = 5, calls: int = 30) -> float:
    """The median of `calls`, by CUDA events. The first calls compile."""
    for _ in range(warm_up):
        start()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for before, after in events:
        before.record()
        start()
        after.record()
    torch.cuda.synchronize()
    return float(sorted(before.elapsed_time(after) for before, after in events)[calls // 2])


def _bucket(problem: Problem, device: torch.device) -> tuple[object, ...]:
    """Mean loads up to the same power of two share a winner, all else being equal: drops change them at each step."""
    load = problem.rows // max(1, min(problem.groups, problem.rows))
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return problem._replace(rows=load.bit_length()), device.type, index
