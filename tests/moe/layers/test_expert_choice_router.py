from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.kernels.topk_routing import NonFiniteScoresError
from moe.layers import ExpertChoiceRouter, MoE, load_balance_loss, routing_statistics
from moe.layers.initialization import WeightInit

D, FF, E = 6, 8, 4


def router(factor: float = 2.0) -> ExpertChoiceRouter:
    made = ExpertChoiceRouter(D, E, capacity_factor=factor, dtype=torch.float64)
    made.reset_parameters(seed=1, init=WeightInit(std=0.8))
    return made


def inputs(t: int) -> Tensor:
    return torch.randn(t, D, generator=torch.Generator().manual_seed(t), dtype=torch.float64)


@pytest.mark.parametrize("t", [0, 1, 2, 7, 13, 40])
@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0, 9.0])
@pytest.mark.parametrize("masked", [False, True])
def test_each_expert_takes_its_best_tokens(t: int, factor: float, masked: bool) -> None:
    mask = torch.arange(t) % 3 != 1 if masked else None
    made, x = router(factor), inputs(t)
    routing = made(x, mask)
    valid = [i for i in range(t) if mask is None or mask[i]]
    capacity = -(-int(factor * 10) * len(valid) // (10 * E))
    for e in range(E):
        best = sorted(valid, key=lambda i, e=e: (-float(routing.router_probs[i, e].detach()), i))[:capacity]
        assert sorted(best) == routing.kept[:, e].nonzero().flatten().tolist()
    assert routing.tokens_per_expert.tolist() == [min(capacity, len(valid))] * E
    torch.testing.assert_close(
        routing.expert_weights, torch.where(routing.kept, routing.router_probs, 0.0), rtol=0, atol=0
    )


def test_the_layer_adds_up_who_chose_a_token() -> None:
    layer = MoE(D, FF, E, router=router(1.5), dtype=torch.float64)
    x = inputs(9).requires_grad_()
    y, routing = layer(x)
    expected = torch.zeros_like(x)
    for t, e in routing.kept.nonzero().tolist():
        w_in, w_out = layer.experts.w_in[e], layer.experts.w_out[e]
        row = w_out @ torch.nn.functional.gelu(w_in @ x[t])
        weighted = torch.softmax(layer.router.weight @ x[t], 0)[e] * row
        expected = expected.index_add(0, torch.tensor([t]), weighted[None])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-14)
    leaves = [x, *layer.parameters()]
    upstream = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, upstream, retain_graph=True),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


def test_load_is_even_by_construction() -> None:
    routing = router(2.0)(inputs(40))
    told = routing_statistics(routing)
    assert (float(told.load_max_over_mean), float(told.dropped_fraction), int(told.dead_experts)) == (1.0, 0.0, 0)
    assert float(load_balance_loss(routing).detach()) == pytest.approx(1.0, rel=1e-12)
    torch.testing.assert_close(
        load_balance_loss(routing._replace(sequence_ids=torch.zeros(40, dtype=torch.int64)), scope="sequence"),
        load_balance_loss(routing),
        rtol=1e-12,
        atol=0,
    )


def test_it_looks_at_the_future() -> None:
    """What the docstring warns of: a later token changes what happens to an earlier one."""
    made, x = router(0.5), inputs(16)
    before = made(x).kept[0].clone()
    seen = []
    for scale in (-3.0, 3.0, 10.0):
        changed = x.clone()
        changed[1:] = scale * x[0]
        seen.append(torch.equal(made(changed).kept[0], before))
    assert not all(seen)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"capacity_factor \(0\) must be above 0"):
        ExpertChoiceRouter(D, E, capacity_factor=0)
    x = inputs(5)
    x[3, 0] = torch.nan
    with pytest.raises(NonFiniteScoresError, match="1 of 5 tokens, first for token 3"):
        router()(x)
    assert not router()(x, torch.arange(5) != 3).kept[3].any()
