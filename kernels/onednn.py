"""Products by oneDNN: of float32 where MKL, which torch asks for them, is the slower of the two, and of ragged rows.

On AMD's processors MKL does not take its AVX-512 code: MKL_VERBOSE=1 calls them "Intel Architecture processors" and no
more. On one core of a Zen 4 a product of 512 rows with a 256 x 1024 matrix reaches 91 to 95 GFLOP/s by MKL and 102 to
108 by oneDNN; gradients of matrices are level. torch has one way to oneDNN's float32, its compiler's op for linear
layers. It returns its result, so that what is to lie in given memory is copied there, and takes 14 us a call, so that
small products stay with MKL.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .backend import is_watched
from .expert_threads import Span

STEP = 64  # rows: numbers that are its multiples are few

_LEAST_WORK = 2**24  # multiply-adds of one product: from 2**23 on downwards a call costs more than it gains
_LONGEST = 1024  # rows of a product: what its result takes, before it is copied, stays small
# (rows from which on, step): numbers of rows are rounded up to multiples of the step, at most 8% and 6%. Below, 64 rows
# filled up to 72 cost more than code for every number, and above 1,024 there is no more than one product needs
_STEPS = ((256, 16), (96, 8), (1, 1))


def wins(dtype: torch.dtype, device_type: str, work: float) -> bool:
    """Whether products of `work` multiply-adds each are faster here than by torch.mm.

    `torch.backends.mkldnn.flags(enabled=False)` switches it off, as it does all of oneDNN, and so does who watches.
    """
    return (
        dtype == torch.float32
        and device_type == "cpu"
        and work >= _LEAST_WORK
        and torch._C._get_mkldnn_enabled()
        and _is_measured()
        and not is_watched()
    )


@cache
def _is_measured() -> bool:
    """Whether this is a machine of the kind that was measured: an AMD processor with AVX-512, and torch with MKL."""
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    processors = Path("/proc/cpuinfo")
    is_amd = processors.exists() and "AuthenticAMD" in processors.read_text()
    return is_amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weightᵀ (+ bias), as nn.Linear: (..., K), (N, K), (N,) -> (..., N)."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y


def needs_few_shapes(rows: Tensor, num_spans: int) -> bool:
    """Whether torch.mm itself goes to oneDNN for these rows, which `num_spans` experts share, and rounding pays."""
    return (
        rows.dtype == torch.bfloat16
        and rows.device.type == "cpu"
        and rows.shape[0] >= _STEPS[-2][0] * max(1, num_spans)
        and torch._C._get_mkldnn_enabled()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and not is_watched()
    )


def grouped_products(
    rows: Tensor, weights: Mapping[int, Tensor] | Sequence[Tensor], spans: Sequence[Span], out: Tensor
) -> None:
    """rows[start:end] times the matrix of e into out[start:end] for each (e, start, end) of `spans`, which follow each
    other. weights[e]: (N, K), as of nn.Linear, for float32 rows (R, K), and (K, N) for bfloat16, which torch.mm takes.

    oneDNN makes code for each shape, in 0.2 to 0.8 ms, and keeps that of the last 1,024, in 0.2 MB each. An expert's
    rows are another number in every batch, so that a step of 64 experts would fill this with what the next step does
    not find: a product takes rows of the neighbours too, up to one of few numbers, and what they give is thrown away.
    """
    in_place = rows.dtype != torch.float32
    multiply = torch.mm if in_place else _linear  # looked up once for many small products
    limit = spans[-1][2]
    for e, start, end in spans:
        for first, size, begin, stop in _windows(start, end, rows.shape[0]):
            some = rows.narrow(0, first, size)
            if in_place and first == begin and begin + size <= limit:
                # what is written too much is of the spans to come, which write it again
                torch.mm(some, weights[e], out=out.narrow(0, begin, size))
            else:
                out[begin:stop] = multiply(some, weights[e])[begin - first : stop - first]


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    return y


def _windows(start: int, end: int, num_rows: int) -> Iterator[tuple[int, int, int, int]]:
    """(first, size, begin, stop): products of the `size` rows from `first` on, for the rows begin..stop of start..end.

    Sizes are at most 1,024, few numbers, and at most num_rows, of which no window leaves the end.
    """
    size = -(-(end - start) // -(-(end - start) // _LONGEST))
    step = next(step for least, step in _STEPS if size >= least)
    size = min(num_rows, -(-size // step) * step)
    for begin in range(start, end, size):
        yield min(begin, num_rows - size), size, begin, min(begin + size, end)
