"""The grouped products of the GPU path, in Triton's interpreter, against the reference. Started by test_triton.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe.kernels import launch
from moe.kernels.grouped_gemm import grouped_gemm, triton_impl, triton_tiles

Compare = Callable[[Tensor, Tensor], None]
LOADS = {
    "odd": [1, 37, 2, 18],
    "empty_first_middle_last": [0, 34, 0, 3, 0],
    "one_hot": [0, 0, 70, 0],
    "one_row": [0, 1],
    "one_expert": [33],
    "nothing": [0, 0],
}

SMALL_TILE = triton_tiles.Tile(rows=16, columns=16, inner=16, num_warps=1, num_stages=1, per_processor=1)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in each direction at sizes that an interpreter can afford."""
    monkeypatch.setattr(triton_impl, "choose_tile", lambda *_: SMALL_TILE)


def offsets_of(load: list[int]) -> Tensor:
    return torch.tensor([0, *load]).cumsum(0)


def problem(load: list[int], n: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(load) + n)
    shapes = ((sum(load), k), (len(load), n, k))
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def run(leaves: list[Tensor], load: list[int], backend: str) -> list[Tensor]:
    """Output and both gradients."""
    y = grouped_gemm(*leaves, offsets_of(load), backend=backend)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_output_and_both_gradients(
    load: list[int], dtype: torch.dtype, assert_equal_to_scale: Compare, poisoned_memory: None
) -> None:
    leaves = problem(load, 19, 21, dtype)
    expected = run([leaf.detach().double().requires_grad_() for leaf in leaves], load, "reference")
    for actual, reference in zip(run(leaves, load, "triton"), expected, strict=True):
        assert actual.dtype == dtype
        assert_equal_to_scale(actual, reference)


@pytest.mark.parametrize(("n", "k"), [(32, 32), (32, 7), (1, 16), (48, 1)])
def test_sizes_that_divide_evenly_and_not(n: int, k: int, assert_equal_to_scale: Compare) -> None:
    load = [17, 0, 4]
    leaves = problem(load, n, k, torch.float32)
    expected = run([leaf.detach().double().requires_grad_() for leaf in leaves], load, "reference")
    for actual, reference in zip(run(leaves, load, "triton"), expected, strict=True):
        assert_equal_to_scale(actual, reference)


def test_gradients_of_any_stride(assert_equal_to_scale: Compare) -> None:
    """Stride 0 from .sum(), and a transposed upstream gradient."""
    load = [5, 0, 14]
    leaves = problem(load, 18, 20, torch.float32)
    for upstream in (torch.ones(()).expand(19, 18), torch.randn(18, 19).T):
        results = []
        for backend in ("triton", "reference"):
            y = grouped_gemm(*leaves, offsets_of(load), backend=backend)
            results.append(torch.autograd.grad(y, leaves, upstream))
        for actual, reference in zip(*results, strict=True):
            assert_equal_to_scale(actual, reference)


def test_rows_and_weights_of_any_stride() -> None:
    load = [5, 0, 14]
    rows, weight = (leaf.detach() for leaf in problem(load, 18, 20, torch.float32))
    expected = grouped_gemm(rows, weight, offsets_of(load), backend="triton")
    wide = torch.zeros(19, 40)
    wide[:, ::2] = rows
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(grouped_gemm(wide[:, ::2], transposed, offsets_of(load), backend="triton"), expected)


