"""Gradients of gradients, as gradient penalties, Hessian-vector products and torch.func ask for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from moe.layers import GShardRouter, MoE, load_balance_loss
from moe.layers.initialization import WeightInit

D, F, E = 5, 6, 4
TOLERANCE = 1e-10  # float64, relative to the largest number of the reference

LAYERS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "swiglu": {"gated": True, "activation": "silu", "bias": True},
    "shared": {"shared_d_ff": 3, "shared_gate": True},
    "capacity": {"capacity_factor": 0.5},  # drops rows, and leaves experts without any
    "gshard": {"router": GShardRouter(D, E)},
}


def build(name: str, backend: str = "auto") -> MoE:
    layer = MoE(D, F, E, backend=backend, **LAYERS[name])
    layer.reset_parameters(seed=3, init=WeightInit("fairseq"))
    return layer.double()


def tokens() -> Tensor:
    return torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def penalty(layer: MoE) -> list[Tensor]:
    """The gradient of a gradient's square, by every parameter and the input."""
    x = tokens().requires_grad_()
    y, routing = layer(x)
    loss = y.square().sum() + load_balance_loss(routing)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return list(torch.autograd.grad(gradient.square().sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_penalty_is_that_of_the_specification(name: str) -> None:
    layer, reference = build(name), build(name, backend="reference")
    assert_equal(penalty(layer), penalty(reference))


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_it_is_what_finite_differences_give(name: str) -> None:
    layer = build(name)
    router = layer.router.weight.detach()

    def output(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        replaced = {"router.weight": router, "experts.w_in": w_in, "experts.w_out": w_out}
        y: Tensor = functional_call(layer, replaced, (x,))[0]
        return y

    inputs = [tokens(), layer.experts.w_in.detach(), layer.experts.w_out.detach()]
    assert torch.autograd.gradgradcheck(output, [each.clone().requires_grad_() for each in inputs])


def hessian(layer: MoE) -> Tensor:
    result: Tensor = torch.autograd.functional.hessian(lambda x: layer(x)[0].square().sum(), tokens())
    return result


def hessian_vector_product(layer: MoE) -> Tensor:
    x = tokens()
    result: Tensor = torch.autograd.functional.hvp(lambda x: layer(x)[0].sum(), x, torch.ones_like(x))[1]
    return result


def twice_by_func(layer: MoE) -> Tensor:
    parameters = dict(layer.named_parameters())

    def loss(x: Tensor) -> Tensor:
        y: Tensor = functional_call(layer, parameters, (x,))[0].square().sum()
        return y

    result: Tensor = torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(tokens())
    return result


@pytest.mark.parametrize("of", [hessian, hessian_vector_product, twice_by_func])
def test_every_way_to_ask_gives_the_specification_s(of: Callable[[MoE], Tensor]) -> None:
    assert_equal([of(build("gelu"))], [of(build("gelu", backend="reference"))])


@pytest.mark.parametrize("persistent", [False, True])
def test_one_derivative_by_func_is_autograd_s(persistent: bool) -> None:
    layer = build("swiglu")
    layer.experts.persistent_grad(persistent)
    parameters = dict(layer.named_parameters())
    found = torch.func.grad(lambda p: functional_call(layer, p, (tokens(),))[0].square().sum())(parameters)
    expected = torch.autograd.grad(layer(tokens())[0].square().sum(), list(parameters.values()))
    assert_equal(list(found.values()), expected)


def test_under_autocast_it_reaches_the_weights_as_they_are_stored() -> None:
    layer = build("gelu").float()
    x = tokens().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)[0]
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    reference = build("gelu", backend="reference")
    for name, expected in zip(["x", *dict(layer.named_parameters())], penalty_of_y(reference), strict=True):
        found = x.grad if name == "x" else layer.get_parameter(name).grad
        assert found is not None
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 0.1 * expected.abs().max(), name  # bfloat16 has 8 bits


def penalty_of_y(layer: MoE) -> list[Tensor]:
    x = tokens().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    return list(torch.autograd.grad(gradient.square().sum(), [x, *layer.parameters()]))


def assert_equal(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).detach().abs().max() <= TOLERANCE * max(1.0, float(other.detach().abs().max()))
