"""Experts cut from a dense network compute what it computed, output and gradient of the input alike."""

from __future__ import annotations

import pytest
import torch

from moe.layers import FeedForward, MoE
from moe.layers.initialization import WeightInit
from moe.layers.upcycle import upcycle

D, FF = 6, 12
DENSE = {
    "plain": {},
    "biases": {"bias": True, "activation": "relu"},
    "swiglu": {"gated": True, "bias": True, "activation": "silu"},
}


def dense(name: str, dtype: torch.dtype = torch.float64) -> FeedForward:
    made = FeedForward(D, FF, dtype=dtype, **DENSE[name])
    made.reset_parameters(seed=3, init=WeightInit(kind="fairseq"))  # whose biases are not zero
    return made


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(
    ("num_experts", "top_k", "granularity"), [(4, 2, 1), (5, 5, 1), (8, 2, 2), (12, 8, 4), (12, 12, 12), (6, 3, 3)]
)
def test_the_function_is_preserved(name: str, num_experts: int, top_k: int, granularity: int) -> None:
    network = dense(name)
    layer = upcycle(network, num_experts, top_k, granularity=granularity, seed=0)
    assert layer.experts.w_in.shape == (num_experts, FF // granularity, D)
    x = inputs(3, 7).requires_grad_()
    expected, (y, routing) = network(x), layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, upstream)
    (theirs,) = torch.autograd.grad(expected, x, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert (routing.tokens_per_expert > 0).sum() > top_k or num_experts == top_k  # tokens do choose differently


@pytest.mark.parametrize("granularity", [2, 4])
def test_slices_that_do_not_belong_together_would_be_noticed(granularity: int) -> None:
    layer = upcycle(dense("swiglu"), 8, 4, granularity=granularity, seed=0)
    with torch.no_grad():
        layer.router.weight.normal_()  # copies of one network no longer stand together
    x = inputs(20)
    assert not torch.allclose(layer(x)[0], dense("swiglu")(x), rtol=1e-3)


def test_router_gradients_are_there_once_experts_differ() -> None:
    layer = upcycle(dense("plain"), 4, 2, seed=0)
    layer(inputs(9))[0].square().sum().backward()
    assert layer.router.weight.grad.abs().max() < 1e-10  # equal experts: the choice changes nothing yet
    with torch.no_grad():
        layer.experts.w_out[1].mul_(1.1)
    layer(inputs(9))[0].square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-4


def test_what_the_network_was_carries_over() -> None:
    network = FeedForward(D, FF, dropout=0.3, dtype=torch.bfloat16).eval()
    layer = upcycle(network, 4, 2)
    assert (layer.experts.dropout, layer.experts.w_in.dtype, layer.training) == (0.3, torch.bfloat16, False)
    assert torch.equal(layer.experts.w_in[3], network.w_in)
    layer.experts.w_in.data.zero_()
    assert network.w_in.any()


def test_equal_seeds_make_equal_routers() -> None:
    weights = [
        upcycle(dense("plain"), 4, seed=seed, layer=layer).router.weight for seed, layer in [(0, 1), (0, 1), (0, 2)]
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 1), r"top_k \(1\) must be at least 2"),
        ((4, 2, 5), r"granularity \(5\) must be at least 1 and divide d_ff \(12\)"),
        ((5, 2, 2), r"num_experts \(5\) must be a multiple of granularity \(2\)"),
        ((8, 3, 2), r"top_k \(3\) must be a multiple of granularity \(2\)"),
        ((2, 4), r"top_k \(4\) must be at least 1 and at most num_experts \(2\)"),
    ],
)
def test_what_would_change_the_function_is_refused(arguments: tuple, message: str) -> None:
    num_experts, top_k, *granularity = arguments
    with pytest.raises(ValueError, match=message):
        upcycle(dense("plain"), num_experts, top_k, **({"granularity": granularity[0]} if granularity else {}))


def test_it_is_an_ordinary_layer() -> None:
    assert isinstance(upcycle(dense("plain"), 4), MoE)
