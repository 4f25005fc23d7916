"""Choosing experts on the GPU path, in Triton's interpreter, against the reference. Started by test_triton.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.kernels.permute import triton_impl as sorting
from moe.kernels.topk_routing import (
    NonFiniteScoresError,
    keep_within_capacity,
    op,
    top_k_experts,
    triton_impl,
)
from moe.layers import MoE, TopKRouter, load_balance_loss, router_z_loss

Compare = Callable[[Tensor, Tensor], None]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens and of slots at sizes that an interpreter can afford."""
    monkeypatch.setattr(triton_impl, "BLOCK_BYTES", 256)
    monkeypatch.setattr(sorting, "BLOCK_SLOTS", 32)
    monkeypatch.setattr(sorting, "CHUNK_SLOTS", 16)


@pytest.mark.parametrize("top_k", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_best_experts_in_order(top_k: int, dtype: torch.dtype, poisoned_memory: None) -> None:
    """Rounded so that many scores are equal: of these the lower index comes first."""
    scores = (3 * torch.randn(13, 11, generator=torch.Generator().manual_seed(top_k))).round().to(dtype)
    expected = top_k_experts(scores, top_k, backend="reference")
    assert torch.equal(top_k_experts(scores, top_k, backend="triton"), expected)
    pairs = (scores[:, :, None] == scores[:, None, :]).sum() - scores.numel()
    assert pairs > scores.numel() / 2


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 1000), (5, 16)])
def test_sizes(shape: tuple[int, int]) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for top_k in {1, min(shape[1], 16)}:
        expected = top_k_experts(scores, top_k, backend="reference")
        assert torch.equal(top_k_experts(scores, top_k, backend="triton"), expected)


def test_scores_of_minus_infinity_come_last_and_none_twice() -> None:
    inf = float("inf")
    scores = torch.tensor([[-inf, 1.0, -inf, 2.0], [0.0, -inf, -inf, -inf]])
    assert top_k_experts(scores, 4, backend="triton").tolist() == [[3, 1, 0, 2], [0, 1, 2, 3]]


def test_scores_that_are_no_numbers_are_reported_unless_masked() -> None:
    scores = torch.tensor([[0.0, float("nan")], [1.0, 2.0]])
    with pytest.raises(NonFiniteScoresError, match="for 1 of 2 tokens, first for token 0"):
        top_k_experts(scores, 1, backend="triton")
    valid = torch.tensor([False, True])
    assert top_k_experts(scores, 1, valid=valid, backend="triton").tolist() == [[1], [1]]


