"""megablocks needs a GPU to install: state dicts of its published shapes, against what it computes, token by token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.interop.megablocks import from_megablocks, to_megablocks
from moe.layers import GShardRouter, MoE, TopKRouter, load_balance_loss

D, FF, E, K, SHARED = 6, 10, 5, 2, 7
T = 13
TOLERANCE = 1e-12  # of the largest entry, float64
ROUTER, W1, V1, W2 = "router.layer.weight", "experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
KINDS = {  # layer class there, mlp_type, shared expert
    "moe": ("moe", "mlp", False),
    "moe_shared": ("moe", "mlp", True),
    "dmoe": ("dmoe", "mlp", False),
    "dmoe_glu": ("dmoe", "glu", False),
    "dmoe_glu_shared": ("dmoe", "glu", True),
}


def state(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    layout, mlp_type, shared = KINDS[kind]
    shapes = {ROUTER: (E, D)}
    if layout == "moe":
        shapes |= {W1: (E, D, FF), W2: (E, FF, D)}
    else:
        shapes |= {W1: (E * FF, D), W2: (E * FF, D)} | ({V1: (E * FF, D)} if mlp_type == "glu" else {})
    if shared:
        shapes |= {"shared_expert.up_proj.weight": (SHARED, D), "shared_expert.down_proj.weight": (D, SHARED)}
        shapes |= {"shared_expert.gate_proj.weight": (SHARED, D)} if mlp_type == "glu" else {}
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def inputs() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def what_megablocks_computes(
    weights: dict[str, Tensor], x: Tensor, top_k: int, activation: str, norm: int | None
) -> tuple[Tensor, Tensor]:
    """The output and the load balancing loss, written from its formulas: slices of rows, one token at a time."""
    act = ACTIVATIONS[activation]
    scores = (x @ weights[ROUTER].T).softmax(dim=-1)
    rows, counts = [], [0] * E
    for t, token in enumerate(x):
        chosen = sorted(range(E), key=lambda e: -float(scores[t, e].detach()))[:top_k]
        total = sum(scores[t, e].abs() ** norm for e in chosen) ** (1 / norm) if norm else 1.0
        y = torch.zeros(D, dtype=x.dtype)
        for e in chosen:
            counts[e] += 1
            if weights[W1].dim() == 3:
                hidden = act(token @ weights[W1][e])
                second = weights[W2][e]
            else:
                block = slice(e * FF, (e + 1) * FF)
                hidden = act(weights[W1][block] @ token)
                hidden = hidden * (weights[V1][block] @ token) if V1 in weights else hidden
                second = weights[W2][block]
            y = y + scores[t, e] / total * (hidden @ second)
        if "shared_expert.up_proj.weight" in weights:
            up = weights["shared_expert.up_proj.weight"] @ token
            gate = weights.get("shared_expert.gate_proj.weight")
            hidden = act(up) if gate is None else act(gate @ token) * up
            y = y + weights["shared_expert.down_proj.weight"] @ hidden
        rows.append(y)
    loss = E / (T * top_k) * torch.dot(torch.tensor(counts, dtype=x.dtype), scores.mean(dim=0))
    return torch.stack(rows), loss


def assert_near(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.detach().abs().max())
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * scale)


def theirs_of(ours: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Gradients of our parameters, by hand in megablocks' shapes."""
    layout, mlp_type, shared = KINDS[kind]
    first = ours["experts.w_gate"] if mlp_type == "glu" else ours["experts.w_in"]
    result = {ROUTER: ours["router.weight"]}
    if layout == "moe":
        result |= {W1: first.transpose(1, 2), W2: ours["experts.w_out"].transpose(1, 2)}
    else:
        result |= {W1: first.reshape(E * FF, D), W2: ours["experts.w_out"].transpose(1, 2).reshape(E * FF, D)}
        result |= {V1: ours["experts.w_in"].reshape(E * FF, D)} if mlp_type == "glu" else {}
    if shared:
        result |= {"shared_expert.up_proj.weight": ours["shared.w_in"]}
        result |= {"shared_expert.down_proj.weight": ours["shared.w_out"]}
        result |= {"shared_expert.gate_proj.weight": ours["shared.w_gate"]} if mlp_type == "glu" else {}
    return result


