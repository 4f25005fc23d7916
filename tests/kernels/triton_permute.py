"""The sort and the moves of the GPU path, in Triton's interpreter, against the reference. Started by test_triton.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe.kernels.permute import RowOrder, op, permute, sort_by_expert, triton_impl, unpermute

E, D = 5, 19


def routing(t: int, k: int, kept_fraction: float, experts: list[int] | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t * 10 + k)
    indices = torch.rand(t, 8 if k > E else E, generator=generator).argsort(dim=1)[:, :k] % E
    if experts is not None:
        indices = torch.tensor(experts)[torch.randint(len(experts), (t, k), generator=generator)]
    return indices, torch.rand(t, k, generator=generator) < kept_fraction


CASES = {
    "all": routing(11, 2, 1.1),
    "some": routing(13, 3, 0.6),
    "none": routing(4, 2, -1.0),
    "one_hot": routing(9, 2, 0.8, [3]),
    "two_of_five": routing(9, 1, 1.1, [1, 4]),
    "no_tokens": routing(0, 2, 1.1),
    "one_token_all_experts": routing(1, 5, 1.1),
    "eight_choices": routing(7, 8, 0.9),
    "several_blocks": routing(30, 3, 0.7),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of slots, and of columns, at sizes that an interpreter can afford."""
    monkeypatch.setattr(triton_impl, "BLOCK_SLOTS", 32)
    monkeypatch.setattr(triton_impl, "CHUNK_SLOTS", 16)
    monkeypatch.setattr(triton_impl, "MOST_COLUMNS", 16)


def test_the_order_is_that_of_the_reference(case: tuple[Tensor, Tensor], poisoned_memory: None) -> None:
    check_padded(sort_by_expert(*case, E, backend="triton"), *case)


def check_padded(order: RowOrder, indices: Tensor, kept: Tensor) -> None:
    """The reference's order first, then a row for each dropped slot in the order of the slots."""
    compact = sort_by_expert(indices, kept, E, backend="reference")
    dropped = (~kept).flatten().nonzero().squeeze(1)
    tail = {
        "token_of_row": dropped // kept.shape[1],
        "slot_of_row": dropped,
        "slots": dropped,
        "row_of_slot": torch.arange(kept.numel())[int(kept.sum()) :],
    }
    for name, expected in compact._asdict().items():
        assert torch.equal(getattr(order, name), torch.cat([expected, tail.get(name, expected[:0])])), name


def test_indices_of_any_stride_and_dropped_nonsense() -> None:
    indices, kept = CASES["some"]
    strided = torch.full((13, 6), -7)
    strided[:, ::2] = torch.where(kept, indices, 10**6)  # an index that is not kept may be anything
    check_padded(sort_by_expert(strided[:, ::2], kept, E, backend="triton"), indices, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["some", "none", "one_hot", "no_tokens", "eight_choices"])
