"""The ops' derivatives of second order, by finite differences and beside their specifications."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.kernels.expert_ffn.op import expert_ffn
from moe.kernels.grouped_gemm.op import grouped_gemm
from moe.kernels.linear_cross_entropy.op import linear_cross_entropy
from moe.kernels.permute.op import permute, sort_by_expert, unpermute

OFFSETS = torch.tensor([0, 3, 3, 7])  # the second expert has no rows


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def order() -> Any:
    indices = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])
    kept = torch.tensor([[True, True], [False, False], [True, False], [True, True]])
    return sort_by_expert(indices, kept, 3)


def masked_cross_entropy(hidden: Tensor, weight: Tensor) -> Tensor:
    targets, mask = torch.tensor([1, 0, 5]), torch.tensor([True, False, True])
    return linear_cross_entropy(hidden, weight, targets, token_mask=mask) * mask


def gated(rows: Tensor, w_in: Tensor, w_gate: Tensor, w_out: Tensor, b_in: Tensor, b_out: Tensor) -> Tensor:
    return expert_ffn(rows, OFFSETS, w_in, w_gate, w_out, b_in, b_out, activation="silu")


CASES: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "permute": (lambda x: permute(x, order()), (numbers(4, 2),)),
    "unpermute": (lambda rows, weights: unpermute(rows, weights, order()), (numbers(5, 2), numbers(4, 2))),
    "grouped_gemm": (lambda rows, weight: grouped_gemm(rows, weight, OFFSETS), (numbers(7, 2), numbers(3, 4, 2))),
    "linear_cross_entropy": (masked_cross_entropy, (numbers(3, 4), numbers(6, 4))),
    "expert_ffn": (
        gated,
        (numbers(7, 2), numbers(3, 4, 2), numbers(3, 4, 2), numbers(3, 2, 4), numbers(3, 4), numbers(3, 2)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_those_of_finite_differences(name: str) -> None:
    function, inputs = CASES[name]
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", CASES)
def test_the_first_derivative_is_the_same_both_ways(name: str) -> None:
    function, inputs = CASES[name]
    fast = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    slow = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)


def test_one_tensor_in_two_places_gets_the_gradient_of_both() -> None:
    rows, weight = numbers(7, 4), numbers(3, 4, 4)
    y = expert_ffn(rows, OFFSETS, weight, None, weight, None, None, activation="gelu")
    (slow,) = torch.autograd.grad(y.sum(), weight, create_graph=True)
    y = expert_ffn(rows, OFFSETS, weight, None, weight, None, None, activation="gelu")
    torch.testing.assert_close(slow.detach(), torch.autograd.grad(y.sum(), weight)[0], rtol=1e-12, atol=1e-12)
