from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe.layers import TopKRouter, load_balance_loss, router_z_loss, routing_statistics
from moe.layers.initialization import WeightInit
from moe.layers.router_losses import merge_statistics
from moe.layers.routing import Routing, count_assignments, valid_choices

T, D, E, K = 12, 6, 5, 2


def routing_of(
    logits: Tensor, indices: Tensor, mask: Tensor | None = None, sequence_ids: Tensor | None = None
) -> Routing:
    kept = valid_choices(indices, mask)
    probs = logits.softmax(dim=1)
    weights = probs.gather(1, indices)
    counts = count_assignments(indices, kept, logits.shape[1])
    return Routing(logits, probs, indices, weights, kept, kept, mask, sequence_ids, counts)


def random_routing(masked: bool, t: int = T, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(t, E, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.rand(t, generator=generator) < 0.7 if masked else None
    ids = torch.arange(t) // 4
    return routing_of(logits, logits.detach().topk(K, dim=1).indices, mask, ids)


def slow_balance(routing: Routing, choices: str, tokens: list[int]) -> float:
    """E Σ mean_prob f over the listed tokens, one at a time."""
    valid = [t for t in tokens if routing.token_mask is None or routing.token_mask[t]]
    k = 1 if choices == "first" else K
    total = 0.0
    for e in range(E):
        prob = sum(float(routing.router_probs[t, e].detach()) for t in valid) / len(valid)
        share = sum(int(routing.expert_indices[t, i]) == e for t in valid for i in range(k)) / (k * len(valid))
        total += E * prob * share
    return total


@pytest.mark.parametrize("choices", ["all", "first"])
@pytest.mark.parametrize("masked", [False, True])
def test_load_balance_equals_a_loop(choices: str, masked: bool) -> None:
    routing = random_routing(masked)
    expected = slow_balance(routing, choices, list(range(T)))
    assert float(load_balance_loss(routing, choices=choices).detach()) == pytest.approx(expected, rel=1e-12)


def test_scores_that_all_underflow_make_no_nan() -> None:
    """Sigmoid scores may all be zero in float32 (Megatron-LM#1545)."""
    routing = random_routing(False)
    routing = routing._replace(router_probs=torch.zeros(T, E, requires_grad=True))
    loss = load_balance_loss(routing)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert routing.router_probs.grad.isfinite().all()


def test_drops_are_counted_among_what_was_chosen() -> None:
    """A second choice that a policy left out is no drop, a masked token neither."""
    routing = random_routing(False)
    chosen = torch.ones(T, K, dtype=torch.bool)
    chosen[:3, 1] = False  # left out
    chosen[5] = False  # masked
    kept = chosen.clone()
    kept[7:10, 1] = False  # dropped
    told = routing_statistics(routing._replace(chosen=chosen, kept=kept))
    assert told.chosen_per_choice.tolist() == [T - 1, T - 4]
    assert told.dropped_per_choice.tolist() == pytest.approx([0.0, 3 / (T - 4)])
    assert float(told.dropped_fraction) == pytest.approx(3 / (2 * T - 5))
    merged = merge_statistics([told, routing_statistics(random_routing(False, t=5))])
    assert float(merged.dropped_fraction) == pytest.approx(3 / (2 * T - 5 + 10))


@pytest.mark.parametrize("choices", ["all", "first"])
@pytest.mark.parametrize("masked", [False, True])
def test_sequences_are_balanced_one_by_one(choices: str, masked: bool) -> None:
    routing = random_routing(masked, seed=3)
    sequences = [list(range(start, start + 4)) for start in range(0, T, 4)]
    sizes = [sum(routing.token_mask is None or bool(routing.token_mask[t]) for t in s) for s in sequences]
    assert all(sizes)
    expected = sum(n * slow_balance(routing, choices, s) for n, s in zip(sizes, sequences, strict=True)) / sum(sizes)
    actual = load_balance_loss(routing, choices=choices, scope="sequence")
    assert float(actual.detach()) == pytest.approx(expected, rel=1e-12)
    assert expected != pytest.approx(slow_balance(routing, choices, list(range(T))), rel=1e-6)


@pytest.mark.parametrize("e", [2, 7, 512])
@pytest.mark.parametrize("k", [1, 2])
def test_balance_is_one_and_collapse_is_e(e: int, k: int) -> None:
    uniform = torch.zeros(e * 3, e)
    spread = (torch.arange(e * 3)[:, None] + torch.arange(k)) % e
    for scope in ("local", "sequence"):
        routing = routing_of(uniform, spread, sequence_ids=torch.zeros(e * 3, dtype=torch.int64))
        assert float(load_balance_loss(routing, scope=scope)) == pytest.approx(1.0, rel=1e-6)
    collapsed = routing_of(torch.zeros(9, e).index_fill(1, torch.tensor([1]), 1e4), torch.ones(9, 1).long())
    assert float(load_balance_loss(collapsed)) == pytest.approx(e, rel=1e-6)


def test_the_gradient_moves_probability_off_the_busy_expert() -> None:
    logits = torch.zeros(8, 4, requires_grad=True)
    loss = load_balance_loss(routing_of(logits, torch.zeros(8, 1).long()))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1:] < 0).all()


