"""The roofline's devices, steps, loads and bounds: by hand, by brute force, and ordered as bounds must be."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.kernels.roofline import DEVICES, LOADS, SHAPES, Shape, Work, bound_of, expert_rows, works
from moe.kernels.roofline.bounds import busiest_steps
from moe.kernels.roofline.products import Run
from moe.kernels.roofline.tiles import TILES, Compiled, Tile, compiled, step_of
from moe.kernels.roofline.works import ACTIVATIONS

ROOT = Path(__file__).parents[2]
H100, A100, MI300X = (DEVICES[target] for target in ("sm_90", "sm_80", "gfx942"))


def layer(num_tokens: int = 8192, d_model: int = 2048, d_ff: int = 1024, **changes: int) -> Shape:
    sizes = {"num_experts": 8, "top_k": 2, "vocab_size": 1024} | changes
    return Shape("test", num_tokens, d_model, d_ff, **sizes)


def find(shape: Shape, op: str, name: str) -> Work:
    (work,) = [work for work in works(shape) if (work.op, work.name) == (op, name)]
    return work


# ---- devices, steps, waves


def test_devices_agree_with_themselves() -> None:
    """Peak = processors x multiply-adds a cycle x clock x 2, to the digits of the data sheet."""
    for device, products in ((H100, 2048), (A100, 1024), (MI300X, 1024)):
        assert device.products_per_cycle == products
        peak = 2 * products * device.processors * device.clock_hz
        assert abs(peak / device.flops_per_second - 1) < 1e-3
        assert device.cache_bytes >= device.l2_bytes
    assert [round(device.ridge) for device in (H100, A100, MI300X)] == [295, 153, 247]


def test_steps_by_hand() -> None:
    """128 columns by wgmma: 64 cycles for 16 deep, 2 KiB of rows and 4 KiB of columns, 48 cycles of reading."""
    one_group = Tile(64, 128, 16, 4, 3, 2)
    assert step_of(one_group, 1, "wgmma", H100) == (64, 48, 48)
    assert step_of(one_group._replace(rows=128, num_warps=8), 1, "wgmma", H100) == (128, 96, 64)
    # 64 rows and two groups: they share the rows, and both read them
    assert step_of(Tile(64, 64, 16, 8, 3, 2), 1, "wgmma", H100) == (32, 48, 32)
    # two matrices: rows are read for each, and filled once
    assert step_of(Tile(64, 64, 16, 4, 3, 2), 2, "wgmma", H100) == (64, 64, 48)
    # mma.sync, warps 4 x 2: rows are read twice and columns four times
    assert step_of(Tile(128, 128, 16, 8, 3, 2), 1, "mma.sync", A100) == (256, 192, 64)
    assert step_of(Tile(16, 128, 16, 4, 3, 3), 1, "mma.sync", A100) == (32, 48, 36)  # warps side by side
    assert step_of(one_group, 1, "mma.sync", H100).issue == pytest.approx(64 / 0.63)
    slow = step_of(Tile(64, 64, 16, 8, 3, 2), 1, "wgmma", H100)
    assert (slow.cycles, slow.one_path_cycles) == (48, 80)


@given(grid=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=6), processors=st.integers(1, 11))
def test_the_busiest_processor_is_that_of_dealing_tiles_out(grid: list[tuple[int, int]], processors: int) -> None:
    steps = [steps for tiles, steps in grid for _ in range(tiles)]
    dealt = [sum(steps[p::processors]) for p in range(processors)]
    assert busiest_steps(tuple(Run(*run) for run in grid), processors) == max(dealt)


def test_waves_count_what_is_started_and_fits() -> None:
    work = find(SHAPES[1], "grouped_gemm", "forward")
    assert work.num_tiles == 16384 // 128 * (14336 // 128)
    alone = bound_of(work, H100, resources=Compiled(1, "wgmma"))
    many = bound_of(work, H100, resources=Compiled(9, "wgmma"))
    assert (alone.resident, many.resident) == (1, 2)
    assert alone.waves == work.num_tiles / 132 and many.waves == work.num_tiles / 264
    assert many.busy_share == pytest.approx(work.num_tiles / (132 * 109))  # of 108.6 tiles, the busiest has 109
    assert many.tile_seconds == pytest.approx(109 * (4096 // 64) * 512 / 1.83e9)


def test_time_is_of_bytes_as_tiled_and_of_the_longer_part_of_a_step() -> None:
    """Mixtral: the right side of w_out's gradient is read again for each row of tiles, and 64x64 tiles wait to read."""
    of_out = bound_of(find(SHAPES[1], "expert_ffn", "gradient of w_out"), A100, resources=Compiled(1, "mma.sync"))
    assert of_out.tiled_bytes > 2 * of_out.work.compulsory_bytes
    assert of_out.memory_seconds == of_out.tiled_bytes / A100.bytes_per_second
    assert of_out.bound == "memory"
    waiting = bound_of(
        find(SHAPES[1], "expert_ffn", "gradient of the activation"), H100, resources=Compiled(1, "wgmma")
    )
    assert waiting.step == (128, 192, 128)
    tiles = 435 * 132  # 16384/64 rows times 14336/64 columns, rounded up to whole processors
    assert tiles - 132 < waiting.work.num_tiles <= tiles
    assert waiting.tile_seconds == pytest.approx(435 * (4096 // 64) * 192 / 1.83e9)
    assert waiting.one_path_seconds == pytest.approx(435 * (4096 // 64) * 320 / 1.83e9)
    assert waiting.l2_seconds == pytest.approx(waiting.work.requested_bytes / (5120 * 1.83e9))


def test_resources_are_the_fewest_of_all_variants() -> None:
    found = compiled("grouped_gemm", "product_kernel", "bfloat16 128x128x64", TILES[3], "sm_80")
    assert found == (1, "mma.sync")
    assert compiled("grouped_gemm", "product_kernel", "bfloat16 16x128x64", TILES[0], "gfx942").instruction == "mfma"
    with pytest.raises(ValueError, match=r"has no grouped_gemm product_kernel for 'bfloat16 8x8x8', 4 warps"):
        compiled("grouped_gemm", "product_kernel", "bfloat16 8x8x8", TILES[0], "sm_90")


# ---- loads


@given(
    load=st.sampled_from(LOADS),
    num_tokens=st.integers(0, 500),
    num_experts=st.integers(1, 70),
    part=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_loads_are_possible(load: str, num_tokens: int, num_experts: int, part: float) -> None:
    top_k = 1 + round(part * (num_experts - 1))
    rows = expert_rows(load, num_tokens, num_experts, top_k)
    assert sum(rows) == num_tokens * top_k and len(rows) == num_experts
    assert max(rows) <= num_tokens and min(rows) >= 0
    assert rows == sorted(rows, reverse=True)
    if load == "uniform":
        assert rows[0] - rows[-1] <= 1


def test_loads_by_hand() -> None:
    assert expert_rows("one-hot", 10, 4, 2) == [10, 10, 0, 0]
    assert expert_rows("uniform", 10, 4, 1) == [3, 3, 2, 2]
    assert expert_rows("zipf", 110, 3, 1) == [60, 30, 20]
    assert expert_rows("zipf", 100, 4, 3) == [100, 92, 62, 46]  # the first would have 144
    with pytest.raises(ValueError, match=r"load \('even'\) must be one of: uniform, zipf, one-hot"):
        expert_rows("even", 10, 4, 1)
    with pytest.raises(ValueError, match=r"top_k \(5\) between 1 and num_experts \(4\)"):
        expert_rows("uniform", 10, 4, 5)


# ---- bounds


def test_the_bound_switches_where_it_must() -> None:
    """One product from compute to memory as its inner size falls below the ridge, and to launch with few tokens."""
    name = "grouped_gemm", "forward"

    def bound(**sizes: int) -> str:
        return bound_of(find(layer(**sizes), *name), H100, resources=Compiled(2, "wgmma")).bound

    assert bound() == "compute"
    assert bound(d_model=64) == "memory"  # 64 multiply-adds for each number that is written
    assert bound(num_experts=512) == "memory"  # 32 rows for each weight
    assert bound(num_tokens=8, d_model=64, d_ff=64) == "launch"
    balanced = [bound_of(find(layer(d_model=d), *name), H100, resources=Compiled(2, "wgmma")) for d in (64, 128, 4096)]
    assert [b.work.intensity > H100.ridge for b in balanced] == [False, False, True]
    assert [b.bound for b in balanced] == ["memory", "memory", "compute"]
    for b in balanced:
        assert b.seconds == max(b.compute_seconds, b.memory_seconds, b.launch_seconds) <= b.estimate_seconds
        assert b.ideal_seconds <= b.seconds and b.estimate_seconds <= b.cautious_seconds


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_bounds_are_ordered(shape: Shape, load: str) -> None:
    for work in works(shape, load):
        assert 0 <= work.useful_flops <= work.flops <= work.executed_flops
        for device in (H100, MI300X):
            b = bound_of(work, device)
            assert work.compulsory_bytes <= b.tiled_bytes * (1 + 1e-12) <= work.requested_bytes * (1 + 2e-12)
            assert b.ideal_seconds <= b.seconds * (1 + 1e-12)
            assert b.peak_share(b.estimate_seconds) <= 1
            if work.tile is not None:
                assert b.busy_share is not None and 0 < b.busy_share <= 1


@pytest.mark.parametrize("name", ["num_tokens", "d_model", "d_ff", "vocab_size"])
@pytest.mark.parametrize("load", LOADS)
def test_more_is_never_less(name: str, load: str) -> None:
    small = layer(num_tokens=1024, d_model=256, d_ff=256, num_experts=8)
    large = small._replace(**{name: 2 * getattr(small, name)})
    grew = 0
    for less, more in zip(works(small, load), works(large, load), strict=True):
        for field in ("flops", "executed_flops", "compulsory_bytes", "requested_bytes", "ops"):
            assert getattr(less, field) <= getattr(more, field), (less.op, less.name, field)
        grew += less.compulsory_bytes < more.compulsory_bytes
        if name != "num_tokens":  # with more tokens a taller tile may read less often
            tiled = [bound_of(work, H100, resources=Compiled(2, "wgmma")).tiled_bytes for work in (less, more)]
            assert tiled[0] <= tiled[1]
    assert grew >= 3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_has_its_resources(activation: str) -> None:
    """Of each height of tile, on each device, as the experts' rehearsals compile it."""
    for device, num_tokens in product((H100, A100, MI300X), (32, 128, 256, 8192)):
        shape = layer(num_tokens=num_tokens)._replace(activation=activation, gated=activation == "silu")
        for work in works(shape):
            assert bound_of(work, device).seconds > 0


def test_a_given_tile_takes_the_place_of_the_chosen_one() -> None:
    shape = SHAPES[0]
    chosen, given_tile = (
        [w for w in found if w.kernel == "product_kernel"] for found in (works(shape), works(shape, tile=TILES[1]))
    )
    assert {w.tile for w in chosen} == {TILES[2]} and {w.tile for w in given_tile} == {TILES[1]}
    assert all(
        2 * b.executed_flops == a.executed_flops for a, b in zip(chosen, given_tile, strict=True)
    )  # 32 rows each
    assert bound_of(given_tile[0], H100).compiled == (2, "mma.sync")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0, "top_k": 0}, r"d_model \(0\), top_k \(0\) of test must be at least 1"),
        ({"d_ff": 1000}, r"columns \(1000\) and inner \(2048\) must be multiples of 16: pad them"),
        ({"vocab_size": 50257, "d_model": 1040}, r"vocab_size \(50257\) must be a multiple of 16, or d_model \(1040\)"),
        ({"top_k": 9}, r"top_k \(9\) between 1 and num_experts \(8\)"),
        ({"activation": "tanh"}, r"activation \('tanh'\) of test must be one of: gelu, gelu_tanh, relu, silu"),
    ],
    ids=str,
)
def test_bad_shapes_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        works(layer()._replace(**changes))


def test_it_loads_no_torch() -> None:
    code = "import sys, moe.kernels.roofline as r; r.works(r.SHAPES[0]); print({'torch', 'triton'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
