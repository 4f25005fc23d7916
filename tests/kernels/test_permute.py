"""The fast reordering against the slot-by-slot reference: order, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe.kernels.permute import permute, sort_by_expert, unpermute

E, D = 5, 3


def routing(t: int, k: int, kept_fraction: float, experts: list[int] | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t * 10 + k)
    indices = torch.rand(t, E, generator=generator).argsort(dim=1)[:, :k]
    if experts is not None:
        indices = torch.tensor(experts)[torch.randint(len(experts), (t, k), generator=generator)]
    return indices, torch.rand(t, k, generator=generator) < kept_fraction


CASES = {
    "all": routing(7, 2, 1.1),
    "some": routing(7, 3, 0.6),
    "none": routing(4, 2, -1.0),
    "one_hot": routing(6, 2, 0.8, [3]),
    "two_of_five": routing(9, 1, 1.1, [1, 4]),
    "no_tokens": routing(0, 2, 1.1),
    "one_token_all_experts": routing(1, 5, 1.1),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    return request.param


def test_the_order_is_that_of_the_reference(case: tuple[Tensor, Tensor], poisoned_memory: None) -> None:
    fast, slow = (sort_by_expert(*case, E, backend=backend) for backend in ("torch", "reference"))
    for name, expected in slow._asdict().items():
        assert torch.equal(getattr(fast, name), expected), name


def test_rows_are_sorted_by_expert_then_token_then_choice() -> None:
    indices, kept = CASES["some"]
    order = sort_by_expert(indices, kept, E)
    k = indices.shape[1]
    keys = [(int(indices.flatten()[slot]), slot // k, slot % k) for slot in order.slot_of_row.tolist()]
    assert keys == sorted(keys)
    assert len(keys) == int(kept.sum())
    counts = torch.bincount(indices[kept], minlength=E)
    assert torch.equal(order.expert_offsets.diff(), counts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_with_every_gradient(
    case: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    assert_equal_to_scale: Callable[[Tensor, Tensor], None],
    poisoned_memory: None,
) -> None:
    indices, kept = case
    t, k = indices.shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(t, D, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(t, k, generator=generator, dtype=torch.float64).to(dtype)
    results = []
    for backend, wide in (("torch", dtype), ("reference", torch.float64)):
        leaves = [tensor.detach().to(wide).requires_grad_() for tensor in (x, weights)]
        order = sort_by_expert(indices, kept, E, backend=backend)
        rows = permute(leaves[0], order, backend=backend)
        scale = torch.arange(1.0, rows.shape[0] + 1, dtype=wide)[:, None]  # rows that differ, so that a swap shows
        y = unpermute(rows * scale, leaves[1], order, backend=backend)
        upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).to(wide)
        # the reference makes no graph where there is nothing to add up
        gradients = [torch.zeros_like(leaf) for leaf in leaves]
        if y.requires_grad:
            gradients = torch.autograd.grad(y, leaves, upstream)
        results.append([rows.detach(), y.detach(), *gradients])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        assert_equal_to_scale(actual, expected)


def test_weights_of_dropped_slots_are_not_read() -> None:
    indices, kept = CASES["some"]
    order = sort_by_expert(indices, kept, E)
    rows = torch.randn(int(kept.sum()), D)
    weights = torch.rand(indices.shape)
    poisoned = torch.where(kept, weights, torch.nan).requires_grad_()
    y = unpermute(rows, poisoned, order)
    assert torch.equal(y, unpermute(rows, weights, order))
    (gradient,) = torch.autograd.grad(y.sum(), poisoned)
    assert not gradient[~kept].any()


def test_the_sum_repeats_bit_for_bit() -> None:
    indices, kept = routing(200, 4, 1.1)
    order = sort_by_expert(indices, kept, E)
    rows, weights = torch.randn(800, D), torch.rand(200, 4)
    first = unpermute(rows, weights, order)
    assert all(torch.equal(unpermute(rows, weights, order), first) for _ in range(5))


def test_in_place_work_on_the_sums_is_allowed() -> None:
    indices, kept = CASES["all"]
    rows = torch.randn(indices.numel(), D, requires_grad=True)
    y = unpermute(rows, torch.ones(indices.shape), sort_by_expert(indices, kept, E))
    y += 1  # as F.dropout(inplace=True) and a residual do
    y.sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))


def test_bad_input_is_refused() -> None:
    indices, kept = CASES["all"]
    order = sort_by_expert(indices, kept, E)
    with pytest.raises(ValueError, match="experts 0 to 2"):
        sort_by_expert(indices, kept, 3)
    with pytest.raises(ValueError, match="run from -1 to"):
        sort_by_expert(indices - 1, kept, E)
    with pytest.raises(ValueError, match="must agree"):
        sort_by_expert(indices, kept[:, :1], E)
    with pytest.raises(ValueError, match=r"x \(6, 3\) must be \(T, D\) with the T of the order \(7\)"):
        permute(torch.zeros(6, 3), order)
    with pytest.raises(ValueError, match=r"rows \(13, 3\) must be \(R, D\)"):
        unpermute(torch.zeros(13, 3), torch.zeros(7, 2), order)
    with pytest.raises(ValueError, match=r"weights \(6, 2\) must be \(T, K\)"):
        unpermute(torch.zeros(14, 3), torch.zeros(6, 2), order)
