"""oneDNN's products beside loops in float64, in every op that uses them, and who is given them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe.kernels import onednn
from moe.kernels.expert_ffn import expert_ffn
from moe.kernels.linear_cross_entropy import linear_cross_entropy

Compare = Callable[[Tensor, Tensor], None]


@pytest.fixture
def everything_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products too, and on processors that were not measured."""
    monkeypatch.setattr(onednn, "_LEAST_WORK", 1)
    monkeypatch.setattr(onednn, "_is_measured", lambda: True)


LOADS = {
    "short": [3, 0, 70, 1, 255],
    "in parts": [256, 257, 0, 319],
    "long": [0, 1087, 1088, 2500],
    "one hot": [0, 700, 0],
    "nothing": [0, 0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_grouped_products(load: list[int], dtype: torch.dtype, assert_equal_to_scale: Compare) -> None:
    ends = torch.tensor(load).cumsum(0).tolist()
    spans = [(e, end - rows, end) for e, (rows, end) in enumerate(zip(load, ends, strict=True)) if rows]
    rows, weights = torch.randn(sum(load) + 2, 5).to(dtype), torch.randn(len(load), 7, 5).to(dtype)
    rows[sum(load) :] = torch.nan  # rows of no expert may be read, and must not count
    out = torch.full((len(rows), 7), torch.nan, dtype=dtype)
    # of the middle experts alone, as a thread that has a part of them
    part = spans[1:-1] or spans[1:] or spans
    if part:
        matrices = weights if dtype == torch.float32 else weights.mT
        onednn.grouped_products(rows, matrices.unbind(0), part, out)
    written = torch.zeros(len(rows), dtype=torch.bool)
    for e, start, end in part:
        assert_equal_to_scale(out[start:end], rows[start:end].double() @ weights[e].double().T)
        written[start:end] = True
    assert out[~written].isnan().all()


def test_windows_cover_all_rows_in_few_sizes() -> None:
    sizes: set[int] = set()
    for count in range(onednn._ROUNDED_FROM, 5_000):
        start, num_rows = 1, count + 100
        covered = []
        for first, size, begin, stop in onednn._windows(start, start + count, num_rows):
            assert 0 <= first <= begin < stop <= first + size <= num_rows
            assert size <= 1.08 * count and size <= 1024
            covered += range(begin, stop)
            sizes.add(size)
        assert covered == list(range(start, start + count))
    assert len(sizes) <= 20 + 49
    assert list(onednn._windows(2, 302, 302)) == [(0, 302, 2, 302)]  # where there are no 304 rows


def test_a_step_of_ragged_bfloat16_rows_asks_for_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    load = [100 + e for e in range(32)]
    offsets = torch.tensor([0, *load]).cumsum(0)
    rows, w_in = torch.randn(sum(load), 8).bfloat16(), torch.randn(32, 16, 8).bfloat16()
    shapes: set[tuple[int, ...]] = set()
    multiply = torch.mm

    def recorded(left: Tensor, right: Tensor, **out: Tensor) -> Tensor:
        shapes.add((*left.shape, *right.shape))
        return multiply(left, right, **out)

    monkeypatch.setattr(torch, "mm", recorded)
    with torch.no_grad():
        expert_ffn(rows, offsets, w_in, None, w_in.mT.contiguous(), None, None, activation="gelu", backend="torch")
    assert {shape[0] for shape in shapes} == {104, 112, 120, 128, 136}


@pytest.mark.usefixtures("everything_by_onednn", "poisoned_memory")
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize(("gated", "activation"), [(False, "gelu"), (True, "silu")])
def test_experts_and_every_gradient(
    load: list[int], gated: bool, activation: str, assert_equal_to_scale: Compare
) -> None:
    d, f, e = 6, 10, len(load)
    drawn = [torch.randn(sum(load), d), torch.randn(e, f, d), torch.randn(e, d, f)]
    drawn += [torch.randn(e, f), torch.randn(e, d), *([torch.randn(e, f, d)] if gated else [])]
    offsets = torch.tensor([0, *load]).cumsum(0)
    upstream = torch.randn(sum(load), d)

    def run(tensors: list[Tensor], backend: str) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in tensors]
        rows, w_in, w_out, b_in, b_out, *gate = leaves
        w_gate = gate[0] if gate else None
        y = expert_ffn(rows, offsets, w_in, w_gate, w_out, b_in, b_out, activation=activation, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y))]

    expected = run([tensor.double() for tensor in drawn], "reference")
    for found, reference in zip(run(drawn, "torch"), expected, strict=True):
        assert_equal_to_scale(found, reference)


@pytest.mark.usefixtures("everything_by_onednn", "poisoned_memory")
@pytest.mark.parametrize("num_tokens", [1, 512, 812])
def test_cross_entropy_and_both_gradients(num_tokens: int, assert_equal_to_scale: Compare) -> None:
    hidden, weight = torch.randn(num_tokens, 6), torch.randn(11, 6)
    targets = torch.randint(11, (num_tokens,))

    def run(hidden: Tensor, weight: Tensor, backend: str) -> list[Tensor]:
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        losses = linear_cross_entropy(*leaves, targets, backend=backend)
        return [losses.detach(), *torch.autograd.grad(losses.mean(), leaves)]

    expected = run(hidden.double(), weight.double(), "reference")
    for found, reference in zip(run(hidden, weight, "torch"), expected, strict=True):
        assert_equal_to_scale(found, reference)


def test_who_is_given_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_is_measured", lambda: True)
    enough = onednn._LEAST_WORK
    assert onednn.wins(torch.float32, "cpu", enough)
    assert not onednn.wins(torch.float32, "cpu", enough - 1)
    assert not onednn.wins(torch.bfloat16, "cpu", enough)
    assert not onednn.wins(torch.float64, "cpu", enough)
    assert not onednn.wins(torch.float32, "cuda", enough)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.wins(torch.float32, "cpu", enough)
    with FlopCounterMode(display=False):
        assert not onednn.wins(torch.float32, "cpu", enough)
    monkeypatch.setattr(onednn, "_is_measured", lambda: False)
    assert not onednn.wins(torch.float32, "cpu", enough)


@pytest.mark.usefixtures("everything_by_onednn")
def test_a_counter_of_flops_sees_every_product() -> None:
    rows, w_in, w_out = torch.randn(9, 5, requires_grad=True), torch.randn(2, 7, 5), torch.randn(2, 5, 7)
    with FlopCounterMode(display=False) as counter:
        expert_ffn(rows, torch.tensor([0, 4, 9]), w_in, None, w_out, None, None, activation="relu").sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 9 * 5 * 7 * 2  # two products, forward and the gradient of the rows
