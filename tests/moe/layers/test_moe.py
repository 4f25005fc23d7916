"""The whole layer against a double loop over tokens and choices in float64: output and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe.layers import (
    ExpertChoiceRouter,
    FeedForward,
    GShardRouter,
    MoE,
    Routing,
    TopKRouter,
    load_balance_loss,
    router_z_loss,
)
from moe.layers.initialization import WeightInit

D, FF, E = 6, 9, 5
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
LAYERS = {
    "plain": {},
    "one": {"top_k": 1},
    "all": {"top_k": 5},
    "biases": {"bias": True, "activation": "relu"},
    "swiglu": {"gated": True, "activation": "silu"},
    "capacity": {"capacity_factor": 0.5},
    "shared": {"shared_d_ff": 4, "shared_gate": True, "gated": True, "bias": True},
    "gshard": {"router": "gshard"},
}


def build(name: str, dtype: torch.dtype = torch.float64, backend: str = "auto") -> MoE:
    options = dict(LAYERS[name])
    if options.get("router") == "gshard":
        options["router"] = GShardRouter(D, E, dtype=dtype)
    layer = MoE(D, FF, E, dtype=dtype, backend=backend, **options)
    layer.reset_parameters(seed=1, layer=0, init=WeightInit(std=0.7))
    with torch.no_grad():
        for parameter in layer.parameters():  # biases start at zero, which would hide them
            if not parameter.any():
                parameter.normal_(generator=torch.Generator().manual_seed(5))
    return layer


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def one_network(
    x: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    hidden = w_in @ x + (0 if b_in is None else b_in)
    hidden = act(hidden) if w_gate is None else act(w_gate @ x) * hidden
    return w_out @ hidden + (0 if b_out is None else b_out)


def double_loop(layer: MoE, x: Tensor, mask: Tensor | None) -> Tensor:
    """Token by token, choice by choice, with the decisions of the layer's own router recomputed from its weight."""
    flat = x.reshape(-1, D)
    decisions = layer.router(flat.detach(), None if mask is None else mask.flatten())
    act = ACTIVATIONS[layer.experts.activation]
    rows = []
    for t, token in enumerate(flat):
        probs = torch.softmax(layer.router.weight @ token, 0)
        kept = [int(e) for e, k in zip(decisions.expert_indices[t], decisions.kept[t], strict=True) if k]
        total = sum(probs[e] for e in kept) if getattr(layer.router, "normalize", True) else 1.0
        y = torch.zeros(D, dtype=x.dtype)
        experts = layer.experts
        for e in kept:
            weights = (experts.w_in, experts.w_gate, experts.w_out, experts.b_in, experts.b_out)
            y = y + probs[e] / total * one_network(token, *(None if w is None else w[e] for w in weights), act)
        if layer.shared is not None and (mask is None or mask.flatten()[t]):
            s = layer.shared
            shared = one_network(token, s.w_in, s.w_gate, s.w_out, s.b_in, s.b_out, act)
            y = y + torch.sigmoid(layer.shared_gate[0] @ token) * shared
        rows.append(y)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_every_gradient_equal_the_double_loop(name: str, masked: bool, backend: str) -> None:
    layer = build(name, backend=backend)
    x = inputs(3, 5).requires_grad_()
    mask = torch.arange(15).view(3, 5) % 4 != 1 if masked else None
    y, routing = layer(x, token_mask=mask)
    expected = double_loop(layer, x, mask)
    upstream = torch.randn(y.shape, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    actual_gradients = torch.autograd.grad(y, leaves, upstream, retain_graph=True)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    for actual, gradient in zip(actual_gradients, expected_gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-11)
    if masked:
        assert not y[~mask].any()
    if name == "capacity":
        assert not routing.kept.all()


MUTATIONS = {
    "zeros": lambda layer: layer.experts.w_out.zero_(),
    "swapped_experts": lambda layer: layer.experts.w_in.copy_(layer.experts.w_in.roll(1, 0)),
    "transposed_router": lambda layer: layer.router.weight.copy_(layer.router.weight.flip(0)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_notices_a_broken_layer(mutation: str) -> None:
    layer = build("plain")
    expected = double_loop(layer, inputs(3, 5), None)
    with torch.no_grad():
        MUTATIONS[mutation](layer)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(layer(inputs(3, 5))[0], expected, rtol=1e-10, atol=1e-12)


def test_equal_experts_are_one_dense_network() -> None:
    layer, dense = build("swiglu"), FeedForward(D, FF, gated=True, activation="silu", dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.copy_(getattr(layer.experts, name)[2])
            getattr(layer.experts, name).copy_(parameter.expand_as(getattr(layer.experts, name)))
    torch.testing.assert_close(layer(inputs(7))[0], dense(inputs(7)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3), (2, 2, 3), (0,), (2, 0)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = build("plain")
    x = inputs(*shape)
    y, routing = layer(x)
    assert y.shape == x.shape
    assert routing.expert_indices.shape == (x.numel() // D, 2)
    flat, _ = layer(x.reshape(-1, D))
    assert torch.equal(y.reshape(-1, D), flat)
    y.sum().backward()


def test_sequences_are_named() -> None:
    layer = build("plain")
    assert layer(inputs(2, 3))[1].sequence_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert layer(inputs(2, 2, 1))[1].sequence_ids.tolist() == [0, 1, 2, 3]
    assert layer(inputs(4))[1].sequence_ids is None


def test_a_token_alone_equals_the_token_in_company() -> None:
    layer = build("capacity").eval()
    together, _ = layer(inputs(4, 5))
    alone, _ = layer(inputs(4, 5)[2, 3])
    torch.testing.assert_close(together[2, 3], alone, rtol=1e-12, atol=1e-12)


def test_replay_repeats_the_layer() -> None:
    layer = build("capacity")
    x, mask = inputs(3, 5), torch.arange(15).view(3, 5) < 13
    y, recorded = layer(x, token_mask=mask)
    again, routing = layer(x, routing=recorded)
    assert torch.equal(again, y)
    assert torch.equal(routing.kept, recorded.kept)
    moved, _ = layer(x + 0.1, routing=recorded)
    assert not torch.equal(moved, y)


def test_nothing_is_kept_on_the_module() -> None:
    layer = build("shared")
    before = {name for name, _ in vars(layer).items()}
    y, routing = layer(inputs(3, 5))
    assert {name for name, _ in vars(layer).items()} == before
    copied = copy.deepcopy(layer)  # a kept graph could not be copied
    assert torch.equal(copied(inputs(3, 5))[0], y)
    loss = y.square().mean() + 0.01 * load_balance_loss(routing) + 1e-3 * router_z_loss(routing)
    loss.backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_under_recompute_the_losses_are_counted_once() -> None:
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for recompute in (False, True):
        layer, x = build("capacity"), inputs(3, 5).requires_grad_()
        y, routing = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        (y.square().mean() + load_balance_loss(routing) + router_z_loss(routing)).backward()
        gradients.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_follows_float64(dtype: torch.dtype) -> None:
    exact, low = build("swiglu"), build("swiglu").to(dtype)
    x = inputs(4, 5)
    with torch.no_grad():
        expected, recorded = exact(x)
        y, routing = low(x.to(dtype), routing=recorded)  # a near tie would send a token elsewhere
    assert y.dtype == dtype
    assert routing.router_probs.dtype == torch.float32
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-5}[dtype]
    assert float((y.double() - expected).abs().max()) < tolerance * float(expected.abs().max())


def test_autocast_returns_its_dtype_and_full_precision_gradients() -> None:
    layer = build("plain", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(inputs(4).float())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_seeded_weights_do_not_depend_on_the_order_of_building() -> None:
    first = build("shared")
    torch.manual_seed(99)
    second = MoE(D, FF, E, dtype=torch.float64, **LAYERS["shared"])
    second.reset_parameters(seed=1, layer=0, init=WeightInit(std=0.7))
    assert torch.equal(first.experts.w_in, second.experts.w_in)
    assert torch.equal(first.router.weight, second.router.weight)
    second.reset_parameters(seed=1, layer=1, init=WeightInit(std=0.7))
    assert not torch.equal(first.experts.w_in, second.experts.w_in)


def test_it_is_built_on_the_meta_device() -> None:
    layer = MoE(1024, 4096, 512, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == 512 * (2 * 1024 * 4096 + 1024)


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_states_its_parameters_and_flops(name: str) -> None:
    layer = build(name, backend="reference")
    assert layer.total_params == sum(parameter.numel() for parameter in layer.parameters())
    one_expert = sum(parameter[0].numel() for parameter in layer.experts.parameters())
    assert layer.total_params - layer.active_params == (E - layer.router.top_k) * one_expert
    layer.eval()  # dropless
    with FlopCounterMode(display=False) as counter:
        layer(inputs(7))
    assert layer.flops(7) == counter.get_total_flops()


def test_a_dense_network_states_them_too() -> None:
    dense = FeedForward(D, FF, gated=True, bias=True)
    assert dense.total_params == dense.active_params == sum(parameter.numel() for parameter in dense.parameters())
    assert dense.flops(3) == 3 * 2 * 3 * D * FF


@pytest.mark.parametrize("recorded_weights", [False, True])
def test_a_replay_groups_by_the_sequences_of_its_own_input(recorded_weights: bool) -> None:
    """Recorded as two sequences of 6 and replayed as three of 4: a loss within sequences takes the three."""
    layer = MoE(D, FF, E, dtype=torch.float64)
    x = inputs(2, 6)
    recording, again = layer(x)[1], x.view(3, 4, D)
    replayed = layer(again, routing=recording, recorded_weights=recorded_weights)[1]
    expected = layer(again)[1]
    assert torch.equal(replayed.sequence_ids, expected.sequence_ids)
    losses = [load_balance_loss(routing, scope="sequence") for routing in (replayed, expected, recording)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[1], losses[2])
    assert layer(x.view(12, D), routing=recording)[1].sequence_ids is None


def recorded(num_tokens: int) -> Routing:
    return TopKRouter(D, E)(torch.zeros(num_tokens, D))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MoE(D, FF, 4, 5), r"top_k \(5\).*num_experts \(4\)"),
        (lambda: MoE(D, FF, 4.0), r"num_experts \(4\.0\) must be an integer"),
        (lambda: MoE(D, FF, 4, activation="swish"), "gelu, relu, silu"),
        (lambda: MoE(D, FF, 4, shared_gate=True), "shared_gate needs shared_d_ff"),
        (lambda: MoE(D, FF, 4, router=TopKRouter(D, 5)), r"num_experts \(4\) must equal the router's \(5\)"),
        (lambda: MoE(D, FF, 4, router=TopKRouter(7, 4)), r"d_model \(6\) must equal the router's \(7\)"),
        (lambda: MoE(D, FF, 4, 3, router=TopKRouter(D, 4)), r"top_k \(3\) must equal the router's \(2\)"),
        (lambda: MoE(D, FF, 4, router=TopKRouter(D, 4), capacity_factor=1.0), "build `router` with it instead"),
        (lambda: MoE(D, FF, E)(torch.zeros(3, 7)), r"the last dimension of x \(3, 7\) must be d_model \(6\)"),
        (lambda: MoE(D, FF, E)(torch.zeros(3, D), token_mask=torch.ones(3)), "must be bool with the shape of x"),
        (lambda: MoE(D, FF, E)(torch.zeros(3, D), routing=recorded(4)), "has 4 tokens, but x has 3"),
        (
            lambda: MoE(D, FF, E)(torch.zeros(3, D), routing=TopKRouter(D, E, 1)(torch.zeros(3, D))),
            "has 1 choices per token, but this layer's router has top_k=2",
        ),
        (
            lambda: MoE(D, FF, E)(torch.zeros(3, D), routing=TopKRouter(D, E + 1)(torch.zeros(3, D))),
            f"has {E + 1} experts, but this layer has {E}",
        ),
        (
            lambda: MoE(D, FF, E)(torch.zeros(3, D), routing=recorded(3), token_mask=torch.ones(3).bool()),
            "must equal the mask of the recorded routing",
        ),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("router", ["topk", "gshard", "expert_choice"])
def test_padding_may_hold_anything(router: str) -> None:
    """NaN in masked tokens reaches no output and no gradient."""
    made = {
        "topk": lambda: None,
        "gshard": lambda: GShardRouter(D, E, dtype=torch.float64),
        "expert_choice": lambda: ExpertChoiceRouter(D, E, dtype=torch.float64),
    }[router]()
    layer = MoE(D, FF, E, router=made, shared_d_ff=4, dtype=torch.float64)
    mask = torch.arange(15).view(3, 5) % 4 != 1
    results = []
    for padding in (torch.nan, torch.inf, 0.0):
        x = torch.where(mask[..., None], inputs(3, 5), padding).requires_grad_()
        layer.zero_grad()
        y, routing = layer(x, token_mask=mask)
        again, _ = layer(x, routing=routing)
        (y.sum() + again.sum() + load_balance_loss(routing) + router_z_loss(routing)).backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for result in results[:2]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[2], strict=True))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, D + 1), r"the last dimension of x \(3, 7\) must be d_model \(6\)"),
        (torch.zeros(3, D, dtype=torch.int64), "x must hold floating-point numbers, not torch.int64"),
        (torch.tensor(1.0), r"the last dimension of x \(\)"),
    ],
)
def test_inputs_that_are_no_activations_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoE(D, FF, E)(x)
