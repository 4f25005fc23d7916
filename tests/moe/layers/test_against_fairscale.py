"""GShardRouter against fairscale's Top2Gate with the same noise: dispatch, weights, balance loss, gradients.

test_router.py compares one shape; here are the shapes and loads in which a capacity rule can go wrong.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.layers import GShardRouter, Routing, gshard_load_balance_loss

top2gate = pytest.importorskip("fairscale.nn.moe.top2gate", reason="fairscale is the extra 'fairscale'")

TOLERANCE = 2e-6  # float32, which fairscale's softmax is fixed to; relative to the largest magnitude of the reference
D = 6
SIZES = [(2, 2), (5, 5), (8, 2), (24, 4), (33, 11), (35, 5), (64, 16)]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    error, scale = (float(tensor.detach().abs().max()) for tensor in (actual - expected, expected))
    assert error <= TOLERANCE * scale, f"error {error:.3g} at scale {scale:.3g}"


def random_numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# what the tokens want: experts by chance, the same two for nearly all, exactly the same for all
LOADS = {
    "mixed": lambda t: random_numbers(t, D, seed=1),
    "skewed": lambda t: 0.3 * random_numbers(t, D, seed=1) + random_numbers(1, D, seed=2),
    "hot": lambda t: random_numbers(1, D, seed=2).repeat(t, 1),
}
# noise from a small one, that keeps the second-best expert, to one that decides alone
NOISES = {"none": 0.0, "gumbel": 1.0, "loud": 20.0}


def both_gates(
    monkeypatch: pytest.MonkeyPatch, t: int, e: int, loudness: float
) -> tuple[GShardRouter, torch.nn.Module]:
    noise = loudness * -random_numbers(t, e, seed=3).abs().add(1e-3).log()
    monkeypatch.setattr(top2gate, "gumbel_rsample", lambda shape, device: noise)
    monkeypatch.setattr("moe.layers.gshard_router.gumbel", lambda shape, like, generator: noise)
    ours, theirs = GShardRouter(D, e, rules="fairscale"), top2gate.Top2Gate(D, e)
    with torch.no_grad():
        theirs.wg.weight.copy_(0.4 * random_numbers(e, D, seed=4))
        ours.weight.copy_(theirs.wg.weight)
    return ours, theirs


def route(ours: GShardRouter, x: Tensor) -> Routing:
    return ours(x, generator=torch.Generator())


def spread(routing: Routing, values: Tensor) -> Tensor:
    """(T, 2) values of the choices as a (T, E) matrix."""
    return torch.zeros_like(routing.router_probs, dtype=values.dtype).scatter_add(1, routing.expert_indices, values)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("t", "e"), SIZES)
def test_equals_fairscale(monkeypatch: pytest.MonkeyPatch, t: int, e: int, load: str, noise: str) -> None:
    ours, theirs = both_gates(monkeypatch, t, e, NOISES[noise])
    left, right = LOADS[load](t).requires_grad_(), LOADS[load](t).requires_grad_()
    routing = route(ours, left)
    auxiliary, combine, dispatch = theirs(right)
    assert combine.shape == (t, e, 2 * t // e)
    assert torch.equal(spread(routing, routing.kept.long()), dispatch.sum(dim=2))
    assert int(dispatch.sum(dim=0).max()) == 1  # their slots hold one token each: the sum above hides no collision
    weights, balance = spread(routing, routing.expert_weights), gshard_load_balance_loss(routing)
    assert_close(weights, combine.sum(dim=2))
    assert_close(balance, auxiliary * e**2)
    upstream = random_numbers(t, e, seed=5)
    # the balance loss counts enough that no gradient is rounding, even where every weight is 1
    actual = torch.autograd.grad((weights * upstream).sum() + balance, [left, ours.weight])
    expected = torch.autograd.grad((combine.sum(dim=2) * upstream).sum() + auxiliary * e**2, [right, theirs.wg.weight])
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


def test_the_grid_has_every_case_of_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens with both choices kept, the second dropped, the first dropped, and both; experts over, at and below C."""
    patterns, fillings = set(), set()
    for t, e in SIZES:
        for load in LOADS.values():
            ours, _ = both_gates(monkeypatch, t, e, NOISES["gumbel"])
            routing = route(ours, load(t))
            patterns |= {tuple(row) for row in routing.kept.tolist()}
            fillings |= set(torch.sign(routing.tokens_per_expert - 2 * t // e).tolist())
    assert patterns == {(True, True), (True, False), (False, True), (False, False)}
    assert fillings == {-1, 0, 1}


def test_the_served_tokens_are_theirs_slot_by_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sits in which of an expert's C slots: first choices by token, then second choices by token."""
    ours, theirs = both_gates(monkeypatch, 24, 4, NOISES["gumbel"])
    x = LOADS["skewed"](24)
    routing, dispatch = route(ours, x), theirs(x)[2]
    for expert in range(4):
        served = [
            t for k in range(2) for t in range(24) if routing.kept[t, k] and routing.expert_indices[t, k] == expert
        ]
        slots = dispatch[:, expert].long()  # (T, C)
        assert slots.argmax(dim=0)[slots.any(dim=0)].tolist() == served


def test_their_dispatch_forgets_a_weight_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their dispatch mask is weight != 0: a second choice whose probability underflows is not sent; ours is kept."""
    ours, theirs = both_gates(monkeypatch, 4, 2, 0.0)
    with torch.no_grad():
        for weight in (ours.weight, theirs.wg.weight):
            weight.copy_(torch.tensor([[200.0], [0.0]]).expand(2, D))  # exp(-200 D) is 0 in float32
    routing, dispatch = route(ours, torch.ones(4, D)), theirs(torch.ones(4, D))[2]
    assert routing.kept.all()
    assert routing.expert_weights.tolist() == [[1.0, 0.0]] * 4
    assert dispatch.sum(dim=2).tolist() == [[1, 0]] * 4


def test_no_tokens_are_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs stops at a capacity of zero, so a rank without tokens stops the others."""
    ours, theirs = both_gates(monkeypatch, 0, 4, 0.0)
    routing = route(ours, torch.zeros(0, D))
    assert routing.expert_weights.shape == (0, 2)
    assert float(gshard_load_balance_loss(routing).detach()) == 0.0
    with pytest.raises(AssertionError, match="num_classes"):
        theirs(torch.zeros(0, D))
