"""The kernels of `triton_impl.py`: products with the activation and its derivative in their epilogues.

From sm_90 on weights are read by descriptor where `choose_loads` finds that possible; gathered rows are scattered, so
they are read by pointer.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# what Triton compiles has no Python types: its arguments are pointers, numbers and constants

from __future__ import annotations

import triton
import triton.language as tl

from ..grouped_gemm.triton_tiles import (
    add_product,
    describe_weights,
    load_a,
    load_b,
    load_described,
    load_rows,
    multiply,
    place_of,
    rows_of,
)

INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)  # of the tanh form of gelu (Hendrycks and Gimpel 2016)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """gelu (exact), gelu_tanh, relu or silu, in float32 or float64."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * INVERSE_SQRT_2))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 is the sigmoid of 2u
        return x / (1.0 + tl.exp(-x * TWO_SQRT_2_OVER_PI * (1.0 + x * x * CUBIC)))
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    else:
        return x / (1.0 + tl.exp(-x))


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at x; relu's is 0 at 0, as in torch."""
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * INVERSE_SQRT_2)) + x * INVERSE_SQRT_2_PI * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        s = 1.0 / (1.0 + tl.exp(-x * TWO_SQRT_2_OVER_PI * (1.0 + x * x * CUBIC)))
        return s + x * s * (1.0 - s) * TWO_SQRT_2_OVER_PI * (1.0 + 3.0 * (x * x * CUBIC))
    elif ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0).to(x.dtype)
    else:
        s = 1.0 / (1.0 + tl.exp(-x))
        return s * (1.0 + x * (1.0 - s))


@triton.jit
def source_of(rows, tokens):
    """The indices that rows are read from: their own, or their tokens'."""
    if tokens is None:
        return rows
    return tl.load(tokens + rows).to(tl.int64)