def test_there_and_back_with_every_gradient(
    name: str,
    dtype: torch.dtype,
    assert_equal_to_scale: Callable[[Tensor, Tensor], None],
    poisoned_memory: None,
) -> None:
    indices, kept = CASES[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(indices.shape[0], D, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(indices.shape, generator=generator, dtype=torch.float64).to(dtype)
    results = []
    for backend, wide in (("triton", dtype), ("reference", torch.float64)):
        leaves = [tensor.detach().to(wide).requires_grad_() for tensor in (x, weights)]
        order = sort_by_expert(indices, kept, E, backend=backend)
        rows = permute(leaves[0], order, backend=backend)
        scale = torch.arange(1.0, rows.shape[0] + 1, dtype=wide)[:, None] / 8  # rows that differ: a swap shows
        y = unpermute(rows * scale, leaves[1], order, backend=backend)
        upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).to(wide)
        gradients = [torch.zeros_like(leaf) for leaf in leaves]
        if y.requires_grad:  # the reference makes no graph where there is nothing to add up
            gradients = list(torch.autograd.grad(y, leaves, upstream))
        results.append([rows.detach()[: int(kept.sum())], y.detach(), *gradients])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        assert_equal_to_scale(actual, expected)


@pytest.mark.parametrize("name", ["some", "none", "no_tokens"])
@pytest.mark.parametrize("sort", ["triton", "torch"])
@pytest.mark.parametrize("move", ["triton", "torch", "reference"])
def test_each_backend_moves_by_the_order_of_each_other(sort: str, move: str, name: str) -> None:
    """Rows of dropped slots hold NaN on the way back, and no sum or gradient takes part of it."""
    indices, kept = CASES[name]
    results = []
    for backend in (sort, "reference"):
        order = sort_by_expert(indices, kept, E, backend=backend)
        x = torch.linspace(-1, 1, kept.shape[0] * D, dtype=torch.float64).view(-1, D).requires_grad_()
        weights = torch.linspace(1, 2, kept.numel(), dtype=torch.float64).view_as(kept).requires_grad_()
        rows = permute(x, order, backend=move)
        beyond = torch.arange(rows.shape[0])[:, None] >= order.expert_offsets[-1]
        y = unpermute(torch.where(beyond, torch.nan, rows), weights, order, backend=move)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, weights])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_strides_of_inputs_and_gradients() -> None:
    indices, kept = CASES["some"]
    order = sort_by_expert(indices, kept, E)
    results = []
    for backend in ("triton", "torch"):
        x = torch.linspace(-1, 1, 13 * D * 2, dtype=torch.float64).view(13, D * 2)[:, ::2].requires_grad_()
        weights = torch.linspace(0, 1, 39, dtype=torch.float64).view(3, 13).T.requires_grad_()
        y = unpermute(permute(x, order, backend=backend), weights, order, backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), [x, weights])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_weights_of_dropped_slots_are_not_read() -> None:
    indices, kept = CASES["some"]
    order = sort_by_expert(indices, kept, E)
    rows = torch.randn(int(kept.sum()), D)
    weights = torch.rand(indices.shape)
    poisoned = torch.where(kept, weights, torch.nan).requires_grad_()
    y = unpermute(rows, poisoned, order, backend="triton")
    assert torch.equal(y, unpermute(rows, weights, order, backend="triton"))
    (gradient,) = torch.autograd.grad(y.sum(), poisoned)
    assert not gradient[~kept].any()


def test_the_index_of_no_expert_is_refused() -> None:
    indices, kept = CASES["all"]
    with pytest.raises(ValueError, match="expert_indices run from 0 to 4, but there are experts 0 to 2"):
        sort_by_expert(indices, kept, 3, backend="triton")
    with pytest.raises(ValueError, match="expert_indices run from -1 to 0"):
        sort_by_expert(torch.tensor([[0], [-1]]), torch.ones(2, 1, dtype=torch.bool), 3, backend="triton")


@pytest.mark.parametrize("wrong", [-1, 3, 10**9])
def test_on_a_gpu_the_device_refuses_it(wrong: int) -> None:
    """The kernels read and write nothing outside their tensors on the way there."""
    indices, kept = torch.tensor([[0], [wrong], [2]]), torch.ones(3, 1, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="kept expert_indices outside the experts 0 to 2"):
        triton_impl.sort_by_expert(indices, kept, 3)
    order = triton_impl.place(indices, kept, 3, *triton_impl.count(indices, kept, 3))
    assert order.row_of_slot.amin() >= 0
    assert order.row_of_slot.amax() < 3
    assert torch.equal(order.slots, torch.arange(3))


def test_the_check_for_experts_reads_nothing_off_the_cpu() -> None:
    """A tensor without data cannot be read."""
    indices = torch.empty(3, 2, dtype=torch.int64, device="meta")
    op.look_for_experts(indices, indices.bool(), 4)
    with pytest.raises(ValueError, match="there are experts 0 to 3"):
        op.look_for_experts(torch.full((3, 2), 4), torch.ones(3, 2, dtype=torch.bool), 4)
