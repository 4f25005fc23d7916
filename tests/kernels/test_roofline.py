"""The roofline's counts against loops over tiles and elements, torch's FLOP counter and the kernels' own launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe.kernels import permute
from moe.kernels.expert_ffn import reference as expert_ffn
from moe.kernels.grouped_gemm import reference as grouped_gemm
from moe.kernels.linear_cross_entropy import reference as linear_cross_entropy
from moe.kernels.permute import RowOrder
from moe.kernels.roofline import DEVICES, SHAPES, Shape, Work, expert_rows, works
from moe.kernels.roofline.products import outer_work, product_work
from moe.kernels.roofline.tiles import GROUP_ROWS, Tile, choose_tile, outer_tile
from moe.kernels.roofline.traffic import Walk, gather_walk, outer_walk, product_walk
from moe.kernels.roofline.works import ACTIVATIONS
from moe.kernels.topk_routing import top_k_routing

ROOT = Path(__file__).parents[2]
H100, A100, MI300X = (DEVICES[target] for target in ("sm_90", "sm_80", "gfx942"))
SMALL = Tile(4, 8, 4, 4, 3, 2)
ENDLESS = 1 << 60
Element = tuple[str, int, int, int]  # operand, expert or 0, row, column


def layer(num_tokens: int = 8192, d_model: int = 2048, d_ff: int = 1024, **changes: int) -> Shape:
    sizes = {"num_experts": 8, "top_k": 2, "vocab_size": 1024} | changes
    return Shape("test", num_tokens, d_model, d_ff, **sizes)


def find(shape: Shape, op: str, name: str, load: str = "uniform") -> Work:
    (work,) = [work for work in works(shape, load) if (work.op, work.name) == (op, name)]
    return work


# ---- bytes and FLOPs against a loop over tiles that touches every element


def tokens_of_rows(rows: list[int], num_tokens: int) -> list[int]:
    """A token for each row, expert by expert: every token appears, and no expert has one twice."""
    where = [t % num_tokens for t in range(sum(rows))]
    starts = [sum(rows[:e]) for e in range(len(rows))]
    assert all(len(set(where[s : s + n])) == n for s, n in zip(starts, rows, strict=True))
    return where


def product_tiles(
    rows: list[int], tile: Tile, columns: int, inner: int, tokens: list[int] | None, pairs: int = 1
) -> Iterator[tuple[set[Element], int, int]]:
    """Elements that each tile reads, its multiply-adds and those of them that count, in the kernels' order of tiles."""
    starts = [sum(rows[:e]) for e in range(len(rows))]
    blocks = [(e, first) for e in range(len(rows)) for first in range(0, rows[e], tile.rows)]
    wide = -(-columns // tile.columns)
    for number in range(len(blocks) * wide):  # place_of, as the kernel computes it
        group, within = divmod(number, GROUP_ROWS * wide)
        height = min(len(blocks) - group * GROUP_ROWS, GROUP_ROWS)
        e, first = blocks[group * GROUP_ROWS + within % height]
        n_tile = within // height
        read, executed, useful = set(), 0, 0
        for k in range(0, inner, tile.inner):
            executed += tile.rows * tile.columns * tile.inner * pairs
            inside = [r for r in range(first, first + tile.rows) if r < rows[e]]
            places = [i for i in range(k, k + tile.inner) if i < inner]
            across = [n for n in range(n_tile * tile.columns, (n_tile + 1) * tile.columns) if n < columns]
            useful += len(inside) * len(places) * len(across) * pairs
            for r, i in product(inside, places):
                row = starts[e] + r
                read.add(("rows", 0, row if tokens is None else tokens[row], i))
            read |= {(f"weight {p}", e, n, i) for p in range(pairs) for n, i in product(across, places)}
        yield read, executed, useful


def outer_tiles(rows: list[int], tile: Tile, columns: int, inner: int) -> Iterator[tuple[set[Element], int, int]]:
    starts = [sum(rows[:e]) for e in range(len(rows))]
    for e in range(len(rows)):
        for n, k in product(range(0, columns, tile.rows), range(0, inner, tile.columns)):
            read, executed, useful = set(), 0, 0
            down = [i for i in range(n, n + tile.rows) if i < columns]
            across = [i for i in range(k, k + tile.columns) if i < inner]
            for first in range(0, rows[e], tile.inner):
                executed += tile.rows * tile.columns * tile.inner
                for r in range(first, min(first + tile.inner, rows[e])):
                    useful += len(down) * len(across)
                    read |= {("left", 0, starts[e] + r, i) for i in down}
                    read |= {("right", 0, starts[e] + r, i) for i in across}
            yield read, executed, useful


RAGGED = [[5, 0, 13, 1], [9, 9, 9], [0, 0, 40], [70], [0, 0]]


@pytest.mark.parametrize("rows", RAGGED, ids=str)
@pytest.mark.parametrize("matrices", [1, 2])
def test_products_are_those_of_a_loop_over_tiles(rows: list[int], matrices: int) -> None:
    columns, inner = 20, 10  # neither is a multiple of its block
    work = product_work("op", "name", rows, SMALL, columns, inner, "", matrices=matrices)
    tiles = list(product_tiles(rows, SMALL, columns, inner, None, matrices))
    assert work.num_tiles == len(tiles)
    assert work.flops == 2 * sum(useful for _, _, useful in tiles)
    assert work.executed_flops == 2 * sum(executed for _, executed, _ in tiles)
    stored = 2 * sum(rows) * columns
    assert work.requested_bytes == stored + 2 * sum(len(read) for read, _, _ in tiles)
    assert work.compulsory_bytes == stored + 2 * len(set[Element]().union(*(read for read, _, _ in tiles)))
    check_waves(work, [read for read, _, _ in tiles])


@pytest.mark.parametrize("rows", RAGGED, ids=str)
def test_weight_gradients_are_those_of_a_loop_over_tiles(rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe.kernels.roofline.products.outer_tile", lambda *_: SMALL)
    columns, inner = 10, 20
    work = outer_work("op", "name", rows, columns, inner, "")
    tiles = list(outer_tiles(rows, SMALL, columns, inner))
    assert work.num_tiles == len(tiles)
    assert work.flops == 2 * sum(useful for _, _, useful in tiles)
    assert work.executed_flops == 2 * sum(executed for _, executed, _ in tiles)
    stored = 2 * len(rows) * columns * inner  # zeros too
    assert work.requested_bytes == stored + 2 * sum(len(read) for read, _, _ in tiles)
    assert work.compulsory_bytes == stored + 2 * len(set[Element]().union(*(read for read, _, _ in tiles)))
    check_waves(work, [read for read, _, _ in tiles])


def check_waves(work: Work, tiles: list[set[Element]]) -> None:
    """Without a cache a wave reads what its tiles read together; with an endless one nothing is read twice."""
    assert work.walk is not None
    for in_flight in (1, 3, 1000):
        waves = [tiles[i : i + in_flight] for i in range(0, len(tiles), in_flight)]
        together = sum(len(set[Element]().union(*wave)) for wave in waves)
        assert work.walk.memory_bytes(in_flight, 0) == 2 * together
        assert work.walk.memory_bytes(in_flight, ENDLESS) + work.fixed_bytes == work.compulsory_bytes


@pytest.mark.parametrize("rows", [[6, 6, 0, 6], [2, 10, 10, 2]], ids=str)
def test_gathered_tokens_are_those_of_a_loop_over_tiles(rows: list[int]) -> None:
    num_tokens, columns, inner = 12, 20, 10
    tokens = tokens_of_rows(rows, num_tokens)
    work = product_work("op", "name", rows, SMALL, columns, inner, "", num_tokens=num_tokens, written=0)
    tiles = [read for read, _, _ in product_tiles(rows, SMALL, columns, inner, tokens)]
    index = 8 * sum(rows)
    distinct = 2 * len(set[Element]().union(*tiles))
    assert work.compulsory_bytes == distinct + index
    assert work.walk is not None and work.walk.token_share == num_tokens / sum(rows)
    assert work.walk.memory_bytes(1, ENDLESS) == pytest.approx(distinct, rel=1e-12)
    # all tokens, and the matrices of the experts that pass between two readings of one
    busy = sum(r > 0 for r in rows)
    assert work.walk.stay_bytes == 2 * (num_tokens * inner + busy * columns * inner * num_tokens // sum(rows))
    together = [work.walk.memory_bytes(1000, work.walk.stay_bytes - less) for less in (1, 0)]
    assert together[0] - together[1] == pytest.approx(2 * (sum(rows) - num_tokens) * inner, rel=1e-12)


def test_a_cache_that_holds_one_group_reads_the_weights_once_for_each() -> None:
    """16 row tiles of one expert are two groups: the weights stay between them or they do not."""
    rows, columns, inner = [16 * SMALL.rows], 3 * SMALL.columns, 8
    walk = product_walk(rows, SMALL, columns, inner, 1, 1, None)
    of_rows, weights = 2 * rows[0] * inner, 2 * columns * inner
    group, strip = of_rows // 2, 2 * SMALL.columns * inner
    assert walk.memory_bytes(1, group + 2 * strip) == of_rows + 2 * weights
    assert walk.memory_bytes(1, of_rows + weights) == of_rows + weights
    # a cache smaller than a group: its rows are read again for every column
    assert walk.memory_bytes(1, strip + 2 * SMALL.rows * inner) == 3 * of_rows + 2 * weights


def test_a_token_that_the_cache_lost_is_read_whole() -> None:
    """The first reading of a strip of tokens costs what no other expert has read; each later one all of it."""
    walk = Walk([(0,), (1,), (0,)], [10, 10], num_gathered=1, token_share=0.5)
    assert walk.memory_bytes(1, 20) == 5 + 10
    assert walk.memory_bytes(1, 15) == 5 + 10 + 10


@given(
    rows=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    in_flight=st.integers(1, 9),
    caches=st.lists(st.integers(0, 4000), min_size=2, max_size=6),
    num_tokens=st.sampled_from([None, 30]),
)
@settings(max_examples=60, deadline=None)
def test_a_larger_cache_never_reads_more(
    rows: list[int], in_flight: int, caches: list[int], num_tokens: int | None
) -> None:
    if sum(rows) < 30:
        num_tokens = None
    for walk in (
        product_walk(rows, SMALL, 20, 10, 1, 2, num_tokens),
        outer_walk(rows, SMALL, 10, 20, num_tokens, True),
        outer_walk(rows, SMALL, 10, 20, num_tokens, False),
    ):
        found = [walk.memory_bytes(in_flight, size) for size in sorted([*caches, 0, ENDLESS])]
        assert all(less <= more * (1 + 1e-12) for more, less in pairwise(found))
        assert found[0] <= walk.requested_bytes


def test_gathered_sides_of_weight_gradients() -> None:
    rows, tile = [6, 6, 0, 6], outer_tile(32, 48)
    for left in (True, False):
        work = outer_work("op", "name", rows, 32, 48, "", num_tokens=12, gathered_left=left)
        own, other = (32, 48) if left else (48, 32)
        assert work.compulsory_bytes == 2 * (12 * own + 18 * other) + 2 * 4 * 32 * 48 + 8 * 18
        assert work.walk is not None
        assert work.walk.memory_bytes(1, ENDLESS) == pytest.approx(2 * (12 * own + 18 * other), rel=1e-12)
        assert work.walk.sizes[: work.walk.num_gathered] == [2 * r * min(own, tile.columns) for r in rows]
    walk = gather_walk(rows, 48, 12, between=0)
    assert walk == Walk([(0,), (1,), (2,), (3,)], [2 * r * 48 for r in rows], 4, 12 / 18, 2 * 12 * 48)


# ---- useful FLOPs against torch's counter


def counted(build: Callable[[list[Tensor]], Tensor], *shapes: tuple[int, ...]) -> tuple[int, int]:
    """FLOPs of forward and of backward, of all inputs, as torch counts them."""
    leaves = [torch.zeros(*shape, requires_grad=True) for shape in shapes]
    with FlopCounterMode(display=False) as forward:
        y = build(leaves)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y.sum(), leaves)
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("gated", [False, True])
def test_useful_flops_are_those_of_torch(gated: bool) -> None:
    shape = Shape("test", 24, 32, 48, 3, 2, 80, "silu", gated)
    t, d, f, e = 24, 32, 48, 3
    rows = expert_rows("zipf", t, e, 2)
    assert sorted(rows, reverse=True) == rows and sum(rows) == 48
    offsets = torch.tensor([0, *rows]).cumsum(0)
    flops = {(work.op, work.name): work.useful_flops for work in works(shape, "zipf")}

    def total(op: str, *names: str) -> int:
        return sum(flops.pop((op, name)) for name in names)

    forward, backward = counted(lambda x: grouped_gemm.grouped_gemm(*x, offsets), (48, d), (e, f, d))
    assert total("grouped_gemm", "forward") == forward
    assert total("grouped_gemm", "gradient of rows", "gradient of weights") == backward
    gate = [(e, f, d)] if gated else []

    def experts(x: list[Tensor]) -> Tensor:
        return expert_ffn.expert_ffn(x[0], offsets, x[1], x[3] if gated else None, x[2], None, None, "silu")

    forward, backward = counted(experts, (48, d), (e, f, d), (e, d, f), *gate)
    assert total("expert_ffn", "gather, first products, activation", "second product") == forward
    names = ["gradient of the activation", "gradient of rows", "gradient of w_out", "gradient of w_in"]
    assert total("expert_ffn", *names, *(["gradient of w_gate"] if gated else [])) == backward
    targets = torch.zeros(t, dtype=torch.int64)
    forward, backward = counted(lambda x: linear_cross_entropy.linear_cross_entropy(*x, targets), (t, d), (80, d))
    assert total("linear_cross_entropy", "forward") == forward
    assert total("linear_cross_entropy", "gradient of the logits", "both gradients (torch.mm)") == backward
    assert set(flops.values()) == {0}  # routing and movement multiply no matrices


@pytest.mark.parametrize("activation", expert_ffn.ACTIVATIONS)
def test_every_activation_of_the_experts_is_counted(activation: str) -> None:
    """The products are the same whatever stands between them; only what was compiled has the activation's name."""
    shape = layer(num_tokens=64, d_model=32, d_ff=48)
    found, plain = works(shape._replace(activation=activation)), works(shape)
    assert [work._replace(configuration="") for work in found] == [work._replace(configuration="") for work in plain]
    named = [work.kernel for work in found if activation in work.configuration.split()]
    assert named == ["first_kernel", "activation_backward_kernel"]


def test_no_activation_is_counted_that_the_experts_do_not_have() -> None:
    assert set(ACTIVATIONS) == set(expert_ffn.ACTIVATIONS)


# ---- tiles and tensors against what the kernels' launchers start


def launches(shape: Shape) -> dict[str, list]:
    """What the launchers start for a layer of this shape, recorded on tensors without data, by kernel."""
    pytest.importorskip("triton", reason="Triton has packages for Linux only")
    from moe.kernels.expert_ffn import triton_impl as ffn
    from moe.kernels.launch import recording
    from moe.kernels.linear_cross_entropy import triton_impl as head

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    t, d, f, e, k = shape.num_tokens, shape.d_model, shape.d_ff, shape.num_experts, shape.top_k
    x, weights, targets = empty(t, d), empty(t, k, dtype=torch.float32), empty(t, dtype=torch.int64)
    w_in, w_gate, w_out = empty(e, f, d), empty(e, f, d) if shape.gated else None, empty(e, d, f)
    order = RowOrder(*(empty(n, dtype=torch.int64) for n in (t * k, t * k, t * k, t * k, t + 1, e + 1)))
    experts = (w_in, w_gate, w_out, None, None, shape.activation)
    found: dict[str, list] = {}
    with recording() as recorded:
        _, kept = ffn.routed_forward(x, weights, order, *experts)
        ffn.routed_backward(x, kept.hidden, kept.gate, x, weights, order, *experts[:3], None, False, shape.activation)
        words = empty(shape.vocab_size, d)
        _, sums = head.forward(x, words, targets)
        head.backward(empty(t, dtype=torch.float32), x, words, targets, sums)
    for entry in recorded:
        found.setdefault(entry.kernel.__name__.lstrip("_"), []).append(entry)
    return found


def sides(entry: object) -> tuple[int, ...]:
    arguments = entry.arguments
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K") if "BLOCK_M" in arguments else ("BLOCK_N", "BLOCK_K", "BLOCK_R")
    return (*(arguments[name] for name in names), entry.num_warps, entry.num_stages)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_tiles_are_those_the_kernels_take(shape: Shape) -> None:
    found = launches(shape)
    mine: dict[str, list[Work]] = {}
    for work in works(shape):
        if work.tile is not None and work.op != "grouped_gemm":
            mine.setdefault(work.kernel, []).append(work)
    assert set(mine) == {name for name in found if name.endswith(tuple(mine))}
    for kernel, expected in mine.items():
        theirs = [sides(entry) for entry in found[kernel]]
        repeated = [work.tile[:5] for work in expected for _ in work.grids if work.tile is not None]
        assert sorted(theirs) == sorted(repeated), kernel
    per = {entry.arguments["PROGRAMS"] for entry in found["product_kernel"]}
    assert per == {132 * choose_tile(shape.num_tokens * shape.top_k, shape.num_experts, 4096, 4096).per_processor}
    # the grouped products take what `choose_tile` says
    from moe.kernels.grouped_gemm import triton_tiles

    assert triton_tiles.GROUP_M == GROUP_ROWS
    for rows, groups, columns, inner in product((1, 100, 5000, 70000), (1, 8, 512), (16, 48, 4096), (32, 2048)):
        theirs = triton_tiles.choose_tile(rows, groups, columns, inner, torch.bfloat16)
        assert choose_tile(rows, groups, columns, inner)[:6] == tuple(theirs)[:6]


SCHEDULE = ("expert_offsets", "tile_experts", "tile_rows", "num_tiles", "parts")  # and partial sums


@pytest.mark.parametrize("gated", [False, True])
def test_compulsory_bytes_are_those_of_the_tensors_that_kernels_are_given(gated: bool) -> None:
    shape = Shape("test", 512, 128, 256, 4, 2, 512, "silu" if gated else "gelu", gated)
    found = launches(shape)

    def nbytes(kernel: str, number: int = 0) -> int:
        arguments = found[kernel][number].arguments.items()
        return size_of(value for name, value in arguments if isinstance(value, Tensor) and name not in SCHEDULE)

    mine = {(work.op, work.name): work.compulsory_bytes for work in works(shape)}
    assert mine["expert_ffn", "gather, first products, activation"] == nbytes("first_kernel")
    assert mine["expert_ffn", "second product"] == nbytes("product_kernel", 0)
    of_weights = 512 * 2 * 4  # the sum of `parts`
    assert mine["expert_ffn", "gradient of the activation"] == nbytes("activation_backward_kernel") + of_weights
    assert mine["expert_ffn", "gradient of w_out"] == nbytes("outer_kernel", 0)
    assert mine["expert_ffn", "gradient of rows"] == nbytes("product_kernel", 1)
    assert mine["expert_ffn", "gradient of w_in"] == nbytes("outer_kernel", 1)
    assert mine["linear_cross_entropy", "gradient of the logits"] == nbytes("logit_gradients_kernel")
    assert mine["linear_cross_entropy", "forward"] == nbytes("log_sums_kernel") + 512 * 4  # losses beside sums


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_compulsory_bytes_of_routing_and_movement_are_those_of_their_tensors() -> None:
    shape = Shape("test", 96, 64, 32, 12, 3, 64)
    mine = {(work.op, work.name): work.compulsory_bytes for work in works(shape)}
    logits = torch.randn(96, 12)
    routing = top_k_routing(logits, 3, backend="torch")
    assert mine["topk_routing", "forward"] == size_of([logits, *routing])
    back = [
        logits,
        logits,
        logits,
        routing.expert_indices,
        routing.expert_weights,
    ]  # two gradients and probabilities; one written
    assert mine["topk_routing", "backward"] == size_of(back)
    kept = torch.ones(96, 3, dtype=torch.bool)
    order = permute.sort_by_expert(routing.expert_indices, kept, 12, backend="torch")
    assert mine["permute", "sort_by_expert"] == size_of([routing.expert_indices, kept, *order])
    x = torch.randn(96, 64).bfloat16()
    rows = permute.permute(x, order, backend="torch")
    assert mine["permute", "permute"] == size_of([x, order.token_of_row, rows])
    sums = [rows, order.row_of_slot, order.token_starts, x]
    assert mine["permute", "permute backward"] == size_of(sums)
    assert mine["permute", "unpermute"] == size_of([*sums, order.slots, routing.expert_weights])
    weights = [routing.expert_weights, routing.expert_weights]  # and their gradient
    places = [order.token_of_row, order.slot_of_row]
    assert mine["permute", "unpermute backward"] == size_of([x, rows, rows, *weights, *places])
