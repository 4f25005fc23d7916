"""x Wᵀ + b for the few rows of a generation step, bound by how fast W is read.

A vector times an input-major matrix (K, N) runs along contiguous outputs; nn.Linear's (N, K) takes one dot product per
output. On one AVX-512 core, in float32, with weights that exceed the L2 cache, the first reads 20-34 GB/s and the
second 12-18, so transposed copies pay off over many steps: a (512, 256) takes 23 us instead of 41 with one row, 29
instead of 47 with two and 50 instead of 61 with eight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FEWEST_STEPS = 16  # a copy costs about what four steps save
MOST_COPIED_ROWS = 8
MOST_COPIED_BYTES = 2**31  # size of the whole model; larger models are not copied, to save memory

Product = Callable[[Tensor], Tensor]  # (rows, K) -> (rows, N)


def copies_pay(num_bytes: int, num_rows: float, num_steps: int) -> bool:
    """Whether transposed copies pay off for `num_steps` products of `num_rows` rows. num_bytes: of the whole model."""
    return num_bytes <= MOST_COPIED_BYTES and num_rows <= MOST_COPIED_ROWS and num_steps >= FEWEST_STEPS


def product(weight: Tensor, bias: Tensor | None, copied: bool) -> Product:
    """`F.linear(x, weight, bias)` as a function of x. copied: use a copy of `weight`, blind to its later changes."""
    by_input = weight.t().contiguous() if copied else weight.t()  # (K, N)
    if bias is None:
        return lambda x: torch.mm(x, by_input)
    return lambda x: torch.addmm(bias, x, by_input)


class StackedMatrices:
    """All experts' matrices (E, N, K), each as (K, N). copied: each is copied when its expert is first used."""

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