@triton.jit
def add_products(
    h, a, w_in, w_gate, matrix, n, N, K, stride_bn, stride_bk,
    BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """h and zero, plus products of the rows that start at `a` (BLOCK_M,) with columns `n` of the matrices at `matrix`.

    Without a gate the second stays zero, which the compiler removes. Rows are read once for both.
    """
    g = tl.zeros_like(h)
    k = tl.arange(0, BLOCK_K)
    b_places = n[None, :] * stride_bn + k[:, None] * stride_bk
    b = w_in + matrix
    if w_gate is not None:
        b_gate = w_gate + matrix
    for start in range(0, K, BLOCK_K):
        a_block = load_a(a[:, None] + k[None, :], k + start, K, EVEN_K)
        b_block = load_b(b + b_places, n, k + start, N, K, EVEN_N, EVEN_K)
        h = multiply(a_block, b_block, h, PRECISION, UPCAST)
        b += BLOCK_K * stride_bk
        if w_gate is not None:
            gate_block = load_b(b_gate + b_places, n, k + start, N, K, EVEN_N, EVEN_K)
            g = multiply(a_block, gate_block, g, PRECISION, UPCAST)
            b_gate += BLOCK_K * stride_bk
        a += BLOCK_K
    return h, g


@triton.jit
def add_gathered_products(
    h, a, w_in, w_gate, expert, n, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, LOADS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same with matrices read by descriptor, from their column `n` on."""
    g = tl.zeros_like(h)
    k = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        a_block = load_a(a[:, None] + k[None, :], k + start, K, EVEN_K)
        h = multiply(a_block, load_described(w_in, expert, n, start, BLOCK_N, BLOCK_K, LOADS), h, PRECISION, UPCAST)
        if w_gate is not None:
            gate_block = load_described(w_gate, expert, n, start, BLOCK_N, BLOCK_K, LOADS)
            g = multiply(a_block, gate_block, g, PRECISION, UPCAST)
        a += BLOCK_K
    return h, g


@triton.jit
def first_kernel(
    x, tokens, w_in, w_gate, b_in, hidden, gate, inner,
    expert_offsets, tile_experts, tile_rows, num_tiles,
    num_experts, N, K, stride_x, stride_be, stride_bn, stride_bk,
    LOADS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, GROUP_M: tl.constexpr, ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    num_m = tl.load(num_tiles)
    num_n = tl.cdiv(N, BLOCK_N)
    if LOADS != "pointers":  # once for all tiles of the program
        w_in = describe_weights(w_in, num_experts, N, K, stride_be, stride_bn, stride_bk, BLOCK_N, BLOCK_K, LOADS)
        if w_gate is not None:
            w_gate = describe_weights(
                w_gate, num_experts, N, K, stride_be, stride_bn, stride_bk, BLOCK_N, BLOCK_K, LOADS
            )  # fmt: skip
    for tile in range(tl.program_id(0), num_m * num_n, PROGRAMS):
        m_tile, n_tile = place_of(tile, num_m, num_n, GROUP_M)
        expert, first, rows, inside = rows_of(m_tile, tile_experts, tile_rows, expert_offsets, BLOCK_M)
        n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        a = x + source_of(first + rows, tokens) * stride_x
        h = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
        if LOADS != "pointers":
            h, g = add_gathered_products(
                h, a, w_in, w_gate, expert.to(tl.int32), n_tile * BLOCK_N, K,
                BLOCK_N, BLOCK_K, EVEN_K, LOADS, PRECISION, UPCAST,
            )  # fmt: skip
        else:
            h, g = add_products(
                h, a, w_in, w_gate, expert * stride_be, n, N, K, stride_bn, stride_bk,
                BLOCK_K, EVEN_N, EVEN_K, PRECISION, UPCAST,
            )  # fmt: skip
        if b_in is not None:
            h += tl.load(b_in + expert * N + n, mask=n < N, other=0.0).to(ACCUMULATOR)[None, :]
        at = rows[:, None] * N + n[None, :]
        written = inside[:, None] & (n < N)[None, :]
        # the activation sees the rounded values that the backward will read
        rounded = h.to(hidden.dtype.element_ty)
        tl.store(hidden + first * N + at, rounded, mask=written)
        if w_gate is not None:
            rounded_gate = g.to(gate.dtype.element_ty)
            tl.store(gate + first * N + at, rounded_gate, mask=written)
            value = activate(rounded_gate.to(ACCUMULATOR), ACTIVATION) * rounded.to(ACCUMULATOR)
        else:
            value = activate(rounded.to(ACCUMULATOR), ACTIVATION)
        tl.store(inner + first * N + at, value.to(inner.dtype.element_ty), mask=written)


@triton.jit
def activation_backward_kernel(
    grad, tokens, row_weights, w_out, b_out, hidden, gate, grad_hidden, grad_gate, inner, parts,
    expert_offsets, tile_experts, tile_rows, num_tiles,
    num_rows, num_experts, N, K, stride_grad, stride_be, stride_bn, stride_bk,
    LOADS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, GROUP_M: tl.constexpr, ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    num_m = tl.load(num_tiles)
    num_n = tl.cdiv(N, BLOCK_N)
    if LOADS != "pointers":  # once for all tiles of the program
        blocks = describe_weights(w_out, num_experts, N, K, stride_be, stride_bn, stride_bk, BLOCK_N, BLOCK_K, LOADS)
    for tile in range(tl.program_id(0), num_m * num_n, PROGRAMS):
        m_tile, n_tile = place_of(tile, num_m, num_n, GROUP_M)
        expert, first, rows, inside = rows_of(m_tile, tile_experts, tile_rows, expert_offsets, BLOCK_M)
        n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        a = grad + source_of(first + rows, tokens) * stride_grad
        upstream = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)  # grad @ W_out, not yet weighted
        if LOADS != "pointers":
            upstream, _ = add_gathered_products(
                upstream, a, blocks, None, expert.to(tl.int32), n_tile * BLOCK_N, K,
                BLOCK_N, BLOCK_K, EVEN_K, LOADS, PRECISION, UPCAST,
            )  # fmt: skip
        else:
            upstream = add_product(
                upstream, a, w_out + expert * stride_be, n, N, K, stride_bn, stride_bk,
                BLOCK_K, EVEN_N, EVEN_K, PRECISION, UPCAST,
            )  # fmt: skip
        at = rows[:, None] * N + n[None, :]
        within = inside[:, None] & (n < N)[None, :]
        weight = None
        if row_weights is not None:
            weight = tl.load(row_weights + first + rows).to(ACCUMULATOR)[:, None]
        # one block after another, each stored as soon as it is known: together they would not fit in registers
        if gate is not None:
            g = tl.load(gate + first * N + at, mask=within, other=0.0).to(ACCUMULATOR)
            activated = activate(g, ACTIVATION)
            weighted = upstream if weight is None else upstream * weight
            of_hidden = (weighted * activated).to(grad_hidden.dtype.element_ty)
            tl.store(grad_hidden + first * N + at, of_hidden, mask=within)
            h = tl.load(hidden + first * N + at, mask=within, other=0.0)
            of_gate = weighted * h.to(ACCUMULATOR) * activation_slope(g, ACTIVATION)
            tl.store(grad_gate + first * N + at, of_gate.to(grad_gate.dtype.element_ty), mask=within)
            value = activated * h.to(ACCUMULATOR)
        else:
            h = tl.load(hidden + first * N + at, mask=within, other=0.0).to(ACCUMULATOR)
            weighted = upstream if weight is None else upstream * weight
            of_hidden = weighted * activation_slope(h, ACTIVATION)
            tl.store(grad_hidden + first * N + at, of_hidden.to(grad_hidden.dtype.element_ty), mask=within)
            value = activate(h, ACTIVATION)
        if row_weights is not None:
            part = tl.sum(upstream * value, 1)
            if b_out is not None:  # noqa: SIM102 (the outer one is decided by the compiler)
                if n_tile == 0:
                    part += dot_with_bias(a, b_out + expert * K, K, BLOCK_M, BLOCK_K, ACCUMULATOR)
            tl.store(parts + n_tile.to(tl.int64) * num_rows + first + rows, part, mask=inside)
            value *= weight
        tl.store(inner + first * N + at, value.to(inner.dtype.element_ty), mask=within)


@triton.jit
def dot_with_bias(a, bias, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """The product of each row that starts at `a` (BLOCK_M,) with one vector (K,)."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M,), ACCUMULATOR)
    for start in range(0, K, BLOCK_K):
        block = load_a(a[:, None] + (k + start)[None, :], k + start, K, False).to(ACCUMULATOR)
        values = tl.load(bias + start + k, mask=start + k < K, other=0.0).to(ACCUMULATOR)
        total += tl.sum(block * values[None, :], 1)
    return total


@triton.jit
def grouped_sum_kernel(
    rows,
    tokens,
    row_weights,
    out,
    expert_offsets,
    N,
    stride_rows,
    ACCUMULATOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    expert = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(expert_offsets + expert).to(tl.int32)
    end = tl.load(expert_offsets + expert + 1).to(tl.int32)
    total = tl.zeros((BLOCK_R, BLOCK_N), ACCUMULATOR)
    for first in range(start, end, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        block = load_rows(rows, tokens, r, r < end, n, N, stride_rows).to(ACCUMULATOR)
        if row_weights is not None:
            block *= tl.load(row_weights + r, mask=r < end, other=0.0).to(ACCUMULATOR)[:, None]
        total += block
    tl.store(out + expert.to(tl.int64) * N + n, tl.sum(total, 0).to(out.dtype.element_ty), mask=n < N)
