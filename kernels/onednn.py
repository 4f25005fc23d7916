"""Products by oneDNN: in float32 where MKL, torch's default, is the slower of the two, and for ragged rows.

On AMD processors MKL does not use its AVX-512 code: MKL_VERBOSE=1 calls them just "Intel Architecture processors". On
one core of a Zen 4 a product of 512 rows with a 256 x 1024 matrix reaches 91 to 95 GFLOP/s with MKL and 102 to 108 with
oneDNN; gradients of matrices are equally fast. torch's only way to oneDNN's float32 is its compiler's op for linear
layers. The op returns its result, which must be copied into any given memory, and takes 14 us per call, so small
products stay with MKL.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .backend import is_watched
from .expert_threads import Span

STEP = 64  # rows: only multiples of it are taken, so that there are few shapes

_LEAST_WORK = 2**24  # multiply-adds of one product: at 2**23 and below a call costs more than it gains
_LONGEST = 1024  # rows of a product: keeps its result small until it is copied
_ROUNDED_FROM = 96  # rows: padding 64 to 72 costs more than code for every row count
_STEPS = ((256, 16), (1, 8))  # (least rows, step): counts are rounded up to multiples of the step, by at most 6% and 8%


def wins(dtype: torch.dtype, device_type: str, work: float) -> bool:
    """Whether products of `work` multiply-adds each are faster here than with torch.mm.

    `torch.backends.mkldnn.flags(enabled=False)` switches this off, as it does all of oneDNN; so does a watching mode.
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
    """Whether this is the kind of machine that was measured: an AMD processor with AVX-512, and torch with MKL."""
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
    """Whether torch.mm itself uses oneDNN for these rows, shared by `num_spans` experts, and rounding pays off."""
    return (
        rows.dtype == torch.bfloat16
        and rows.device.type == "cpu"
        and rows.shape[0] >= _ROUNDED_FROM * max(1, num_spans)
        and torch._C._get_mkldnn_enabled()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and not is_watched()
    )


def grouped_products(
    rows: Tensor, weights: Mapping[int, Tensor] | Sequence[Tensor], spans: Sequence[Span], out: Tensor
) -> None:
    """Write rows[start:end] times the matrix of e to out[start:end] for each (e, start, end) of consecutive `spans`.

    weights[e]: (N, K), as in nn.Linear, for float32 rows (R, K); (K, N) for bfloat16, as torch.mm takes it.
    oneDNN generates code for each shape, in 0.2 to 0.8 ms, and caches the last 1,024, at 0.2 MB each. An expert's row
    count changes with every batch, so a step of 64 experts would fill the cache with shapes that the next step cannot
    reuse. A product therefore also takes neighbouring rows, up to one of a few sizes, and their results are discarded.
    """
    limit = spans[-1][2]
    counts = [end - start for _, start, end in spans]
    covered = slice(spans[0][1], limit)
    own_rows, results = rows[covered].split(counts), out[covered].split(counts)  # cheaper than slices for each expert
    for (e, start, end), own, result in zip(spans, own_rows, results, strict=True):
        if end - start < _ROUNDED_FROM:
            _multiply(own, weights[e], result)
            continue
        for first, size, begin, stop in _windows(start, end, rows.shape[0]):
            some = rows.narrow(0, first, size)
            if rows.dtype != torch.float32 and first == begin and begin + size <= limit:
                # the surplus belongs to later spans, which overwrite it
                torch.mm(some, weights[e], out=out.narrow(0, begin, size))
            else:
                products = product(some, weights[e]) if rows.dtype == torch.float32 else some @ weights[e]
                out.narrow(0, begin, stop - begin).copy_(products.narrow(0, begin - first, stop - begin))


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Rows as they are, by the library that `grouped_products` says."""
    if x.dtype == torch.float32:
        out.copy_(product(x, weight))
    else:
        torch.mm(x, weight, out=out)


def _windows(start: int, end: int, num_rows: int) -> Iterator[tuple[int, int, int, int]]:
    """(first, size, begin, stop): products of the `size` rows from `first` on, for the rows begin..stop of start..end.

    For at least _ROUNDED_FROM rows. Sizes are few, at most 1,024 and at most num_rows; no window extends beyond the
    last row.
    """
    size = -(-(end - start) // -(-(end - start) // _LONGEST))
    step = next(step for least, step in _STEPS if size >= least)
    size = min(num_rows, -(-size // step) * step)
    for begin in range(start, end, size):
        yield min(begin, num_rows - size), size, begin, min(begin + size, end)
