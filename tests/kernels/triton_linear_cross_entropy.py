"""The fused head of the GPU path, in Triton's interpreter, against logits in float64. Started by test_triton.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.grouped_gemm.triton_tiles import Tile
from moe.kernels.linear_cross_entropy import linear_cross_entropy, op, triton_impl

Compare = Callable[[Tensor, Tensor], None]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and chunks at sizes that an interpreter can afford."""
    monkeypatch.setattr(triton_impl, "_tile", lambda *_: Tile(16, 16, 16, 1, 1, 1))
    monkeypatch.setattr(triton_impl, "CHUNK_TOKENS", 24)


def problem(t: int, v: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t + v)
    hidden = torch.randn(t, d, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(v, (t,), generator=generator)


def oracle(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> list[Tensor]:
    leaves = [tensor.double().detach().requires_grad_() for tensor in (hidden, weight)]
    losses = F.cross_entropy(leaves[0] @ leaves[1].T, targets, reduction="none")
    return [losses.detach(), *torch.autograd.grad(losses, leaves, upstream.double())]


@pytest.mark.parametrize(("t", "v", "d"), [(1, 1, 1), (17, 37, 19), (50, 32, 16), (3, 50, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_losses_and_both_gradients(
    t: int, v: int, d: int, dtype: torch.dtype, assert_equal_to_scale: Compare, poisoned_memory: None
) -> None:
    hidden, weight, targets = problem(t, v, d, dtype)
    upstream = torch.linspace(-1, 2, t, dtype=torch.promote_types(dtype, torch.float32))
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    losses = linear_cross_entropy(*leaves, targets, backend="triton")
    gradients = torch.autograd.grad(losses, leaves, upstream)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    for actual, reference in zip(
        [losses.detach().to(dtype), *gradients], oracle(hidden, weight, targets, upstream), strict=True
    ):
        assert actual.dtype == dtype
        if v > 1:  # of a single word the loss and all gradients are 0, and so is the scale
            assert_equal_to_scale(actual, reference)
        else:
            assert actual.abs().max() < 1e-6


def test_no_tokens() -> None:
    hidden, weight, targets = problem(0, 5, 4, torch.float32)
    weight.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, targets, backend="triton")
    assert losses.shape == (0,)
    assert not torch.autograd.grad(losses.sum(), weight)[0].any()


def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = problem(4, 40, 6, torch.float32)
    losses = linear_cross_entropy(hidden * 1e4, weight, targets, backend="triton")
    torch.testing.assert_close(losses, F.cross_entropy(hidden * 1e4 @ weight.T, targets, reduction="none"))


def test_strides_of_inputs_and_gradients(assert_equal_to_scale: Compare) -> None:
    hidden, weight, targets = problem(9, 20, 8, torch.float64)
    results = []
    for backend in ("triton", "torch"):
        leaves = [hidden.T.contiguous().T.requires_grad_(), weight.T.contiguous().T.requires_grad_()]
        losses = linear_cross_entropy(*leaves, targets, backend=backend)
        results.append([losses.detach(), *torch.autograd.grad(losses.sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert_equal_to_scale(actual, expected)


def test_a_target_that_no_tile_has_gives_nan() -> None:
    """What a GPU does instead of waiting for a check; on a CPU the check comes first."""
    hidden, weight, targets = problem(4, 9, 6, torch.float32)
    for wrong in (-1, 9):
        with pytest.raises(ValueError, match=f"{wrong}"):
            linear_cross_entropy(hidden, weight, torch.full_like(targets, wrong), backend="triton")
        targets[2] = wrong
        losses, _ = triton_impl.forward(hidden, weight, targets)
        assert losses.isnan().tolist() == [False, False, True, False]


def test_dtypes_that_differ_are_refused() -> None:
    hidden, weight, targets = problem(4, 9, 6, torch.float32)
    with pytest.raises(
        ValueError, match=r"hidden \(torch.float16\) and weight \(torch.float32\) must have the same dtype"
    ):
        linear_cross_entropy(hidden.half(), weight, targets, backend="triton")


def test_a_compiler_sees_opaque_ops() -> None:
    hidden, weight, targets = problem(9, 20, 8, torch.float32)

    def run(*leaves: Tensor) -> Tensor:
        return op._linear_cross_entropy(*leaves, targets, "triton")[0].square().sum()

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = function(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert all(map(torch.equal, *results))
