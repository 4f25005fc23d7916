"""The product of each row with its expert's matrix, portable path: output, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.kernels.grouped_gemm import grouped_gemm


def problem() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(5, 4), torch.randn(2, 3, 4), torch.tensor([0, 2, 5])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("load", [[2, 0, 3], [0, 0, 0], [0, 6, 0], [1, 1, 1]], ids=str)
def test_output_and_gradients(load: list[int], backend: str) -> None:
    """Against one product per row, in float64."""
    offsets = torch.tensor([0, *load]).cumsum(0)
    experts = torch.repeat_interleave(torch.arange(3), torch.tensor(load))
    rows, weight = torch.randn(sum(load), 4, dtype=torch.float64), torch.randn(3, 3, 4, dtype=torch.float64)
    results = []
    for own in (True, False):
        leaves = [rows.clone().requires_grad_(), weight.clone().requires_grad_()]
        if own:
            y = grouped_gemm(*leaves, offsets, backend=backend)
        else:
            y = torch.einsum("rk,rnk->rn", leaves[0], leaves[1][experts])
        results.append([y.detach(), *torch.autograd.grad(y.pow(2).sum() + 0 * leaves[0].sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (3, 3, 4))]
    offsets = torch.tensor([0, 2, 2, 5])
    assert torch.autograd.gradcheck(lambda rows, weight: grouped_gemm(rows, weight, offsets), leaves)


def test_gradients_of_stride_zero() -> None:
    rows, weight, offsets = problem()
    weight.requires_grad_()
    grouped_gemm(rows, weight, offsets).sum().backward()
    torch.testing.assert_close(weight.grad[1], rows[2:].sum(dim=0).expand(3, 4))


def test_a_compiler_sees_one_op() -> None:
    rows, weight, offsets = problem()
    weight.requires_grad_()
    compiled = torch.compile(lambda r, w: grouped_gemm(r, w, offsets), fullgraph=True, backend="aot_eager")
    y = compiled(rows, weight)
    torch.testing.assert_close(y, grouped_gemm(rows, weight, offsets))
    y.sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_bad_input_is_refused() -> None:
    rows, weight, offsets = problem()
    with pytest.raises(ValueError, match=r"rows \(5, 3\) must be \(R, K\) and weight \(2, 3, 4\)"):
        grouped_gemm(rows[:, :3], weight, offsets)
    with pytest.raises(ValueError, match=r"expert_offsets \(2,\) must be \(E\+1,\)"):
        grouped_gemm(rows, weight, offsets[:2])
    with pytest.raises(ValueError, match=r"from 0 to the number of rows \(5\), not from 0 to 4"):
        grouped_gemm(rows, weight, torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="must not descend, but the rows of expert 0 run from 0 to -2"):
        grouped_gemm(rows, weight, torch.tensor([0, -2, 5]))
    with pytest.raises(
        ValueError, match=r"rows \(torch.float64\) and weight \(torch.float32\) must have the same dtype"
    ):
        grouped_gemm(rows.double(), weight, offsets)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", ["rows", "weight"])
def test_the_product_of_a_gradient_that_nobody_needs_is_left_out(
    frozen: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, weight, offsets = problem()
    leaves = {"rows": rows, "weight": weight}
    products: list[int] = []  # one for each expert
    plain = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: products.append(1) or plain(*args, **kwargs))

    def run(names: tuple[str, ...]) -> tuple[int, dict[str, Tensor | None]]:
        own = {name: tensor.clone().requires_grad_(name in names) for name, tensor in leaves.items()}
        function = torch.compile(grouped_gemm, fullgraph=True, backend="aot_eager") if compiled else grouped_gemm
        y = function(own["rows"], own["weight"], offsets, backend="torch")
        products.clear()
        y.square().sum().backward()
        return len(products), {name: tensor.grad for name, tensor in own.items()}

    trained = ({"rows", "weight"} - {frozen}).pop()
    count, gradients = run((trained,))
    all_count, all_gradients = run(("rows", "weight"))
    assert (count, all_count) == (2, 4)
    assert gradients[frozen] is None
    assert torch.equal(gradients[trained], all_gradients[trained])
