"""A layer on the meta device: shapes and FLOPs without a number, as any module of torch gives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moe.kernels.grouped_gemm import grouped_gemm
from moe.kernels.linear_cross_entropy import linear_cross_entropy
from moe.layers import ExpertChoiceRouter, GShardRouter, MoE, Router, TopKRouter, load_balance_loss, router_z_loss

D, FF, E = 16, 24, 6
ROUTERS: dict[str, Any] = {
    "softmax": lambda **f: TopKRouter(D, E, **f),
    "capacity": lambda **f: TopKRouter(D, E, capacity_factor=0.5, **f),
    "groups": lambda **f: TopKRouter(D, E, scores="sigmoid", num_groups=3, top_groups=2, bias_balanced=True, **f),
    "gshard": lambda **f: GShardRouter(D, E, **f),
    "prioritized": lambda **f: GShardRouter(D, E, batch_prioritized=True, **f),
    "expert_choice": lambda **f: ExpertChoiceRouter(D, E, **f),
}
EXPERTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "swiglu": {"gated": True, "activation": "silu"},
    "biases": {"bias": True, "shared_d_ff": 8, "shared_gate": True},
}


def build(router: str, device: str, **options: Any) -> MoE:
    made: Router = ROUTERS[router](device=device)
    return MoE(D, FF, E, router=made, device=device, **options)


def shapes(tensors: Any) -> list[tuple[torch.Size, torch.dtype] | None]:
    return [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]


def everything(layer: MoE, x: Tensor, **options: Any) -> list[Tensor | None]:
    """Output, routing and the gradients of all that is returned."""
    y, routing = layer(x, **options)
    loss = y.float().square().sum() + load_balance_loss(routing) + router_z_loss(routing)
    loss.backward()
    return [y, *routing, x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("experts", list(EXPERTS))
@pytest.mark.parametrize("router", list(ROUTERS))
def test_shapes_are_those_of_a_real_device(router: str, experts: str) -> None:
    x = torch.randn(3, 10, D)
    found = everything(build(router, "meta", **EXPERTS[experts]), x.to("meta").requires_grad_())
    assert shapes(found) == shapes(everything(build(router, "cpu", **EXPERTS[experts]), x.requires_grad_()))
    assert all(tensor.is_meta for tensor in found if tensor is not None)


@pytest.mark.parametrize("options", [{"token_mask": True}, {"empty": True}, {"evaluation": True}])
def test_shapes_with_a_mask_without_tokens_and_in_evaluation(options: dict[str, bool]) -> None:
    def run(device: str) -> list[Tensor | None]:
        layer = build("softmax", device).train("evaluation" not in options)
        x = torch.zeros(2, 0 if "empty" in options else 5, D, device=device, requires_grad=True)
        mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=device) if "token_mask" in options else None
        return everything(layer, x, token_mask=mask)

    assert shapes(run("meta")) == shapes(run("cpu"))


@pytest.mark.parametrize("router", ["softmax", "gshard"])
def test_flops_are_those_of_a_real_device(router: str) -> None:
    """They depend on how many rows there are, not on which expert has them."""

    def count(device: str) -> int:
        layer, x = build(router, device, gated=True), torch.zeros(32, D, device=device, requires_grad=True)
        layer.eval()  # nothing is dropped: T·K rows
        with FlopCounterMode(display=False) as counter:
            layer(x)[0].sum().backward()
        return counter.get_total_flops()

    assert count("meta") == count("cpu") > 0


def test_a_layer_of_hundreds_of_gigabytes_is_run_through() -> None:
    with torch.device("meta"):
        layer = MoE(4096, 14336, 512, gated=True)
        y, routing = layer(torch.empty(2, 4096, 4096))
    assert y.shape == (2, 4096, 4096) and routing.expert_indices.shape == (8192, 2)


def test_a_grouped_gemm_alone() -> None:
    rows, weight = torch.empty(10, D, device="meta", requires_grad=True), torch.empty(E, FF, D, device="meta")
    y = grouped_gemm(rows, weight, torch.empty(E + 1, dtype=torch.int64, device="meta"))
    y.sum().backward()
    assert y.shape == (10, FF) and rows.grad is not None and rows.grad.shape == rows.shape


def test_the_output_loss_of_a_model() -> None:
    hidden, weight = torch.empty(10, D, device="meta", requires_grad=True), torch.empty(50, D, device="meta")
    losses = linear_cross_entropy(hidden, weight, torch.empty(10, dtype=torch.int64, device="meta"))
    losses.sum().backward()
    assert losses.shape == (10,) and hidden.grad is not None and hidden.grad.shape == hidden.shape


def test_the_specification_says_that_it_needs_numbers() -> None:
    layer = MoE(D, FF, E, backend="reference", device="meta")
    with pytest.raises(ValueError, match=r"backend \('reference'\) of \w+ reads values, .* meta device .*'auto'"):
        layer(torch.empty(4, D, device="meta"))


def test_autocast_does_not_reach_it() -> None:
    """As an nn.Linear on the meta device, which torch's autocast does not know."""
    x = torch.empty(4, D, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Linear(D, D, device="meta")(x).dtype == build("softmax", "meta")(x)[0].dtype == torch.float32


@pytest.mark.parametrize(("of_layer", "of_x"), [("meta", "cpu"), ("cpu", "meta")])
def test_another_device_than_the_layer_is_one_error(of_layer: str, of_x: str) -> None:
    """torch multiplies by a meta weight without a word, and the error came from the experts, about dtypes."""
    with pytest.raises(
        ValueError, match=rf"x is on {of_x}, but the router's weight is on {of_layer}: move one of them"
    ):
        build("softmax", of_layer)(torch.empty(4, D, device=of_x))


def test_meta_beside_linear_then_made_real() -> None:
    model = nn.Sequential(nn.Linear(D, D, device="meta"), MoE(D, FF, E, device="meta"))
    assert model(torch.empty(4, D, device="meta"))[0].shape == (4, D)
    real = model.to_empty(device="cpu")
    for module in real:
        module.reset_parameters()
    assert real(torch.randn(4, D))[0].isfinite().all()
