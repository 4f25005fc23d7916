"""Products of float32 matrices by oneDNN, on processors where MKL, which torch asks for them, is the slower of the two.

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
_UNCUT = 256  # rows: up to here a part more costs more than code for every number
_LONGEST = 1024  # rows: what a part's result takes, before it is copied, stays small


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


def grouped_products(
    rows: Tensor, weights: Mapping[int, Tensor] | Sequence[Tensor], spans: Sequence[Span], out: Tensor
) -> None:
    """rows[start:end] @ weights[e]ᵀ into out[start:end] for each (e, start, end) of `spans`, which follow each other.

    oneDNN makes code for each shape, in 0.3 to 0.8 ms, and keeps that of the last 1,024. An expert's rows are another
    number in every batch, so where they are many they are multiplied in parts of few sizes.
    """
    sizes: list[int] = []
    owners: list[int] = []
    for e, start, end in spans:
        parts = [end - start] if end - start < _UNCUT else list(_parts(end - start))
        sizes += parts
        owners += [e] * len(parts)
    covered = slice(spans[0][1], spans[-1][2])
    multiply = torch.ops.mkldnn._linear_pointwise.default  # looked up once for many small products
    for e, some, result in zip(owners, rows[covered].split(sizes), out[covered].split(sizes), strict=True):
        result.copy_(multiply(some, weights[e], None, "none", [], ""))


def _parts(num_rows: int) -> Iterator[int]:
    """Numbers that add up to num_rows: 1,024, other multiples of 64, and a last one that may be any from 64 to 255."""
    while num_rows >= _LONGEST + STEP:
        yield _LONGEST
        num_rows -= _LONGEST
    if num_rows >= _UNCUT and num_rows % STEP:
        size = (num_rows - STEP) // STEP * STEP
        yield size
        num_rows -= size
    yield num_rows
