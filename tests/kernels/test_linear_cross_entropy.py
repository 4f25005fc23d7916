"""The fused head against F.cross_entropy of whole logits in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.linear_cross_entropy import linear_cross_entropy, torch_impl

Compare = Callable[[Tensor, Tensor], None]


def problem(t: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t + v)
    hidden = torch.randn(t, 6, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, 6, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(v, (t,), generator=generator)


def oracle(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> list[Tensor]:
    leaves = [tensor.double().detach().requires_grad_() for tensor in (hidden, weight)]
    losses = F.cross_entropy(leaves[0] @ leaves[1].T, targets, reduction="none")
    return [losses.detach(), *torch.autograd.grad(losses, leaves, upstream.double())]


@pytest.mark.parametrize(
    "t", [1, torch_impl.CHUNK_TOKENS, torch_impl.CHUNK_TOKENS + 3, 2 * torch_impl.CHUNK_TOKENS + 1]
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_losses_and_both_gradients(
    t: int, backend: str, dtype: torch.dtype, assert_equal_to_scale: Compare, poisoned_memory: None
) -> None:
    hidden, weight, targets = problem(t, 11, dtype)
    upstream = torch.linspace(-1, 2, t, dtype=torch.promote_types(dtype, torch.float32))
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    losses = linear_cross_entropy(*leaves, targets, backend=backend)
    gradients = torch.autograd.grad(losses, leaves, upstream)
    expected = oracle(hidden, weight, targets, upstream)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    for actual, reference in zip([losses.detach().to(dtype), *gradients], expected, strict=True):
        assert actual.dtype == dtype
        assert_equal_to_scale(actual, reference)


def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = problem(4, 9, torch.float32)
    losses = linear_cross_entropy(hidden * 1e4, weight, targets)
    torch.testing.assert_close(losses, F.cross_entropy(hidden * 1e4 @ weight.T, targets, reduction="none"))


def test_autocast_computes_logits_in_its_dtype_and_losses_in_float32() -> None:
    hidden, weight, targets = problem(5, 9, torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = linear_cross_entropy(hidden, weight, targets)
    losses.sum().backward()
    assert losses.dtype == weight.grad.dtype == torch.float32
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    assert not torch.equal(losses, exact)
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.05)


def test_bad_input_is_refused() -> None:
    hidden, weight, targets = problem(4, 9, torch.float32)
    with pytest.raises(ValueError, match=r"weight \(9, 5\)"):
        linear_cross_entropy(hidden, weight[:, :5], targets)
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy(hidden, weight, targets[:3])
    for wrong in (-1, 9):
        with pytest.raises(ValueError, match=f"{wrong}"):
            linear_cross_entropy(hidden, weight, torch.full_like(targets, wrong))
