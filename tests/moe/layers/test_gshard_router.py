"""Policies of the top-2 gate by what they must do; tests against fairscale and transformers hold the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.layers import GShardRouter, gshard_load_balance_loss, load_balance_loss
from moe.layers.initialization import WeightInit

T, D, E = 40, 6, 5


def router(**options: object) -> GShardRouter:
    made = GShardRouter(D, E, dtype=torch.float64, **options)
    made.reset_parameters(seed=3, init=WeightInit(std=0.6))
    return made


def inputs(t: int = T) -> Tensor:
    return torch.randn(t, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sampling_draws_seconds_by_their_probability() -> None:
    """Over many draws a second expert comes as often as its probability among the others says."""
    made = router(second_policy="sampling")
    x = inputs(1).expand(20_000, -1)
    routing = made(x, generator=seeded())
    probs = routing.router_probs[0].detach().clone()
    first = int(probs.argmax())
    assert (routing.expert_indices[:, 0] == first).all()
    probs[first] = 0.0
    shares = torch.bincount(routing.expert_indices[:, 1], minlength=E) / 20_000
    torch.testing.assert_close(shares.double(), probs / probs.sum(), atol=0.012, rtol=0)


@pytest.mark.parametrize("before", [False, True])
def test_random_takes_seconds_with_twice_their_weight(before: bool) -> None:
    made = router(second_policy="random", normalize_before_dropping=before)
    x = inputs(1).expand(20_000, -1)
    routing = made(x, generator=seeded())
    pair = routing.router_probs[0].detach().topk(2).values
    expected = 2.0 * float(pair[1] / pair.sum() if before else pair[1])
    assert 0.05 < expected < 0.95
    assert float(routing.chosen[:, 1].double().mean()) == pytest.approx(expected, abs=0.012)
    assert routing.chosen[:, 0].all()
    assert int(routing.tokens_per_expert.sum()) == int(routing.chosen.sum())


def test_draws_follow_the_generator_alone() -> None:
    for policy in ("sampling", "random"):
        made, x = router(second_policy=policy), inputs()
        first = made(x, generator=seeded())
        torch.manual_seed(123)
        again, other = made(x, generator=seeded()), made(x, generator=seeded(8))
        assert torch.equal(first.expert_indices, again.expert_indices)
        assert torch.equal(first.chosen, again.chosen)
        assert not (torch.equal(first.expert_indices, other.expert_indices) and torch.equal(first.chosen, other.chosen))
        with pytest.raises(ValueError, match="pass generator="):
            made(x)
        assert made.eval()(x).chosen.all()  # evaluation draws nothing


def test_weights_before_dropping_ignore_what_is_dropped() -> None:
    before, after = router(normalize_before_dropping=True), router()
    hot = inputs()
    hot[::2] = hot[0]
    for made in (before, after):
        routing = made(hot)
        single = routing.kept.sum(dim=1) == 1
        assert single.any()
        pair = routing.router_probs.gather(1, routing.expert_indices)
        expected = pair / pair.sum(dim=1, keepdim=True) if made is before else torch.ones_like(pair)
        torch.testing.assert_close(
            routing.expert_weights[single], (expected * routing.kept)[single], rtol=1e-12, atol=0
        )


def test_prioritised_dropping_serves_the_surest_tokens() -> None:
    hot = inputs(1) * torch.linspace(0.5, 1.5, T, dtype=torch.float64)[:, None]  # one direction, later tokens surer
    plain, prioritised = router()(hot), router(batch_prioritized=True)(hot)
    capacity = 2 * -(-T // E)
    assert plain.kept[:, 0].nonzero().flatten().tolist() == list(range(capacity))
    assert prioritised.kept[:, 0].nonzero().flatten().tolist() == list(range(T - capacity, T))


def test_evaluation_as_in_the_originals() -> None:
    hot = inputs(1).expand(T, -1)
    original = router(eval_as_original=True).eval()
    assert original(hot).kept[:, 0].sum() == T // 4  # fairseq's quarter
    assert router(eval_as_original=True, eval_capacity_fraction=0.1).eval()(hot).kept[:, 0].sum() == 4
    fairscale = router(rules="fairscale", eval_as_original=True).eval()
    with pytest.raises(ValueError, match="pass generator="):
        fairscale(hot)
    assert fairscale(hot, generator=seeded()).kept[:, 0].sum() == 2 * T // E
    assert router(rules="fairscale").eval()(hot).kept.all()


def test_presets_have_their_own_second_policy() -> None:
    assert router().second_policy == "all"
    assert router(rules="fairscale").second_policy == "sampling"
    assert router(rules="fairscale", second_policy="all").second_policy == "all"


def test_the_original_loss_counts_masked_tokens_in_its_means() -> None:
    made, mask = router(), torch.arange(T) % 4 != 0
    routing = made(inputs(), mask)
    probs, first = routing.router_probs.detach(), routing.expert_indices[:, 0]
    expected = 0.0
    for e in range(E):
        me = sum(float(probs[t, e]) for t in range(T)) / T
        ce = sum(int(mask[t] and first[t] == e) for t in range(T)) / T
        expected += me * ce
    assert float(gshard_load_balance_loss(routing).detach()) == pytest.approx(E * expected, rel=1e-12)
    without = gshard_load_balance_loss(routing, times_experts_squared=False)
    assert float(without.detach()) == pytest.approx(expected / E, rel=1e-12)
    # ours leaves masked tokens out; without a mask both are one
    assert float(load_balance_loss(routing, choices="first").detach()) != pytest.approx(E * expected, rel=1e-3)
    whole = made(inputs())
    torch.testing.assert_close(
        gshard_load_balance_loss(whole), load_balance_loss(whole, choices="first"), rtol=1e-12, atol=0
    )


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(ValueError, match="all, sampling, random"):
        router(second_policy="gumbel")
