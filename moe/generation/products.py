"""x Wᵀ + b for the few rows of a generation step, bound by how fast W is read.

A vector times a matrix whose rows are inputs (K, N) runs along contiguous outputs; nn.Linear's (N, K) is one dot
product for each output. On one AVX-512 core, in float32, with weights beyond the second-level cache, the first reads
20-34 GB/s and the second 12-18, so a generation of many steps pays for transposed copies: a (512, 256) takes 23 us
instead of 41 with one row, 29 instead of 47 with two and 50 instead of 61 with eight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FEWEST_STEPS = 16  # a copy costs about as much as four steps save
MOST_COPIED_ROWS = 8
MOST_COPIED_BYTES = 2**31  # of the model: larger ones keep their memory

Product = Callable[[Tensor], Tensor]  # (rows, K) -> (rows, N)


def copies_pay(num_bytes: int, num_rows: float, num_steps: int) -> bool:
    """Whether `num_steps` products of `num_rows` rows are worth transposed copies. num_bytes: of the whole model."""
    return num_bytes <= MOST_COPIED_BYTES and num_rows <= MOST_COPIED_ROWS and num_steps >= FEWEST_STEPS


def product(weight: Tensor, bias: Tensor | None, copied: bool) -> Product:
    """`F.linear(x, weight, bias)` of rows. copied: with a copy of `weight`, whose later changes it does not see."""
    by_input = weight.t().contiguous() if copied else weight.t()  # (K, N)
    if bias is None:
        return lambda x: torch.mm(x, by_input)
    return lambda x: torch.addmm(bias, x, by_input)


class StackedMatrices:
    """The matrices of all experts (E, N, K) as (K, N) each, copied when an expert is first used where copies pay."""

    def __init__(self, weight: Tensor, copied: bool) -> None:
        self._views = weight.transpose(1, 2).unbind(0)
        self._found: dict[int, Tensor] = {}
        self._copied = copied

    def __getitem__(self, expert: int) -> Tensor:
        if not self._copied:
            return self._views[expert]
        found = self._found.get(expert)
        if found is None:
            found = self._found[expert] = self._views[expert].contiguous()
        return found
