"""The linear layer's product: F.linear's values and derivatives of any order, itself where something looks on."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from moe.kernels import onednn
from moe.kernels.linear import linear

Compare = Callable[[Tensor, Tensor], None]
SHAPES = [(64, 5), (2, 32, 5), (3, 64, 5), (65, 5), (0, 5)]


@pytest.fixture(autouse=True)
def everything_by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small products too, and on processors that were not measured. How many rows each product had."""
    monkeypatch.setattr(onednn, "_LEAST_WORK", 1)
    monkeypatch.setattr(onednn, "_is_measured", lambda: True)
    calls: list[int] = []
    plain = onednn.product

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(x.numel() // x.shape[-1])
        return plain(x, weight, bias)

    monkeypatch.setattr(onednn, "product", counted)
    return calls


def draw(shape: tuple[int, ...], *, bias: bool) -> list[Tensor]:
    return [torch.randn(shape), torch.randn(7, 5), *([torch.randn(7)] if bias else [])]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    shape: tuple[int, ...], bias: bool, assert_equal_to_scale: Compare, everything_by_onednn: list[int]
) -> None:
    tensors = draw(shape, bias=bias)
    upstream = torch.randn(*shape[:-1], 7)

    def run(tensors: list[Tensor], function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in tensors]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y))]

    expected = run([tensor.double() for tensor in tensors], F.linear)
    for found, reference in zip(run(tensors, linear), expected, strict=True):
        assert_equal_to_scale(found, reference)
    rows = torch.Size(shape[:-1]).numel()
    forward_and_gradient_of_x = [rows, rows] if rows and rows % onednn.STEP == 0 else []
    assert everything_by_onednn == forward_and_gradient_of_x


def test_gradients_that_are_not_needed(everything_by_onednn: list[int]) -> None:
    x, weight, bias = draw((64, 5), bias=True)
    linear(x, weight.requires_grad_(), bias).sum().backward()
    assert weight.grad is not None and x.grad is None and bias.grad is None
    assert len(everything_by_onednn) == 1  # no product for x's gradient
    linear(x.requires_grad_(), weight.detach(), None).sum().backward()
    assert x.grad is not None and len(everything_by_onednn) == 3


def test_second_derivatives(assert_equal_to_scale: Compare) -> None:
    tensors = draw((64, 5), bias=True)

    def second(tensors: list[Tensor], function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [tensor.requires_grad_() for tensor in tensors]
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(each.pow(2).sum() for each in first), leaves)

    expected = second([tensor.double() for tensor in tensors], F.linear)
    for found, reference in zip(second(tensors, linear), expected, strict=True):
        assert_equal_to_scale(found, reference)


def test_without_gradients(assert_equal_to_scale: Compare, everything_by_onednn: list[int]) -> None:
    x, weight, bias = draw((64, 5), bias=True)
    with torch.inference_mode():
        assert_equal_to_scale(linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))
    assert everything_by_onednn == [64]


class Marked(Tensor):
    """A subclass, which may mean anything by an operation."""


def _compiled(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.compile(linear, backend="eager", fullgraph=True)(x, weight)
    return result


def _dual(x: Tensor, weight: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = linear(forward_ad.make_dual(x, torch.ones_like(x)), weight)
        assert torch.equal(forward_ad.unpack_dual(y).tangent, F.linear(torch.ones_like(x), weight))
        return forward_ad.unpack_dual(y).primal


def _counted(x: Tensor, weight: Tensor) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        y = linear(x, weight)
    assert counter.get_total_flops() == 2 * 64 * 5 * 7
    return y


LOOKING_ON = {
    "torch.compile": _compiled,
    "torch.func": lambda x, weight: torch.func.vmap(linear, (0, None))(x.expand(3, 64, 5), weight)[1],
    "forward-mode derivative": _dual,
    "a counter of FLOPs": _counted,
    "a subclass": lambda x, weight: linear(x.as_subclass(Marked), weight).as_subclass(Tensor),
    "a subclass of weight": lambda x, weight: linear(x, weight.as_subclass(Marked)).as_subclass(Tensor),
    "a tracer": lambda x, weight: torch.jit.trace(linear, (x, weight), check_trace=False)(x, weight),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", LOOKING_ON.values(), ids=LOOKING_ON)
def test_what_looks_on_sees_the_plain_operation(
    call: Callable[[Tensor, Tensor], Tensor], everything_by_onednn: list[int]
) -> None:
    x, weight = draw((64, 5), bias=False)
    assert torch.equal(call(x, weight), F.linear(x, weight))
    assert everything_by_onednn == []


@pytest.mark.parametrize("shape", [(64, 5), (2, 32, 5)], ids=str)
def test_in_place_work_on_the_output_is_allowed(shape: tuple[int, ...], everything_by_onednn: list[int]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = linear(x, torch.ones(7, 5))
    y += 1
    y.sum().backward()
    assert everything_by_onednn and torch.equal(x.grad, torch.full(shape, 7.0))


@pytest.mark.parametrize(("weight", "bias"), [((7, 6), None), ((7, 5), (6,))], ids=str)
def test_what_does_not_fit_is_said_by_torch(
    weight: tuple[int, ...], bias: tuple[int] | None, everything_by_onednn: list[int]
) -> None:
    x, w, b = torch.randn(64, 5), torch.randn(weight), None if bias is None else torch.randn(bias)
    with pytest.raises(RuntimeError) as of_torch:
        F.linear(x, w, b)
    with pytest.raises(RuntimeError, match=re.escape(str(of_torch.value))):
        linear(x, w, b)
    assert everything_by_onednn == []


def test_autocast_casts_as_for_any_linear_layer(everything_by_onednn: list[int]) -> None:
    x, weight = draw((64, 5), bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert everything_by_onednn == []


def test_two_dtypes_raise_as_for_any_linear_layer() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        linear(torch.randn(64, 5), nn.Parameter(torch.randn(7, 5, dtype=torch.float64)))
