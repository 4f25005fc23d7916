"""Defects that other libraries shipped in choosing experts and in steering the choice: each foreclosed here by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.kernels.topk_routing import NonFiniteScoresError, top_k_experts
from moe.layers import (
    ExpertChoiceRouter,
    GShardRouter,
    MoE,
    TopKRouter,
    load_balance_loss,
    router_z_loss,
    routing_statistics,
)
from moe.layers.initialization import WeightInit

D, FF, E = 8, 12, 6


def balanced_router(**options: object) -> TopKRouter:
    made = TopKRouter(D, E, scores="sigmoid", bias_balanced=True, **options)
    made.reset_parameters(seed=0, init=WeightInit(std=1.0))
    return made


def layer(**options: object) -> MoE:
    made = MoE(D, FF, E, **options)
    made.reset_parameters(seed=0, init=WeightInit(std=0.5))
    return made


def expert_bias(router: TopKRouter) -> Tensor:
    assert router.expert_bias is not None
    return router.expert_bias


@pytest.fixture
def default_bfloat16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_gate_chooses_in_float32_under_autocast() -> None:
    """torchtitan#2389: the gate was a bfloat16 product, in which near-equal experts are equal."""
    router = TopKRouter(D, 3, 1)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([1.0, 1.001, 1.0])[:, None].expand(-1, D))  # bfloat16 steps by 0.0078
    x = torch.full((5, D), 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    assert router.weight.bfloat16().unique().numel() == 1
    assert routing.expert_indices.flatten().tolist() == [1] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_keeps_its_balancing_bias_in_float32(dtype: torch.dtype) -> None:
    """Megatron-LM#1482, sglang#37133: with --bf16 the bias became bfloat16; 238 different biases became 8."""
    router = balanced_router()
    with torch.no_grad():
        expert_bias(router).copy_(7.0 + torch.arange(E) / 1024)
    before = expert_bias(router).clone()
    module = MoE(D, FF, E, router=router).to(dtype)
    assert module.router.weight.dtype == dtype
    assert expert_bias(router).dtype == torch.float32
    assert torch.equal(expert_bias(router), before)
    router.update_bias([router(torch.randn(20, D, dtype=dtype))], rate=1e-3)
    assert not torch.equal(expert_bias(router), before)


def test_the_balancing_bias_ignores_the_default_dtype(default_bfloat16: None) -> None:
    """vllm#47797, prime-rl#3411: a bias allocated in the default dtype loses the checkpoint's digits unnoticed."""
    router = balanced_router()
    assert router.weight.dtype == torch.bfloat16
    assert expert_bias(router).dtype == torch.float32
    saved = torch.linspace(6.817, 7.063, E, dtype=torch.float32)
    router.load_state_dict({"weight": router.weight.detach(), "expert_bias": saved})
    assert torch.equal(expert_bias(router), saved)


def test_an_assigned_balancing_bias_is_float32() -> None:
    """As Megatron-LM#1482, by load_state_dict(assign=True), which puts the state's own tensors in the module."""
    saved = {name: value.bfloat16() for name, value in balanced_router().state_dict().items()}
    for assign in (True, False):
        router = TopKRouter(D, E, scores="sigmoid", bias_balanced=True, device="meta" if assign else "cpu")
        router.load_state_dict(saved, assign=assign)
        assert router.weight.dtype == (torch.bfloat16 if assign else torch.float32)
        assert expert_bias(router).dtype == torch.float32
        assert router.state_dict()["expert_bias"].dtype == torch.float32


def test_a_bias_from_the_meta_device_starts_at_zero() -> None:
    """Megatron-LM#4155: to_empty() wrote over the bias and reset_parameters() left it, NaN for the whole run."""
    router = TopKRouter(D, E, bias_balanced=True, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        expert_bias(router).fill_(torch.nan)  # what uninitialised memory may hold
    router.reset_parameters(seed=0)
    assert torch.equal(expert_bias(router), torch.zeros(E))


def test_micro_batches_move_the_bias_once_by_their_sum() -> None:
    """torchtitan#1324, #4772: counts kept on the module were wrong with gradient accumulation, and cannot be had
    together with recomputation."""
    router = balanced_router()
    x = torch.randn(60, D, requires_grad=True)
    routings = []
    for part in x.split([50, 7, 3]):  # the two small parts alone would vote otherwise
        routing = checkpoint(router, part, use_reentrant=False)
        routing.router_probs.sum().backward()
        routings.append(routing)
    load = router(x).tokens_per_expert
    router.update_bias(routings, rate=0.25)
    assert torch.equal(expert_bias(router), 0.25 * torch.sign(load.sum() / E - load))
    votes = sum(torch.sign(part.tokens_per_expert.sum() / E - part.tokens_per_expert) for part in routings)
    assert not torch.equal(votes.sign(), expert_bias(router).sign())


def test_padding_moves_no_bias() -> None:
    """Megatron-LM#4776: without its mask the padding is counted in the expert bias' statistics."""
    padded, plain = balanced_router(), balanced_router()
    real, padding = torch.randn(9, D), torch.randn(1, D).expand(50, D)
    padded.update_bias([padded(torch.cat([real, padding]), torch.arange(59) < 9)], rate=0.5)
    plain.update_bias([plain(real)], rate=0.5)
    assert torch.equal(expert_bias(padded), expert_bias(plain))
    plain.update_bias([plain(padding)], rate=0.5)
    assert not torch.equal(expert_bias(padded), expert_bias(plain))


def test_the_bias_chooses_but_weighs_nothing() -> None:
    """flashinfer#3803: a bias picks experts whose own score is nearly nothing; the weights must come from scores."""
    router = balanced_router()
    x = torch.randn(20, D)
    free = router(x)
    with torch.no_grad():
        expert_bias(router)[:2] = 100.0
    forced = router(x)
    assert torch.equal(forced.expert_indices.sort(dim=1).values, torch.tensor([[0, 1]]).expand(20, 2))
    assert torch.equal(forced.router_probs, free.router_probs)
    scores = forced.router_probs.gather(1, forced.expert_indices)
    torch.testing.assert_close(
        forced.expert_weights, scores / scores.sum(dim=1, keepdim=True), rtol=1e-6, atol=0, msg="weights hold the bias"
    )


def test_underflowing_scores_give_no_nan() -> None:
    """flashinfer#3803: chosen sigmoid scores of exactly 0 were divided by their sum, 0/0, in output and gradient."""
    router = balanced_router()
    with torch.no_grad():
        router.weight.fill_(-200.0)
    x = torch.ones(4, D, requires_grad=True)
    routing = router(x)
    assert not routing.router_probs.any()
    assert routing.expert_weights.isfinite().all()
    routing.expert_weights.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("router", [TopKRouter(D, E), TopKRouter(D, E, scores="sigmoid"), GShardRouter(D, E)], ids=repr)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_token_that_is_not_a_number_is_named(router: TopKRouter, bad: float) -> None:
    """vllm#39391, colibri#558: NaN compares false, so one expert was chosen K times, or number -1, and memory broke."""
    x = torch.randn(7, D)
    x[4] = bad
    with pytest.raises(NonFiniteScoresError, match=r"1 of 7 tokens, first for token 4"):
        router(x)


UNCHECKED = {
    "softmax": lambda: TopKRouter(D, E),
    "capacity": lambda: TopKRouter(D, E, capacity_factor=0.5),
    "bias": lambda: balanced_router(),
    "max_groups": lambda: TopKRouter(D, E, num_groups=3, top_groups=1, group_score="max"),
    "top2_groups": lambda: balanced_router(num_groups=3, top_groups=2),
    "gshard": lambda: GShardRouter(D, E),
    "sampling": lambda: GShardRouter(D, E, second_policy="sampling"),
    "expert_choice": lambda: ExpertChoiceRouter(D, E),
}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", UNCHECKED)
def test_an_unchecked_score_that_is_no_number_travels_on(kind: str, bad: float) -> None:
    """Under expert parallelism `check_scores` is off, for an error on one rank leaves the others waiting. Where the
    router's column is negative throughout, an infinity makes all scores of its token -inf."""
    router = UNCHECKED[kind]()
    router.check_scores = False
    with torch.no_grad():
        router.weight[:, 0] = -router.weight[:, 0].abs() - 0.1
    x = torch.randn(7, D)
    x[4, 0] = bad
    module = MoE(D, FF, E, router=router)
    y, routing = module(x, generator=torch.Generator().manual_seed(0))
    assert not y.isfinite().all()
    assert not (routing.expert_indices[:, 0] == routing.expert_indices[:, 1]).any()
    assert int(routing.expert_indices.max()) < E
    y.sum().backward()
    assert not router.weight.grad.isfinite().all()


@pytest.mark.parametrize("router", [TopKRouter(D, E, capacity_factor=0.5), GShardRouter(D, E)], ids=["topk", "gshard"])
def test_padding_may_hold_nan(router: TopKRouter) -> None:
    """vllm#39593, aiter#4530: padding rows hold NaN or infinity, and were routed out of range like any token."""
    module = MoE(D, FF, E, router=router)
    mask = torch.arange(9) % 3 != 1
    x = torch.randn(9, D)
    zeros, poison = (torch.where(mask[:, None], x, fill) for fill in (0.0, torch.nan))
    expected, clean = module(zeros, token_mask=mask)
    y, routing = module(poison, token_mask=mask)
    assert torch.equal(y, expected)
    assert torch.equal(router(poison, mask).kept, clean.kept)
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert torch.equal(routing.tokens_per_expert, clean.tokens_per_expert)
    assert int(routing.expert_indices.min()) >= 0
    assert int(routing.expert_indices.max()) < E
    for loss in (load_balance_loss, router_z_loss):
        assert torch.equal(loss(routing), loss(clean))


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        (torch.float32, torch.nan),
        (torch.float32, torch.inf),
        (torch.float32, 3e38),
        (torch.float16, 6e4),
        (torch.bfloat16, 3e38),
    ],
)
def test_padding_may_hold_numbers_that_overflow(dtype: torch.dtype, fill: float) -> None:
    """As above, for finite numbers too: they overflow in the projections, and 0 times infinity is NaN."""
    width = 256
    made = MoE(width, FF, E, shared_d_ff=FF, shared_gate=True, gated=True, activation="silu", bias=True).to(dtype)
    mask = torch.arange(9) % 3 != 1
    signs = torch.randn(9, width, generator=torch.Generator().manual_seed(0)).sign()
    gradients = []
    for padding in (0.0, fill):
        x = torch.where(mask[:, None], signs, padding * signs if padding else signs * 0.0).to(dtype).requires_grad_()
        y, routing = made(x, token_mask=mask)
        loss = y.float().sum() + load_balance_loss(routing) + router_z_loss(routing)
        gradients.append((y, *torch.autograd.grad(loss, [x, *made.parameters()])))
        assert not gradients[-1][1][~mask].any()
    for expected, actual in zip(*gradients, strict=True):
        assert actual.isfinite().all()
        assert torch.equal(actual, expected)


