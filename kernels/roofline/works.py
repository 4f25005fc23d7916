"""What each kernel does for an MoE layer of one shape under one load: FLOPs, bytes, tiles. No device enters here.

Bytes count tensors of numbers and their index vectors; the schedule of row tiles and offsets, a few numbers per expert,
are left out, as are biases. FLOPs are those of products, a multiply-add being 2; work on the vector units is counted
separately and roughly, from the operations in the kernel's source.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .loads import expert_rows
from .products import INDEX_BYTES, SINGLE_BYTES, Work, outer_work, product_work
from .tiles import ELEMENT_BYTES, TILES, Tile, choose_tile, outer_tile
from .traffic import gather_walk

CHUNK_TOKENS = 4096  # in the backward of the projection with cross-entropy
BLOCK_SLOTS = 512  # per program of the sort
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")  # those of `expert_ffn`, whose own list needs torch

# vector operations per score: exp, sums and divisions once; in each of K rounds the mask, maximum, comparison, lowest
# index and choice
_OPS_ONCE, _OPS_A_ROUND, _OPS_BACK_ONCE, _OPS_BACK_A_ROUND = 8, 9, 12, 3


# by tile height: a number of tokens for which the projection was compiled with such a tile
_COMPILED_TOKENS = {128: 65536, 64: 32, 16: 8}


class Shape(NamedTuple):
    """An MoE layer, the tokens of one rank and the vocabulary after it. `works` checks the values."""

    name: str
    num_tokens: int
    d_model: int
    d_ff: int
    num_experts: int
    top_k: int
    vocab_size: int
    activation: str = "silu"
    gated: bool = True


SHAPES = (
    Shape("512 experts of Artetxe et al. 2021 (15B)", 8192, 768, 3072, 512, 2, 50264, "gelu", False),
    Shape("Mixtral 8x7B", 8192, 4096, 14336, 8, 2, 32000),
    Shape("OLMoE-1B-7B", 8192, 2048, 1024, 64, 8, 50304),
    Shape("fine-grained, as DeepSeekMoE 16B", 8192, 2048, 1408, 64, 6, 102400),
)


def works(shape: Shape, load: str = "uniform", tile: Tile | None = None) -> list[Work]:
    """Every kernel of a training step of the layer and of the projection after it, in order of use.

    load: one of LOADS. tile: for the products with the experts' matrices, instead of the kernels' choice. Raises
    ValueError for sizes below 1, widths that are not multiples of 16, an unknown load, a top_k above num_experts and
    an activation that is not one of ACTIVATIONS.
    """
    numbers = {name: value for name, value in shape._asdict().items() if type(value) is int}
    if wrong := [f"{name} ({value})" for name, value in numbers.items() if value < 1]:
        raise ValueError(f"{', '.join(wrong)} of {shape.name} must be at least 1")
    if shape.activation not in ACTIVATIONS:
        raise ValueError(f"activation ({shape.activation!r}) of {shape.name} must be one of: {', '.join(ACTIVATIONS)}")
    rows = expert_rows(load, shape.num_tokens, shape.num_experts, shape.top_k)
    found = [*_routing(shape), *_movement(shape, rows), *_grouped_gemm(shape, rows, tile)]
    found += _expert_ffn(shape, rows, tile)
    return [*found, *_cross_entropy(shape)]


def _routing(shape: Shape) -> Iterator[Work]:
    t, e, k = shape.num_tokens, shape.num_experts, shape.top_k
    width = max(16, 1 << (e - 1).bit_length())  # of the block of scores
    programs = -(-t // max(1, 8192 // (SINGLE_BYTES * width)))  # each with 8 KiB of scores
    choices, scores, total = t * k * (INDEX_BYTES + SINGLE_BYTES), t * e * SINGLE_BYTES, e * INDEX_BYTES
    moved = 2 * scores + choices + total
    histograms = 2 * programs * total  # one per program, summed afterwards
    ops = t * width * (_OPS_ONCE + k * _OPS_A_ROUND)
    yield Work("topk_routing", "forward", 2, moved, moved + histograms, ops=ops)
    moved = 3 * scores + choices
    ops = t * width * (_OPS_BACK_ONCE + k * _OPS_BACK_A_ROUND)
    yield Work("topk_routing", "backward", 1, moved, moved, ops=ops)


def _movement(shape: Shape, rows: list[int]) -> Iterator[Work]:
    t, d, total = shape.num_tokens, shape.d_model, sum(rows)
    wide, index, single = d * ELEMENT_BYTES, total * INDEX_BYTES, total * SINGLE_BYTES
    slots = index + total  # experts, and whether each choice is kept
    starts = (t + 1) * INDEX_BYTES  # where each token's slots begin
    order = 4 * index + starts + (shape.num_experts + 1) * INDEX_BYTES
    counts = -(-total // BLOCK_SLOTS) * shape.num_experts * INDEX_BYTES
    # launches: count; two running sums and the zero before each; the check that their totals agree, in two; place; the
    # offsets. Slots are read twice, counts written, summed (read, written) and read
    yield Work("permute", "sort_by_expert", 9, slots + order, 2 * slots + order + 4 * counts)
    written = total * wide + index
    gathered = gather_walk(rows, d, t, between=0)
    yield Work("permute", "permute", 1, written + min(t, total) * wide, written, walk=gathered)
    back = (total + t) * wide + index + starts
    yield Work("permute", "permute backward", 1, back, back, ops=total * d)
    weighted = back + index + single  # slots, and the weights they name
    yield Work("permute", "unpermute", 1, weighted, weighted, ops=2 * total * d)
    moved = 2 * total * wide + 2 * index + 2 * single
    gathered = gather_walk(rows, d, t, between=d)
    zeros = single  # the gradient of the weights is zeroed first
    compulsory = moved + min(t, total) * wide
    yield Work("permute", "unpermute backward", 2, compulsory, moved + zeros, ops=3 * total * d, walk=gathered)


def _grouped_gemm(shape: Shape, rows: list[int], given: Tile | None) -> Iterator[Work]:
    """The product of rows (R, D) with (E, F, D), and its two gradients."""
    d, f = shape.d_model, shape.d_ff
    forward = given or choose_tile(sum(rows), len(rows), f, d)
    back = given or choose_tile(sum(rows), len(rows), d, f)
    yield product_work("grouped_gemm", "forward", rows, forward, f, d, f"bfloat16 {forward.size}")
    yield product_work("grouped_gemm", "gradient of rows", rows, back, d, f, f"bfloat16 {back.size}")
    yield outer_work("grouped_gemm", "gradient of weights", rows, f, d, f"bfloat16 {outer_tile(f, d).size}")


def _expert_ffn(shape: Shape, rows: list[int], given: Tile | None) -> Iterator[Work]:
    """Gather, products and activation, and their gradients. Sums per token: `unpermute` and `permute backward`."""
    d, f, t, gates = shape.d_model, shape.d_ff, shape.num_tokens, int(shape.gated)
    total = sum(rows)
    numbers = total * f * ELEMENT_BYTES  # of one tensor (R, F)
    base = given or choose_tile(total, len(rows), f, d)
    into_rows = given or choose_tile(total, len(rows), d, f)
    half = base._replace(columns=max(16, base.columns // 2))  # for two accumulators, or a large epilogue
    compiled = f"bfloat16 {shape.activation} {base.size}"
    yield product_work(
        "expert_ffn", "gather, first products, activation", rows, half if shape.gated else base, f, d, compiled,
        kernel="first_kernel", matrices=1 + gates, num_tokens=t, written=(2 + gates) * numbers,
    )  # fmt: skip
    # one schedule serves both products if their tiles are equally tall
    plain, again = f"bfloat16 {into_rows.size}", int(into_rows.rows != base.rows)
    yield product_work("expert_ffn", "second product", rows, into_rows, d, f, plain, helpers=again)
    tile = half
    if shape.gated and tile.rows >= 64:
        tile = half._replace(rows=64, num_warps=8)
        compiled = f"bfloat16 {shape.activation} {TILES[-1].size}"  # compiled once for both heights
    parts = -(-f // tile.columns) * total * SINGLE_BYTES  # of the routing weights' gradient, one per column tile
    yield product_work(
        "expert_ffn", "gradient of the activation", rows, tile, f, d, compiled,
        kernel="activation_backward_kernel", num_tokens=t, read=(1 + gates) * numbers + total * SINGLE_BYTES,
        written=(2 + gates) * numbers + total * SINGLE_BYTES, extra=2 * parts, helpers=2,
    )  # fmt: skip
    of_out, of_in = (f"bfloat16 {outer_tile(*size).size}" for size in ((d, f), (f, d)))
    yield outer_work("expert_ffn", "gradient of w_out", rows, d, f, of_out, num_tokens=t, gathered_left=True)
    again = int(into_rows.rows != tile.rows)
    yield product_work("expert_ffn", "gradient of rows", rows, into_rows, d, f, plain, terms=1 + gates, helpers=again)
    for name in ("w_in", "w_gate")[: 1 + gates]:
        yield outer_work("expert_ffn", f"gradient of {name}", rows, f, d, of_in, num_tokens=t)


def _cross_entropy(shape: Shape) -> Iterator[Work]:
    """Losses; gradients of the logits, which are recomputed chunk by chunk; and two products by torch.mm."""
    t, d, v = shape.num_tokens, shape.d_model, shape.vocab_size
    tile, compiled = _logits_tile(t, v, d)
    parts = -(-v // tile.columns) * t * SINGLE_BYTES  # of the sums, one per column tile, summed afterwards
    yield product_work(
        "linear_cross_entropy", "forward", [t], tile, v, d, compiled, kernel="log_sums_kernel",
        read=t * INDEX_BYTES, written=2 * t * SINGLE_BYTES, extra=2 * parts + 4 * t * SINGLE_BYTES, helpers=3,
    )  # fmt: skip
    chunks = [min(CHUNK_TOKENS, t - start) for start in range(0, t, CHUNK_TOKENS)]
    tile, compiled = _logits_tile(chunks[0], v, d)
    logits = t * v * ELEMENT_BYTES
    yield product_work(
        "linear_cross_entropy", "gradient of the logits", [t], tile, v, d, compiled, kernel="logit_gradients_kernel",
        read=t * (INDEX_BYTES + 2 * SINGLE_BYTES), written=logits, helpers=0, recomputed=True, chunks=chunks,
    )  # fmt: skip
    weight, hidden = v * d, t * d * ELEMENT_BYTES
    # per chunk: the weight, a product of its size written and read, a sum in float32 read and written
    each = weight * (3 * ELEMENT_BYTES + 2 * SINGLE_BYTES)
    ends = weight * (2 * SINGLE_BYTES + ELEMENT_BYTES)  # zeros before; the conversion after
    yield Work(
        "linear_cross_entropy",
        "both gradients (torch.mm)",
        launches=3 * len(chunks) + 2,
        compulsory_bytes=logits + 2 * hidden + 2 * weight * ELEMENT_BYTES,
        fixed_bytes=2 * logits + 2 * hidden + len(chunks) * each + ends,
        flops=4 * t * v * d,
        executed_flops=4 * t * v * d,
    )


def _logits_tile(num_tokens: int, vocab_size: int, d_model: int) -> tuple[Tile, str]:
    """The tile of the projection, and the name of the configuration compiled for it."""
    if vocab_size % 16:
        if d_model % 64:
            raise ValueError(
                f"vocab_size ({vocab_size}) must be a multiple of 16, or d_model ({d_model}) a multiple of 64: pad one"
            )
        return TILES[2 if num_tokens > 64 else 0]._replace(columns=64), "bfloat16 V=50257"
    tile = choose_tile(num_tokens, 1, vocab_size, d_model)
    return tile, f"bfloat16 T={_COMPILED_TOKENS.get(tile.rows, num_tokens)}"
