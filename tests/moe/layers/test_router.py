"""Routers against slow loops, fairscale's gate and hand-made cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.kernels.topk_routing import NonFiniteScoresError
from moe.layers import GShardRouter, TopKRouter
from moe.layers.capacity import ExactFactor, expert_capacity
from moe.layers.initialization import WeightInit

T, D, E = 11, 6, 5


def inputs(t: int = T, seed: int = 0) -> Tensor:
    return torch.randn(t, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def router(kind: type = TopKRouter, *args: object, num_experts: int = E, **options: object) -> TopKRouter:
    made = kind(D, num_experts, *args, dtype=torch.float64, **options)
    made.reset_parameters(seed=3, init=WeightInit(std=1.0))
    return made


def slow_routing(made: TopKRouter, x: Tensor, capacity: int | None, mask: list[bool]) -> dict[str, list]:
    """One token after the other, first choices before second."""
    probs = [torch.softmax(made.weight.detach() @ row, 0).tolist() for row in x]
    chosen = [sorted(range(len(p)), key=lambda e: -p[e])[: made.top_k] for p in probs]
    taken = [0] * made.num_experts
    kept = [[False] * made.top_k for _ in probs]
    for k in range(made.top_k):
        for t, experts in enumerate(chosen):
            if mask[t]:
                kept[t][k] = capacity is None or taken[experts[k]] < capacity
                taken[experts[k]] += 1
    weights = []
    for t, experts in enumerate(chosen):
        values = [probs[t][e] * kept[t][k] for k, e in enumerate(experts)]
        total = sum(values) if made.normalize else 1.0
        weights.append([value / total if total else 0.0 for value in values])
    return {"indices": chosen, "kept": kept, "weights": weights, "counts": taken}


@pytest.mark.parametrize("top_k", [1, 2, 4, 5])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("factor", [None, 0.5, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_top_k_equals_a_loop_over_tokens(top_k: int, normalize: bool, factor: float | None, masked: bool) -> None:
    made = router(TopKRouter, top_k, normalize=normalize, capacity_factor=factor)
    mask = [t % 3 != 1 for t in range(T)] if masked else [True] * T
    routing = made(inputs(), torch.tensor(mask) if masked else None)
    capacity = None if factor is None else expert_capacity(sum(mask), E, top_k, ExactFactor.of(factor))
    expected = slow_routing(made, inputs(), capacity, mask)
    assert routing.expert_indices.tolist() == expected["indices"]
    assert routing.kept.tolist() == expected["kept"]
    assert routing.tokens_per_expert.tolist() == expected["counts"]
    torch.testing.assert_close(
        routing.expert_weights, torch.tensor(expected["weights"], dtype=torch.float64), rtol=1e-12, atol=1e-15
    )
    if factor == 0.5:
        assert not routing.kept.all()


def test_one_chosen_weight_keeps_its_gradient() -> None:
    """Divided by itself it would be 1 whatever the router says."""
    made = router(TopKRouter, 1)
    weights = made(inputs()).expert_weights
    assert not torch.equal(weights, torch.ones_like(weights))
    (gradient,) = torch.autograd.grad(weights.sum(), made.weight)
    assert gradient.abs().max() > 1e-3


def test_evaluation_drops_nothing_unless_told() -> None:
    made = router(TopKRouter, 2, capacity_factor=0.3)
    assert not made.train()(inputs()).kept.all()
    assert made.eval()(inputs()).kept.all()
    told = router(TopKRouter, 2, eval_capacity_factor=0.3)
    assert told.train()(inputs()).kept.all()
    assert not told.eval()(inputs()).kept.all()


def test_evaluation_does_not_depend_on_batch_mates() -> None:
    made = router(TopKRouter, 2, capacity_factor=0.3).eval()
    together, alone = made(inputs()), made(inputs()[:1])
    assert torch.equal(together.expert_indices[:1], alone.expert_indices)
    torch.testing.assert_close(together.expert_weights[:1], alone.expert_weights, rtol=1e-12, atol=0)


def test_logits_are_in_float32_whatever_autocast_says() -> None:
    made = TopKRouter(D, E)
    x = torch.randn(T, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = made(x)
        low = made(x.bfloat16())
    assert routing.router_logits.dtype == low.router_logits.dtype == torch.float32
    assert torch.equal(routing.router_logits, x @ made.weight.T)
    assert TopKRouter(D, E, router_dtype=torch.float64)(x).router_probs.dtype == torch.float64


def test_gshard_fairseq_capacity_is_twice_the_rounded_up_mean() -> None:
    """T=11, E=5: 2*ceil(11/5) = 6."""
    made = router(GShardRouter)
    hot = inputs()
    hot[:] = hot[0]  # every token wants the same two experts
    routing = made(hot)
    assert routing.kept.sum(dim=0).tolist() == [6, 6]
    assert routing.kept.all(dim=1)[:6].all()
    assert not routing.kept[6:].any()
    assert not routing.expert_weights[6:].any()


def test_gshard_survivors_of_a_drop_have_weight_one() -> None:
    made = router(GShardRouter, num_experts=3)
    for seed in range(30):
        routing = made(inputs(12, seed=seed))
        single = routing.kept.sum(dim=1) == 1
        if single.any():
            assert torch.equal(routing.expert_weights.sum(dim=1)[single], torch.ones(int(single.sum())).double())
            return
    pytest.fail("no token with one dropped choice in 30 draws")


def test_gshard_evaluation_capacity() -> None:
    hot = inputs()
    hot[:] = hot[0]
    assert router(GShardRouter).eval()(hot).kept.all()
    fraction = router(GShardRouter, eval_capacity_fraction=0.25).eval()
    assert fraction(hot).kept.sum(dim=0).tolist() == [3, 3]  # ceil(0.25 * 11)


def fairscale_gate() -> type:
    return pytest.importorskip("fairscale.nn.moe.top2gate", reason="fairscale is the extra 'fairscale'")


@pytest.mark.parametrize("seed", range(4))
def test_gshard_equals_fairscale(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Choices, weights, drops and the balance loss of fairscale's Top2Gate, which is given the same noise."""
    from moe.layers import gshard_load_balance_loss
    from moe.layers.noise import gumbel

    top2gate = fairscale_gate()
    t, e = 24, 4
    noise = gumbel((t, e), torch.zeros(1), torch.Generator().manual_seed(seed))
    monkeypatch.setattr(top2gate, "gumbel_rsample", lambda shape, device: noise)
    made = GShardRouter(D, e, rules="fairscale")
    made.reset_parameters(seed=seed, init=WeightInit(std=1.0))
    gate = top2gate.Top2Gate(D, e)
    with torch.no_grad():
        gate.wg.weight.copy_(made.weight)
    x = torch.randn(t, D, generator=torch.Generator().manual_seed(seed)) + 0.5
    auxiliary, combine, _ = gate(x)
    routing = made(x, generator=torch.Generator().manual_seed(seed))
    actual = torch.zeros(t, e).scatter_add(1, routing.expert_indices, routing.expert_weights)
    torch.testing.assert_close(actual, combine.sum(dim=2), rtol=1e-6, atol=1e-7)
    assert not routing.kept.all()
    balance = gshard_load_balance_loss(routing, times_experts_squared=False)
    torch.testing.assert_close(balance, auxiliary, rtol=1e-6, atol=0)
    (ours,) = torch.autograd.grad(actual.square().sum() + balance, made.weight)
    (theirs,) = torch.autograd.grad(combine.square().sum() + auxiliary, gate.wg.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def test_replay_follows_the_recorded_choices_with_new_weights() -> None:
    made = router(TopKRouter, 2, capacity_factor=0.6)
    recorded = made(inputs())
    again = made.replay(inputs(), recorded)
    for name, value in recorded._asdict().items():
        assert value is None or torch.equal(getattr(again, name), value), name
    other = made.replay(inputs(seed=9), recorded)
    assert torch.equal(other.expert_indices, recorded.expert_indices)
    assert torch.equal(other.kept, recorded.kept)
    assert not torch.equal(other.expert_weights, recorded.expert_weights)
    sums = other.expert_weights.sum(dim=1)
    torch.testing.assert_close(sums, other.kept.any(dim=1).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TopKRouter(D, 4, 5), r"top_k \(5\) must be at least 1 and at most num_experts \(4\)"),
        (lambda: TopKRouter(D, 4, 0), r"top_k \(0\)"),
        (lambda: TopKRouter(D, 2.5), r"num_experts \(2\.5\) must be an integer"),
        (lambda: TopKRouter(D, True), "must be an integer"),
        (lambda: TopKRouter(D, 4, capacity_factor=0.0), r"capacity_factor \(0\.0\) must be above 0"),
        (lambda: GShardRouter(D, 1), r"num_experts \(1\) must be at least 2"),
        (lambda: GShardRouter(D, 4, rules="tutel"), "fairseq, fairscale"),
        (lambda: GShardRouter(D, 4, eval_capacity_fraction=2.0), "at most 1"),
        (
            lambda: GShardRouter(D, 4, rules="fairscale", second_policy="all")(torch.zeros(6, D)),
            r"\(6\) must be divisible by num_experts",
        ),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_sigmoid_scores_are_weighed_each_by_itself() -> None:
    made = router(TopKRouter, 2, scores="sigmoid", weight_scale=2.5)
    routing = made(inputs())
    scores = torch.sigmoid(inputs() @ made.weight.T)
    best = scores.topk(2, dim=1)
    assert torch.equal(routing.expert_indices, best.indices)
    torch.testing.assert_close(routing.router_probs, scores, rtol=1e-12, atol=0)
    expected = 2.5 * best.values / best.values.sum(dim=1, keepdim=True)
    torch.testing.assert_close(routing.expert_weights, expected, rtol=1e-12, atol=0)
    plain = router(TopKRouter, 2, scores="sigmoid", normalize=False)(inputs())
    torch.testing.assert_close(plain.expert_weights, best.values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_choices_stay_within_the_best_groups(group_score: str, scores: str) -> None:
    made = router(TopKRouter, 3, num_experts=12, num_groups=4, top_groups=2, group_score=group_score, scores=scores)
    routing = made(inputs(40))
    limited = 0
    for probs, indices in zip(routing.router_probs.tolist(), routing.expert_indices.tolist(), strict=True):
        groups = [sorted(probs[3 * g : 3 * g + 3], reverse=True) for g in range(4)]
        worth = [g[0] if group_score == "max" else g[0] + g[1] for g in groups]
        allowed = sorted(range(4), key=lambda g: -worth[g])[:2]
        expected = sorted((e for e in range(12) if e // 3 in allowed), key=lambda e: -probs[e])[:3]
        assert indices == expected
        limited += expected != sorted(range(12), key=lambda e: -probs[e])[:3]
    assert limited > 3


def test_the_bias_decides_the_choice_and_not_the_weight() -> None:
    made, plain = (router(TopKRouter, 2, scores="sigmoid", bias_balanced=b) for b in (True, False))
    with torch.no_grad():
        made.expert_bias[3] = 5.0
    routing = made(inputs())
    assert (routing.expert_indices == 3).any(dim=1).all()
    torch.testing.assert_close(routing.router_probs, plain(inputs()).router_probs, rtol=0, atol=0)
    chosen = routing.router_probs.gather(1, routing.expert_indices)
    torch.testing.assert_close(routing.expert_weights, chosen / chosen.sum(dim=1, keepdim=True), rtol=1e-12, atol=0)


def test_bias_updates_move_towards_balance() -> None:
    made = router(TopKRouter, 2, bias_balanced=True)
    halves = [made(inputs()[:6]), made(inputs()[6:])]
    load = made(inputs()).tokens_per_expert
    made.update_bias(halves, rate=0.25)  # two micro-batches count as one step
    mean = 2 * T / E
    expected = [0.25 if n < mean else -0.25 if n > mean else 0.0 for n in load.tolist()]
    assert made.expert_bias.tolist() == expected
    made = router(TopKRouter, 2, scores="sigmoid", bias_balanced=True)
    before = made(inputs(500)).tokens_per_expert
    for _ in range(200):
        made.update_bias([made(inputs(500))], rate=0.003)
    after = made(inputs(500)).tokens_per_expert
    assert after.max() - after.min() < 0.2 * (before.max() - before.min())


def test_the_bias_keeps_its_precision_and_is_part_of_the_state() -> None:
    made = TopKRouter(D, E, bias_balanced=True)
    made.expert_bias.add_(0.2501)
    low = TopKRouter(D, E, bias_balanced=True).bfloat16()
    assert (low.weight.dtype, low.expert_bias.dtype) == (torch.bfloat16, torch.float32)
    low.load_state_dict(made.state_dict())
    assert torch.equal(low.half().expert_bias, made.expert_bias)
    low.reset_parameters(seed=0)
    assert not low.expert_bias.any()
    assert "expert_bias" not in TopKRouter(D, E).state_dict()


def test_jitter_is_in_training_from_the_generator_and_bounded() -> None:
    made = router(TopKRouter, 2, jitter=0.1)
    x = inputs()
    exact = x @ made.weight.T
    noisy = made(x, generator=torch.Generator().manual_seed(1)).router_logits
    assert not torch.allclose(noisy, exact)
    bound = 0.1 * (x.abs() @ made.weight.abs().T)
    assert ((noisy - exact).abs() <= bound).all()
    assert torch.equal(made(x, generator=torch.Generator().manual_seed(1)).router_logits, noisy)
    assert torch.equal(made.eval()(x).router_logits, exact)
    with pytest.raises(ValueError, match=r"jitter=0\.1 draws random numbers"):
        made.train()(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_jitter_is_as_fine_in_low_precision(dtype: torch.dtype) -> None:
    """bfloat16 knows no number between 1 and 1.0078: a jitter of 0.001 did nothing, one of 0.01 had four values."""
    made = router(TopKRouter, 2, jitter=0.001).float()
    x = inputs().to(dtype)
    low, high = (made(v, generator=torch.Generator().manual_seed(1)).router_logits for v in (x, x.float()))
    assert torch.equal(low, high)
    assert low.dtype == torch.float32
    assert not torch.equal(low, made.eval()(x).router_logits)
    low_router = TopKRouter(D, E, jitter=0.001, router_dtype=dtype)
    assert low_router(x, generator=torch.Generator().manual_seed(1)).router_logits.dtype == dtype


def test_scores_that_are_no_numbers_are_refused() -> None:
    x = inputs()
    x[4, 2] = torch.nan
    mask = torch.arange(T) != 4
    for made in (router(), router(GShardRouter), router(TopKRouter, 2, num_experts=6, num_groups=3, top_groups=2)):
        with pytest.raises(NonFiniteScoresError, match=r"1 of 11 tokens, first for token 4"):
            made(x)
        assert not made(x, mask).kept[4].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "relu"}, "softmax, sigmoid"),
        ({"num_groups": 2}, "must be given together"),
        ({"num_groups": 4, "top_groups": 2}, r"num_groups \(4\) must divide num_experts \(6\)"),
        ({"num_groups": 3, "top_groups": 4}, r"top_groups \(4\) must be at least 1 and at most"),
        ({"num_groups": 6, "top_groups": 1}, r"top_k \(2\) must be at most the 1 experts"),
        ({"jitter": 1.5}, r"jitter \(1\.5\)"),
        ({"weight_scale": 0.0}, r"weight_scale \(0\.0\)"),
        ({"group_score": "sum"}, "max, top2"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKRouter(D, 6, 2, **options)


def test_updates_without_a_bias_or_of_others_are_refused() -> None:
    routing = router()(inputs())
    with pytest.raises(ValueError, match="bias_balanced=True"):
        router().update_bias([routing])
    balanced = router(TopKRouter, 2, num_experts=6, bias_balanced=True)
    with pytest.raises(ValueError, match="but got none"):
        balanced.update_bias([])
    with pytest.raises(ValueError, match="5 experts, but this router has 6"):
        balanced.update_bias([routing])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [TopKRouter, GShardRouter, lambda *a, **o: TopKRouter(*a, scores="sigmoid", **o)])
def test_weights_over_their_sum_add_up_to_one_in_low_precision(make: object, dtype: torch.dtype) -> None:
    """The best of many experts have little: less together than bfloat16's epsilon, which the sum was raised to."""
    made = make(D, 512, router_dtype=dtype)
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        made.weight.mul_(0.1)
        if getattr(made, "scores", None) == "sigmoid":
            made.weight.copy_(-1.5 * torch.sign(x[0]) - made.weight.abs())  # tiny scores for the first token
    routing = made.eval()(x)
    assert routing.expert_weights.dtype == dtype
    sums = routing.expert_weights.float().sum(dim=1)
    torch.testing.assert_close(sums, torch.ones(64), rtol=0, atol=torch.finfo(dtype).eps)
    routing.expert_weights.float().square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()