@pytest.mark.parametrize(("top_k", "norm"), [(1, None), (2, None), (2, 1), (5, 1)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_loss_and_every_gradient(kind: str, activation: str, top_k: int, norm: int | None) -> None:
    weights = state(kind)
    layer = from_megablocks(weights, top_k=top_k, d_ff=FF, activation=activation, normalize=norm == 1)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    x, their_x = inputs().requires_grad_(), inputs().requires_grad_()
    y, routing = layer(x)
    balance = load_balance_loss(routing)
    expected, loss = what_megablocks_computes(leaves, their_x, top_k, activation, norm)
    assert_near(y, expected)
    assert_near(balance, loss)
    (y.square().sum() + balance).backward()
    (expected.square().sum() + loss).backward()
    assert_near(x.grad, their_x.grad)
    grads = theirs_of({name: p.grad for name, p in layer.named_parameters()}, kind)
    assert set(grads) == set(leaves)
    for name, leaf in leaves.items():
        assert_near(grads[name], leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bitwise(kind: str, dtype: torch.dtype) -> None:
    weights = state(kind, dtype)
    random = torch.get_rng_state()
    layer = from_megablocks(weights, top_k=K, d_ff=FF, activation="gelu")
    again = to_megablocks(layer, layout=KINDS[kind][0])
    assert torch.equal(torch.get_rng_state(), random)  # converting draws nothing
    assert set(again) == set(weights)
    for name, tensor in weights.items():
        assert again[name].dtype == dtype
        assert torch.equal(again[name], tensor), name
    back = from_megablocks(again, top_k=K, d_ff=FF, activation="gelu").state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in layer.state_dict().items())


def test_weights_are_contiguous_both_ways() -> None:
    """megablocks' kernels ask for it, and so do safetensors files of ours."""
    for layout in ("dmoe", "moe"):
        assert all(tensor.is_contiguous() for tensor in to_megablocks(MoE(D, FF, E), layout=layout).values())
    for kind in KINDS:
        layer = from_megablocks(state(kind), top_k=K, d_ff=FF, activation="gelu")
        assert all(parameter.is_contiguous() for parameter in layer.parameters())


def test_the_two_layouts_are_one_layer() -> None:
    layer = from_megablocks(state("dmoe"), top_k=K, d_ff=FF, activation="gelu")
    other = from_megablocks(to_megablocks(layer, layout="moe"), top_k=K, d_ff=FF, activation="gelu")
    assert torch.equal(layer(inputs())[0], other(inputs())[0])


def test_the_copy_is_a_copy() -> None:
    weights = state("dmoe_glu_shared")
    layer = from_megablocks(weights, top_k=K, d_ff=FF, activation="silu")
    before = [p.clone() for p in layer.parameters()]
    for tensor in [*weights.values(), *to_megablocks(layer).values()]:
        tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def test_a_prefix_picks_one_layer_of_a_model() -> None:
    weights = {f"layers.3.ffn.{name}": tensor for name, tensor in state("dmoe").items()}
    model = weights | {"layers.3.norm.weight": torch.ones(D), "layers.4.ffn.router.layer.weight": torch.ones(E, D)}
    layer = from_megablocks(model, top_k=K, d_ff=FF, activation="gelu", prefix="layers.3.ffn.")
    again = to_megablocks(layer, prefix="layers.3.ffn.")
    assert set(again) == set(weights)
    with pytest.raises(ValueError, match=r"layers\.5\.ffn\.router\.layer\.weight and .* must be among the tensors"):
        from_megablocks(model, top_k=K, d_ff=FF, activation="gelu", prefix="layers.5.ffn.")


def test_options_reach_the_router() -> None:
    router = from_megablocks(state("dmoe"), top_k=K, d_ff=FF, activation="gelu", normalize=True, jitter=0.01).router
    assert (router.normalize, router.jitter, router.top_k, router.capacity_factor) == (True, 0.01, K, None)
    assert from_megablocks(state("dmoe"), top_k=K, d_ff=FF, activation="gelu").router.normalize is False


def test_the_tanh_gelu_is_as_near_as_the_docstring_says() -> None:
    x = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    worst = float((F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max())
    assert 4e-4 < worst < 5e-4
    assert math.isclose(worst, 4.73e-4, rel_tol=0.01)


def without(name: str, kind: str = "dmoe") -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state(kind).items() if key != name}


@pytest.mark.parametrize(
    ("weights", "messages"),
    [
        (without(ROUTER), [r"router\.layer\.weight and experts\.mlp\.w1 must be among the tensors"]),
        (without(W1), ["must be among the tensors"]),
        ({}, ["none"]),
        (without(W2), ["missing: experts.mlp.w2"]),
        (without("shared_expert.down_proj.weight", "moe_shared"), ["missing: shared_expert.down_proj.weight"]),
        (without("shared_expert.gate_proj.weight", "dmoe_glu_shared"), ["missing: shared_expert.gate_proj.weight"]),
        (without("shared_expert.up_proj.weight", "moe_shared"), ["missing: shared_expert.up_proj.weight"]),
        (state("dmoe") | {"extra": torch.ones(1)}, ["unused: extra"]),
        (state("moe") | {V1: torch.ones(E * FF, D)}, [r"unused: experts\.mlp\.v1"]),
        (
            state("dmoe") | {"experts.bias": torch.zeros(D)},
            ["unused: experts.bias", "add it to the output yourself"],
        ),
        (state("dmoe") | {W2: torch.ones(E * FF, D + 1)}, [r"w2 \(50, 7\) must be \(50, 6\)"]),
        (state("dmoe") | {ROUTER: torch.ones(E)}, [r"router\.layer\.weight \(5,\) must be"]),
        (  # one rank of five: reads as five experts of d_ff 2 unless d_ff is told
            state("dmoe") | {W1: torch.ones(FF, D), W2: torch.ones(FF, D)},
            [r"w1 \(10, 6\) must be \(50, 6\), .*w2 \(10, 6\)"],
        ),
        (
            without(W2) | {"extra": torch.ones(1), W1: torch.ones(1, 1)},
            ["missing: experts.mlp.w2; unused: extra; misshaped: experts.mlp.w1"],
        ),
    ],
)
def test_every_fault_is_listed(weights: dict[str, Tensor], messages: list[str]) -> None:
    for message in messages:
        with pytest.raises(ValueError, match=message):
            from_megablocks(weights, top_k=K, d_ff=FF, activation="gelu")


@pytest.mark.parametrize(
    ("options", "layout", "message"),
    [
        ({"bias": True}, "dmoe", "bias must be False"),
        ({"dropout": 0.1}, "dmoe", r"dropout \(0.1\)"),
        ({"capacity_factor": 1.0}, "moe", "capacity_factor"),
        ({"eval_capacity_factor": 1.0}, "moe", "capacity_factor"),
        ({"gated": True}, "moe", "gated must be False with layout='moe'"),
        ({"shared_d_ff": 3, "shared_gate": True}, "dmoe", "shared_gate"),
        ({"router": GShardRouter(D, E)}, "dmoe", "not GShardRouter"),
        ({"router": TopKRouter(D, E, scores="sigmoid")}, "dmoe", "softmax"),
        ({"router": TopKRouter(D, E, weight_scale=2.0)}, "dmoe", r"weight_scale \(2.0\)"),
        ({"router": TopKRouter(D, E, bias_balanced=True)}, "dmoe", "bias_balanced"),
        ({"router": TopKRouter(D, E, num_groups=5, top_groups=2, group_score="max")}, "dmoe", "num_groups"),
        ({}, "sparse", "dmoe, moe"),
    ],
)
def test_what_megablocks_cannot_express_is_refused(options: dict, layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_megablocks(MoE(D, FF, E, **options), layout=layout)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'gelu_new'"):
        from_megablocks(state("dmoe"), top_k=K, d_ff=FF, activation="gelu_new")