def test_a_second_product_and_a_bias_are_added(assert_equal_to_scale: Compare) -> None:
    load = [3, 0, 20]
    rows, weight = (leaf.detach() for leaf in problem(load, 18, 20, torch.float32))
    bias = torch.randn(3, 18)
    y = triton_impl.product(rows, weight, offsets_of(load), second=(2 * rows, weight.flip(0)), bias=bias)
    experts = torch.repeat_interleave(torch.arange(3), torch.tensor(load))
    exact = torch.einsum("rk,rnk->rn", rows.double(), (weight + 2 * weight.flip(0))[experts].double())
    assert_equal_to_scale(y, exact + bias[experts])


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("block_rows", [16, 32])
def test_the_schedule_covers_each_row_once(load: list[int], block_rows: int, poisoned_memory: None) -> None:
    offsets = offsets_of(load)
    schedule = triton_tiles.make_schedule(offsets, sum(load), block_rows)
    count = int(schedule.num_tiles)
    covered = []
    for expert, first in zip(schedule.tile_experts[:count].tolist(), schedule.tile_rows[:count].tolist(), strict=True):
        end = min(first + block_rows, int(offsets[expert + 1]))
        covered += [(row, expert) for row in range(first, end)]
    experts = torch.repeat_interleave(torch.arange(len(load)), torch.tensor(load)).tolist()
    assert covered == list(enumerate(experts))
    assert count == sum(-(-rows // block_rows) for rows in load)  # no tile for an expert without rows


def test_a_thousand_experts(assert_equal_to_scale: Compare) -> None:
    load = [0] * 1000
    load[3], load[998] = 2, 5
    schedule = triton_tiles.make_schedule(offsets_of(load), 7, 16)
    assert schedule.tile_experts[: int(schedule.num_tiles)].tolist() == [3, 998]
    assert schedule.tile_rows[: int(schedule.num_tiles)].tolist() == [0, 2]


@pytest.mark.parametrize("num_m", [1, 8, 11])
def test_places_are_all_blocks_once(num_m: int) -> None:
    """The order of the blocks, computed as the kernel computes it, is a permutation."""
    places = {_place(tile, num_m, 3) for tile in range(num_m * 3)}
    assert places == {(m, n) for m in range(num_m) for n in range(3)}


def _place(tile: int, num_m: int, num_n: int) -> tuple[int, int]:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(out, tile, num_m, num_n, GROUP_M: tl.constexpr):
        m, n = triton_tiles.place_of(tile, num_m, num_n, GROUP_M)
        tl.store(out, m)
        tl.store(out + 1, n)

    out = torch.zeros(2, dtype=torch.int32)
    kernel[(1,)](out, tile, num_m, num_n, triton_tiles.GROUP_M)
    return int(out[0]), int(out[1])


def both_ways(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Tensor]) -> tuple[Tensor, Tensor, list[object]]:
    """The result by pointers, the result as on an H100, and how the launches of the latter loaded."""
    monkeypatch.setattr(triton_impl, "capability_of", lambda device: 80)
    by_pointer = function()
    loads: list[object] = []

    def noted(kernel: object, grid: tuple[int, ...], **arguments: object) -> None:
        loads.append(arguments.get("LOADS", arguments.get("DESCRIBED")))
        launch.launch(kernel, grid, **arguments)

    monkeypatch.setattr(triton_impl, "capability_of", lambda device: 90)
    monkeypatch.setattr(triton_impl, "launch", noted)
    by_descriptor = function()
    monkeypatch.setattr(triton_impl, "launch", launch.launch)
    return by_pointer, by_descriptor, loads


@pytest.mark.parametrize(
    ("load", "dtype", "n", "k"),
    [
        *((load, torch.float16, 24, 40) for load in LOADS.values() if sum(load)),
        (LOADS["odd"], torch.float32, 20, 36),
        (LOADS["odd"], torch.bfloat16, 24, 40),
        (LOADS["empty_first_middle_last"], torch.float32, 32, 16),
    ],
    ids=str,
)
def test_descriptors_give_the_bits_of_pointers(
    load: list[int], dtype: torch.dtype, n: int, k: int, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """Forward, the gradient of rows (one product and a sum of two), and the gradient of weights."""
    rows, weight = (leaf.detach() for leaf in problem(load, n, k, dtype))
    grad = torch.linspace(-1, 2, len(rows) * n).view(-1, n).to(dtype)
    transposed, offsets = weight.transpose(1, 2), offsets_of(load)
    second = (2 * grad, weight.flip(0).transpose(1, 2))
    for expected, function in (
        ("nk", lambda: triton_impl.product(rows, weight, offsets)),
        ("nk", lambda: triton_impl.product(rows, weight, offsets, bias=weight[:, :, 0])),
        ("kn", lambda: triton_impl.product(grad, transposed, offsets)),
        ("kn", lambda: triton_impl.product(grad, transposed, offsets, second=second)),
        (True, lambda: triton_impl.outer(grad, rows, offsets)),
    ):
        by_pointer, by_descriptor, loads = both_ways(monkeypatch, function)
        assert loads == [expected]
        assert torch.equal(by_pointer, by_descriptor)


@pytest.mark.parametrize("gathered", ["left_tokens", "right_tokens"])
def test_a_gathered_side_goes_by_pointer_beside_a_described_one(
    gathered: str, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    load = [1, 37, 0, 18]
    rows, _ = (leaf.detach() for leaf in problem(load, 24, 40, torch.float32))
    grad = torch.linspace(-1, 2, 56 * 24).view(56, 24)
    tokens = torch.arange(56).flip(0)
    by_pointer, by_descriptor, loads = both_ways(
        monkeypatch, lambda: triton_impl.outer(grad, rows, offsets_of(load), **{gathered: tokens})
    )
    assert loads == [True]
    assert torch.equal(by_pointer, by_descriptor)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the second expert
def test_what_the_next_expert_holds_is_no_concern(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block by descriptor may reach into the rows or, with an uneven width, the matrix of the next expert."""
    load, infinite = [20, 16], torch.inf
    rows, weight = (leaf.detach() for leaf in problem(load, 24, 40, torch.float32))
    grad = torch.ones(36, 24)
    for tensor, first in ((rows, 20), (grad, 20), (weight, 1)):
        tensor[first:] = infinite
    offsets = offsets_of(load)
    for function, of_first_expert in (
        (lambda: triton_impl.product(rows, weight, offsets), slice(20)),
        (lambda: triton_impl.product(grad, weight.transpose(1, 2), offsets), slice(20)),
        (lambda: triton_impl.outer(grad, rows, offsets), slice(1)),
    ):
        by_pointer, by_descriptor, _ = both_ways(monkeypatch, function)
        assert by_pointer[of_first_expert].isfinite().all()
        assert torch.equal(by_pointer[of_first_expert], by_descriptor[of_first_expert])


def test_loads_are_chosen_by_hardware_and_layout() -> None:
    def loads(rows: Tensor, weight: Tensor, capability: int = 90, tile: triton_tiles.Tile = SMALL_TILE) -> str:
        return triton_tiles.choose_loads(capability, tile, [rows], [weight])

    for device in ("cpu", "meta"):
        rows, weight = torch.zeros(6, 24, device=device), torch.zeros(3, 16, 24, device=device)
        assert loads(rows, weight) == loads(rows, weight, 100) == "nk"
        assert loads(rows, torch.zeros(3, 24, 16, device=device).transpose(1, 2)) == "kn"
        assert {loads(rows, weight, capability) for capability in (0, 80, 89)} == {"pointers"}
        assert loads(rows, weight, tile=SMALL_TILE._replace(descriptors=False)) == "pointers"
        unlike = {
            "rows of 100 bytes": (torch.zeros(6, 25, device=device)[:, :24], weight),
            "rows from the 4th byte on": (torch.zeros(6 * 24 + 1, device=device)[1:].view(6, 24), weight),
            "rows on top of each other": (torch.zeros(1, 24, device=device).expand(6, 24), weight),
            "no rows": (rows[:0], weight),
            "numbers apart": (rows, torch.zeros(3, 16, 48, device=device)[:, :, ::2]),
            "matrices of 1540 bytes": (rows, torch.zeros(3, 385, device=device)[:, :384].view(3, 16, 24)),
            "one matrix for all": (rows, weight[:1].expand(3, 16, 24)),
        }
        assert {name: loads(*operands) for name, operands in unlike.items()} == dict.fromkeys(unlike, "pointers")
        both = [weight, torch.zeros(3, 24, 16, device=device).transpose(1, 2)]
        assert triton_tiles.choose_loads(90, SMALL_TILE, [rows], both) == "pointers"
        assert triton_tiles.choose_loads(90, SMALL_TILE, [rows, rows], [weight, weight]) == "nk"


def test_scratch_for_descriptors_is_allocated_in_the_launch_alone() -> None:
    """Triton's allocator is a setting of a context: ours must be there in any thread, and a program's own must stay."""
    allocation = pytest.importorskip("triton.runtime._allocation", reason="Triton keeps its allocator elsewhere")
    before, seen = allocation._allocator.get(), []

    def kernel(x: Tensor) -> None:
        seen.append(allocation._allocator.get()(384, 128, None))

    launch.copy_context().run(
        launch.start_with_scratch, {(2,): kernel}, (2,), torch.device("cpu"), {"x": torch.ones(1)}
    )
    assert [(buffer.numel() * buffer.element_size(), buffer.device.type) for buffer in seen] == [(384, "cpu")]
    assert allocation._allocator.get() is before


def test_tiles_fit_the_load() -> None:
    def tile(rows: int, experts: int, dtype: torch.dtype = torch.bfloat16) -> triton_tiles.Tile:
        return CHOOSE_TILE(rows, experts, 4096, 1024, dtype)

    assert tile(65536, 8).rows == 128
    assert tile(64 * 64, 64).rows == 128  # filled half
    assert tile(8 * 512, 512).rows == 16
    assert tile(3, 512).rows == 16
    assert tile(65536, 8, torch.float32) == triton_tiles.SINGLE_TILES[-1]
    assert CHOOSE_TILE(65536, 8, 40, 1024, torch.bfloat16).columns == 64
    assert CHOOSE_TILE(65536, 8, 4096, 1000, torch.bfloat16) == triton_tiles.SINGLE_TILES[1]._replace(descriptors=True)


CHOOSE_TILE = triton_tiles.choose_tile


MUTATIONS = {
    "zeros": lambda y, load: torch.zeros_like(y),
    "swapped_experts": lambda y, load: torch.cat([y[load[0] :], y[: load[0]]]),
    "last_row_missing": lambda y, load: torch.cat([y[:-1], torch.zeros_like(y[-1:])]),
    "off_by_one": lambda y, load: y.roll(1, dims=0),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_notices(mutation: str, assert_equal_to_scale: Compare) -> None:
    load = [3, 4]
    y = run(problem(load, 5, 6, torch.float32), load, "reference")[0]
    with pytest.raises(AssertionError, match="error"):
        assert_equal_to_scale(MUTATIONS[mutation](y, load), y)