@pytest.mark.parametrize("t", [0, 1, 9, 40])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("capacity", [0, 1, 4])
def test_capacity_agrees_with_the_token_by_token_rule(t: int, k: int, capacity: int, poisoned_memory: None) -> None:
    generator = torch.Generator().manual_seed(t + k)
    indices = torch.randint(5, (t, k), generator=generator)
    valid = torch.rand(t, k, generator=generator) < 0.8
    fast, slow = (
        keep_within_capacity(indices, valid, 5, capacity, backend=backend) for backend in ("triton", "reference")
    )
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("t", "e", "top_k", "normalize", "masked"),
    [
        (9, 6, 2, True, True),
        (5, 20, 8, True, False),
        (7, 5, 1, False, True),
        (6, 16, 3, False, False),
        (0, 4, 2, True, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_router_and_its_gradient(
    scores: str,
    t: int,
    e: int,
    top_k: int,
    normalize: bool,
    masked: bool,
    dtype: torch.dtype,
    assert_equal_to_scale: Compare,
    poisoned_memory: None,
) -> None:
    generator = torch.Generator().manual_seed(t + e)
    logits = torch.randn(t, e, generator=generator, dtype=torch.float64)
    valid = torch.rand(t, generator=generator) < 0.7 if masked else None
    upstream = torch.randn(t, e, generator=generator, dtype=torch.float64)
    results = []
    for backend, wide in (("triton", dtype), ("reference", torch.float64)):
        leaf = logits.to(wide).requires_grad_()
        routing = op.top_k_routing(
            leaf, top_k, scores=scores, normalize=normalize, weight_scale=2.7, valid=valid, backend=backend
        )
        combined = (routing.probs * upstream.to(wide)).sum() + (routing.expert_weights * upstream[:, :top_k]).sum()
        results.append((routing, torch.autograd.grad(combined, leaf)[0]))
    (fast, fast_grad), (slow, slow_grad) = results
    assert torch.equal(fast.expert_indices, slow.expert_indices)
    assert torch.equal(fast.tokens_per_expert, slow.tokens_per_expert)
    for actual, expected in ((fast.probs, slow.probs), (fast.expert_weights, slow.expert_weights)):
        assert_equal_to_scale(actual.detach(), expected.detach())
    assert_equal_to_scale(fast_grad, slow_grad)


def test_a_gradient_of_one_output_alone() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    for name in ("probs", "expert_weights"):
        gradients = []
        for backend in ("triton", "torch"):
            leaf = logits.clone().requires_grad_()
            output = getattr(op.top_k_routing(leaf, 2, backend=backend), name)
            gradients.append(torch.autograd.grad(output[:, 0].sum(), leaf)[0])
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("smallest_sum", [None, 1e-12, 1e-20])
def test_weights_too_small_to_normalise(smallest_sum: float | None) -> None:
    """Sigmoid scores below the clamp, or above it: divided as torch does, forward and backward."""
    gradients = []
    for backend in ("triton", "torch"):
        leaf = torch.full((2, 4), -40.0, dtype=torch.float64).requires_grad_()
        routing = op.top_k_routing(leaf, 2, scores="sigmoid", smallest_sum=smallest_sum, backend=backend)
        weights = routing.expert_weights
        assert bool((weights < 0.49).all()) == (smallest_sum != 1e-20)
        gradients.append(torch.cat([weights.detach(), *torch.autograd.grad(weights[:, 0].sum(), leaf)], dim=1))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-30)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scores \('tanh'\) must be one of"):
        op.top_k_routing(torch.zeros(2, 3), 1, scores="tanh")
    with pytest.raises(ValueError, match=r"top_k \(4\) must be between 1 and the E"):
        op.top_k_routing(torch.zeros(2, 3), 4, backend="triton")


def test_a_compiler_sees_opaque_ops() -> None:
    logits = torch.randn(5, 6)
    valid = torch.tensor([True, False, True, True, True])

    def run(leaf: Tensor) -> tuple[Tensor, Tensor]:
        routing = op._top_k_routing(leaf, valid, 2, True, True, 1.0, 1e-7)
        kept = op._keep_within_capacity(routing[1], valid[:, None].expand(5, 2), 6, torch.tensor(1), "triton")
        return (routing[0].square().sum() + (routing[2] * kept).square().sum()), op._top_k_experts(
            leaf, 3, valid, "triton"
        )

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        value, chosen = function(leaf)
        results.append([value.detach(), chosen, *torch.autograd.grad(value, leaf)])
    assert all(map(torch.equal, *results))


def test_the_composition_is_a_loop_over_tokens() -> None:
    """What the other backends run, against softmax and division written out here."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, -1.0]], dtype=torch.float64)
    routing = op.top_k_routing(logits, 2, weight_scale=0.1, valid=torch.tensor([True, False]), backend="torch")
    e = logits.exp()
    torch.testing.assert_close(routing.probs, e / e.sum(dim=1, keepdim=True), rtol=1e-12, atol=0)
    assert routing.expert_indices.tolist() == [[1, 2], [0, 1]]
    share = float(e[0, 1] / (e[0, 1] + e[0, 2]))
    expected = torch.tensor([[0.1 * share, 0.1 * (1 - share)], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(routing.expert_weights, expected, rtol=1e-12, atol=0)
    assert routing.tokens_per_expert.tolist() == [0, 1, 1]


ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "top1": {"top_k": 1},
    "all_experts": {"top_k": 5},
    "unnormalised": {"normalize": False, "weight_scale": 0.5},
    "sigmoid": {"scores": "sigmoid", "weight_scale": 2.5},
    "capacity": {"capacity_factor": 0.6},
    "sigmoid_capacity": {"scores": "sigmoid", "capacity_factor": 0.5, "weight_scale": 2.5},
    "unnormalised_capacity": {"normalize": False, "capacity_factor": 0.5},
    "groups": {"num_groups": 5, "top_groups": 3, "group_score": "max"},
    "bias": {"bias_balanced": True},
}
D = 6


def router_of(name: str, backend: str, dtype: torch.dtype) -> TopKRouter:
    router = TopKRouter(D, 5, **{"top_k": 2, **ROUTERS[name]}, backend=backend, dtype=dtype)
    with torch.no_grad():
        # small integers: several experts of a token have equal logits, exactly
        router.weight.copy_(torch.randint(-1, 2, (5, D), generator=torch.Generator().manual_seed(0)))
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.tensor([0.0, 0.3, -0.2, 0.0, 0.1]))
    return router


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each start of the fused router."""
    calls: list[int] = []
    plain = triton_impl.route
    monkeypatch.setattr(triton_impl, "route", lambda *args: calls.append(1) or plain(*args))
    return calls


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_the_routers_routing_is_that_of_the_other_backends(
    name: str,
    dtype: torch.dtype,
    masked: bool,
    fused: list[int],
    assert_equal_to_scale: Compare,
    poisoned_memory: None,
) -> None:
    """Every field, ties included, and the gradients of a loss that logits, probabilities and weights take part in."""
    x = torch.randint(-2, 3, (13, D), generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.arange(13) % 4 != 1 if masked else None
    upstream = torch.linspace(-1, 2, 13 * 5, dtype=dtype).view(13, 5)
    results = []
    for backend in ("triton", "torch", "reference"):
        router, leaf = router_of(name, backend, dtype), x.clone().requires_grad_()
        routing = router(leaf, mask)
        weighted = (routing.expert_weights * upstream[:, : router.top_k]).sum()
        loss = weighted + (routing.router_probs * upstream).sum() + load_balance_loss(routing) + router_z_loss(routing)
        results.append((routing, torch.autograd.grad(loss, [leaf, router.weight])))
    assert len(fused) == (name not in ("groups", "bias"))
    routing, gradients = results[0]
    assert (routing.router_logits.sort().values.diff() == 0).any()
    assert routing.kept.all() == (not masked and "capacity" not in name)
    for other, other_gradients in results[1:]:
        for field in ("expert_indices", "chosen", "kept", "tokens_per_expert", "router_logits", "token_mask"):
            a, b = getattr(routing, field), getattr(other, field)
            assert a is b is None or torch.equal(a, b), field
        for field in ("router_probs", "expert_weights"):
            assert_equal_to_scale(getattr(routing, field).detach(), getattr(other, field).detach())
        for actual, expected in zip(gradients, other_gradients, strict=True):
            assert_equal_to_scale(actual, expected)


def test_a_subclass_that_weighs_in_its_own_way_keeps_it(fused: list[int]) -> None:
    class Halved(TopKRouter):
        def weights(self, probs: Tensor, expert_indices: Tensor, kept: Tensor) -> Tensor:
            return 0.5 * super().weights(probs, expert_indices, kept)

    x = torch.randn(7, D)
    halved, plain = Halved(D, 5, backend="triton"), TopKRouter(D, 5, backend="triton")
    halved.load_state_dict(plain.state_dict())
    torch.testing.assert_close(2.0 * halved(x).expert_weights, plain(x).expert_weights)
    assert len(fused) == 1


def test_ranks_that_may_not_stop_choose_from_what_is_not_finite(fused: list[int]) -> None:
    """Without `check_scores` no rank may leave the others waiting; on a CPU the fused op would, so it is not used."""
    router = TopKRouter(D, 5, backend="triton")
    x = torch.randn(3, D).index_fill(0, torch.tensor([1]), torch.nan)
    with pytest.raises(NonFiniteScoresError):
        router(x)
    router.check_scores = False
    routing = router(x)
    assert len(fused) == 1
    assert routing.router_probs[1].isnan().all()
    assert routing.expert_indices[1].tolist() == [0, 1]


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.6}, {"gated": True, "bias": True}], ids=str)
@pytest.mark.parametrize("other", ["torch", "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_whole_layer_is_that_of_the_other_backends(
    other: str, masked: bool, options: dict[str, Any], assert_equal_to_scale: Compare, poisoned_memory: None
) -> None:
    mask = torch.arange(11) % 4 != 1 if masked else None
    results = []
    for backend in ("triton", other):
        layer = MoE(D, 7, 5, backend=backend, dtype=torch.float64, **options)
        layer.reset_parameters(seed=3)
        x = torch.randn(11, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
        y, routing = layer(x, token_mask=mask)
        loss = y.square().sum() + load_balance_loss(routing) + router_z_loss(routing)
        results.append([y.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])])
    for actual, expected in zip(*results, strict=True):
        assert expected.any()
        assert_equal_to_scale(actual, expected)