def test_equal_scores_choose_the_same_experts_in_every_batch() -> None:
    """Automodel#3140: tied scores chose other experts when recomputed, and row counts no longer matched."""
    for num_tokens in (1, 7, 64):
        for num_experts in (6, 40, 512):
            chosen = top_k_experts(torch.zeros(num_tokens, num_experts), 4)
            assert torch.equal(chosen, torch.arange(4).expand(num_tokens, 4))


def test_drawing_from_the_experts_leaves_evaluation_alone() -> None:
    """fastmoe gates/gshard_gate.py: the second expert is dropped at random without a look at self.training."""
    x = torch.randn(40, D)
    for policy in ("random", "sampling"):
        router = GShardRouter(D, E, second_policy=policy).eval()
        routing = router(x)  # no generator: there is nothing to draw
        assert routing.chosen.all()
        assert torch.equal(routing.expert_indices, router(x).expert_indices)
        assert torch.equal(routing.expert_indices, routing.router_probs.topk(2).indices)


@pytest.mark.parametrize("policy", ["random", "sampling"])
def test_a_router_draws_from_its_callers_generator_alone(policy: str) -> None:
    """fairscale top2gate.py: noise from the global generator, so a gate shifts every dropout mask that follows."""
    router = GShardRouter(D, E, second_policy=policy)
    x, state = torch.randn(40, D), torch.get_rng_state()
    first, again, other = (router(x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.expert_weights, again.expert_weights)
    assert not torch.equal(first.expert_weights, other.expert_weights)


def test_a_replayed_choice_that_has_drifted_keeps_its_gradient() -> None:
    """ISEEKYAN/Megatron-LM#79: scores gathered from the new top-k are exactly 0 for experts no longer in it."""
    module = layer()
    x = torch.randn(12, D)
    recorded = module(x)[1]
    with torch.no_grad():
        module.router.weight.neg_()  # the recorded experts are now the worst
    live = module(x)[1]
    assert not (live.expert_indices[:, :, None] == recorded.expert_indices[:, None, :]).any()
    y, replayed = module(x, routing=recorded)
    assert torch.equal(replayed.expert_indices, recorded.expert_indices)
    assert (replayed.expert_weights > 0).all()
    torch.testing.assert_close(replayed.expert_weights.sum(dim=1), torch.ones(12), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(y.square().sum(), module.router.weight)
    assert gradient.abs().max() > 0


def test_replay_serves_no_padding() -> None:
    """sglang#36404: recorded padding rows held real expert ids, and replay could not tell them from a choice."""
    module = layer()
    mask = torch.arange(12) % 4 != 2
    recorded = module(torch.randn(12, D), token_mask=mask)[1]
    y, replayed = module(torch.randn(12, D), routing=recorded)
    assert not y[~mask].any()
    assert y[mask].all()
    assert not replayed.kept[~mask].any()
    assert int(replayed.tokens_per_expert.sum()) == int(mask.sum()) * 2
    assert torch.equal(routing_statistics(replayed).num_tokens, mask.sum())


def test_replay_survives_recomputation_and_ends_with_the_call() -> None:
    """SkyRL#1908, Automodel#2797: replay is a mode of a process-wide registry, whose life went wrong unnoticed."""
    module = layer()
    x = torch.randn(12, D, requires_grad=True)
    live, recorded = module(x)[0], module(torch.randn(12, D))[1]
    plain = torch.autograd.grad(module(x, routing=recorded)[0].square().sum(), [x, *module.parameters()])
    y, replayed = checkpoint(module, x, routing=recorded, use_reentrant=False)
    again = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    assert torch.equal(replayed.expert_indices, recorded.expert_indices)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    assert torch.equal(module(x)[0], live)
    assert not torch.equal(y, live)