def test_drops_do_not_change_the_balance_loss() -> None:
    routing = random_routing(False)
    dropped = routing._replace(kept=torch.zeros_like(routing.kept), expert_weights=torch.zeros(T, K))
    assert torch.equal(load_balance_loss(dropped), load_balance_loss(routing))


def test_z_loss_is_the_mean_of_squared_log_sums() -> None:
    routing = random_routing(True)
    values = [
        math.log(sum(math.exp(v) for v in row)) ** 2
        for row, valid in zip(routing.router_logits.tolist(), routing.token_mask.tolist(), strict=True)
        if valid
    ]
    assert float(router_z_loss(routing).detach()) == pytest.approx(sum(values) / len(values), rel=1e-12)


def test_masked_tokens_may_hold_anything() -> None:
    routing = random_routing(True)
    poisoned = torch.where(routing.token_mask[:, None], routing.router_logits.detach(), torch.nan)
    other = routing_of(poisoned, routing.expert_indices, routing.token_mask, routing.sequence_ids)
    for loss in (load_balance_loss, router_z_loss):
        torch.testing.assert_close(loss(other), loss(routing).detach(), rtol=1e-12, atol=0)
    statistics = routing_statistics(other)
    assert statistics.entropy.isfinite()


def test_all_masked_is_zero() -> None:
    routing = routing_of(torch.randn(3, E), torch.zeros(3, K).long(), torch.zeros(3, dtype=torch.bool))
    assert float(load_balance_loss(routing)) == 0.0
    assert float(router_z_loss(routing)) == 0.0


def test_statistics_of_a_known_routing() -> None:
    logits = torch.zeros(4, 3)
    indices = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]])
    routing = routing_of(logits, indices)
    routing = routing._replace(kept=torch.tensor([[True, True], [True, False], [True, False], [False, False]]))
    statistics = routing_statistics(routing)
    assert statistics.tokens_per_expert.tolist() == [4, 4, 0]
    assert float(statistics.load_max_over_mean) == pytest.approx(1.5)
    assert float(statistics.load_cv) == pytest.approx(math.sqrt(2) / 2)
    assert float(statistics.entropy) == pytest.approx(math.log(3))
    assert statistics.dropped_per_choice.tolist() == pytest.approx([0.25, 0.75])
    assert float(statistics.dropped_fraction) == pytest.approx(0.5)
    assert int(statistics.dead_experts) == 1
    assert int(statistics.num_tokens) == 4


def test_merged_statistics_are_those_of_the_whole() -> None:
    router = TopKRouter(D, E, K, capacity_factor=0.5)
    router.reset_parameters(seed=0, init=WeightInit(std=1.0))
    x, mask = torch.randn(T, D), torch.rand(T) < 0.8
    parts = [router(x[:5], mask[:5]), router(x[5:], mask[5:])]
    whole = Routing(
        *(torch.cat(fields) if isinstance(fields[0], Tensor) else None for fields in zip(*parts, strict=True))
    )._replace(tokens_per_expert=parts[0].tokens_per_expert + parts[1].tokens_per_expert)
    merged = merge_statistics([routing_statistics(part) for part in parts])
    for name, expected in routing_statistics(whole)._asdict().items():
        torch.testing.assert_close(getattr(merged, name), expected, rtol=1e-6, atol=1e-7, msg=name)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"choices \('second'\)"):
        load_balance_loss(random_routing(False), choices="second")
    with pytest.raises(ValueError, match=r"scope \('world'\)"):
        load_balance_loss(random_routing(False), scope="world")