@pytest.mark.parametrize("frozen", ["w_in", "w_gate", "w_out", "b_in", "x", "x w_in w_gate w_out b_in b_out"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_frozen_experts_change_no_other_gradient(frozen: str, dropout: float, poisoned_memory: None) -> None:
    """To the bit, with the router's fused op and experts in one op or, under dropout, in several."""
    results = []
    for names in ((), frozen.split()):
        layer = MoE(D, 7, 5, gated=True, bias=True, dropout=dropout, capacity_factor=0.7, backend="triton")
        layer.reset_parameters(seed=3)
        x = torch.randn(11, D, generator=torch.Generator().manual_seed(2)).requires_grad_("x" not in names)
        for name, parameter in layer.experts.named_parameters():
            parameter.requires_grad_(name not in names)
        torch.manual_seed(0)
        layer(x)[0].square().sum().backward()
        results.append({"x": x.grad, "router": layer.router.weight.grad})
        results[-1] |= {name: parameter.grad for name, parameter in layer.experts.named_parameters()}
    whole, part = results
    for name, gradient in part.items():
        assert (gradient is None) == (name in frozen.split())
        assert gradient is None or torch.equal(gradient, whole[name])


def test_the_layer_compiles_whole_and_knows_its_number_of_rows() -> None:
    """T·K rows: nothing in the graph depends on data, so no size has to be found out."""
    layer = MoE(D, 7, 5, capacity_factor=0.7, backend="triton")
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    x = torch.randn(11, D)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend=backend)(x)[0], layer(x)[0])
    sizes = [
        node.meta["example_value"][0].shape
        for node in graphs[0].graph.nodes
        if "sort_slots_by_expert" in str(node.target)
    ]
    assert sizes == [(22,)]
