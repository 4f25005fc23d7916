"""GShardRouter against transformers' NllbMoeTop2Router, its version of fairseq's gate, with the same weights and noise.

Choices, drops, weights and gradients. The last tests pin where the two differ, so that nobody takes one for the other.
Only the router is an oracle: NllbMoeExperts of transformers 5.24 reads the 0/1 mask of first choices as expert numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.layers import GShardRouter, Routing

modeling = pytest.importorskip(
    "transformers.models.nllb_moe.modeling_nllb_moe", reason="transformers is the extra 'hf'"
)

TOLERANCE = 1e-10  # float64, relative to the largest magnitude of the reference
D = 6


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert actual.shape == expected.shape
    scale = float(expected.detach().abs().max())
    assert scale > 0, f"{what}: a reference of zeros compares nothing"
    error = float((actual - expected).detach().abs().max())
    assert error <= TOLERANCE * scale, f"{what}: error {error:.3g} at scale {scale:.3g}"


# (T, E, what of its logits is common to all tokens): a large common part makes the capacity bite
SIZES = [(24, 4, 2.0), (23, 5, 1.0), (7, 3, 3.0), (16, 2, 1.0), (9, 8, 0.5)]


def random_numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nllb_inputs(t: int, common: float, seed: int = 0) -> Tensor:
    return random_numbers(t, D, seed=seed) + common * random_numbers(1, D, seed=seed + 100)


def nllb(e: int, capacity: int | None, **options: Any) -> nn.Module:
    """Their router in float64, which their config refuses; capacity `None` is their own 2·ceil(T/E)."""
    config = modeling.NllbMoeConfig(d_model=D, num_experts=e, **options)
    router = modeling.NllbMoeTop2Router(config).double()
    router.dtype, router.expert_capacity = torch.float64, capacity
    with torch.no_grad():
        router.classifier.weight.copy_(0.3 * random_numbers(e, D, seed=7))
    return router


def ours_like(theirs: nn.Module, **options: Any) -> GShardRouter:
    router = GShardRouter(
        D,
        theirs.num_experts,
        second_policy=theirs.second_expert_policy,
        normalize_before_dropping=theirs.normalize_router_prob_before_dropping,
        batch_prioritized=theirs.batch_prioritized_routing,
        dtype=torch.float64,
        **options,
    )
    with torch.no_grad():
        router.weight.copy_(theirs.classifier.weight)
    return router


@pytest.fixture
def equal_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw of either side is the same draw, by shape; nothing else of the two is shared."""

    def gumbel(shape: torch.Size) -> Tensor:
        return -torch.empty(shape, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(1)).log()

    def uniform(shape: torch.Size) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    class Gumbel:
        def __init__(self, loc: float, scale: float) -> None:
            assert (loc, scale) == (0, 1)

        def rsample(self, shape: torch.Size) -> Tensor:
            return gumbel(shape)

    monkeypatch.setattr(torch.distributions.gumbel, "Gumbel", Gumbel)
    monkeypatch.setattr(torch, "rand_like", lambda like: uniform(like.shape))
    ours = "moe.layers.gshard_router"
    monkeypatch.setattr(f"{ours}.gumbel", lambda shape, like, generator: gumbel(shape))
    monkeypatch.setattr(f"{ours}.uniform", lambda shape, like, generator: uniform(shape))


def spread(routing: Routing, num_experts: int) -> Tensor:
    """The weights as a (T, E) matrix."""
    zeros = routing.expert_weights.new_zeros(routing.kept.shape[0], num_experts)
    return zeros.scatter_add(1, routing.expert_indices, routing.expert_weights)


def assert_same_routing(ours: GShardRouter, theirs: nn.Module, x: Tensor, padding: Tensor | None = None) -> Routing:
    """Choices, drops, weights and the gradients of both leaves."""
    mask = None if padding is None or theirs.router_ignore_padding_tokens else ~padding
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    routing = ours(left, mask, generator=torch.Generator())
    top_1_mask, combine, _ = theirs(right, padding)
    e = theirs.num_experts
    actual = spread(routing, e)
    firsts = torch.zeros(x.shape[0], e, dtype=torch.int64)
    firsts.scatter_(1, routing.expert_indices[:, :1], routing.kept[:, :1].long())
    assert torch.equal(firsts, top_1_mask)
    assert torch.equal(actual > 0, combine > 0)
    assert torch.equal((combine > 0).sum(dim=1), routing.kept.sum(dim=1))
    assert_close(actual, combine, "weights")
    upstream = random_numbers(*combine.shape, seed=3)
    gradients = torch.autograd.grad(actual, [left, ours.weight], upstream)
    expected = torch.autograd.grad(combine, [right, theirs.classifier.weight], upstream)
    for name, a, b in zip(("x", "weight"), gradients, expected, strict=True):
        assert_close(a, b, name)
    return routing


@pytest.mark.parametrize("ignore_padding", [None, False, True])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize(
    ("policy", "normalize"),
    # ("random", True) differs: test_random_with_normalised_weights_differs
    [("all", False), ("all", True), ("sampling", False), ("sampling", True), ("random", False)],
)
@pytest.mark.usefixtures("equal_noise")
def test_gshard_equals_nllb_in_training(
    policy: str, normalize: bool, prioritized: bool, ignore_padding: bool | None
) -> None:
    dropped = 0
    for t, e, common in SIZES:
        theirs = nllb(
            e,
            2 * -(-t // e),
            second_expert_policy=policy,
            normalize_router_prob_before_dropping=normalize,
            batch_prioritized_routing=prioritized,
            router_ignore_padding_tokens=bool(ignore_padding),
        )
        padding = None if ignore_padding is None else torch.arange(t) % 4 == 1
        routing = assert_same_routing(ours_like(theirs), theirs, nllb_inputs(t, common), padding)
        dropped += int((routing.chosen & ~routing.kept).sum())
    assert dropped > 0


@pytest.mark.parametrize("fraction", [1.0, 0.25, 0.3])
@pytest.mark.parametrize(("policy", "prioritized"), [("all", False), ("sampling", True), ("random", False)])
@pytest.mark.usefixtures("equal_noise")
def test_gshard_evaluates_as_nllb(policy: str, prioritized: bool, fraction: float) -> None:
    """They draw second experts in evaluation too: eval_as_original."""
    dropped = 0
    for t, e, common in SIZES:
        theirs = nllb(
            e,
            64,
            second_expert_policy=policy,
            normalize_router_prob_before_dropping=False,
            batch_prioritized_routing=prioritized,
            moe_eval_capacity_token_fraction=fraction,
        ).eval()
        ours = ours_like(theirs, eval_as_original=True, eval_capacity_fraction=fraction).eval()
        routing = assert_same_routing(ours, theirs, nllb_inputs(t, common))
        dropped += int((routing.chosen & ~routing.kept).sum())
    assert (dropped > 0) == (fraction < 1.0)


def test_a_negative_evaluation_fraction_is_our_training() -> None:
    """Theirs evaluates with the capacity of training; ours says so with train()."""
    theirs = nllb(4, None, moe_eval_capacity_token_fraction=-1.0).eval()
    routing = assert_same_routing(ours_like(theirs).train(), theirs, nllb_inputs(24, 2.0))
    assert not routing.kept.all()


@pytest.mark.usefixtures("equal_noise")
def test_random_with_normalised_weights_differs() -> None:
    """Theirs replaces the normalised second weight with the raw one, in the draw and in the result; fairseq does not.

    The weights of a token then do not sum to 1, though normalisation was asked for.
    """
    options = {"second_expert_policy": "random", "normalize_router_prob_before_dropping": True}
    theirs = nllb(5, 100, batch_prioritized_routing=False, **options)  # nobody is dropped
    ours, x = ours_like(theirs), nllb_inputs(10, 0.0) * 0.3  # capacity 4
    routing = ours(x, generator=torch.Generator())
    combine = theirs(x)[1]
    second = routing.kept.all(dim=1) & ((combine > 0).sum(dim=1) == 2)
    assert second.any()
    pair = routing.router_probs.gather(1, routing.expert_indices)[second]
    raw = combine.gather(1, routing.expert_indices)[second]
    assert_close(raw[:, 1], pair[:, 1], "their second weight is the probability itself")
    assert_close(routing.expert_weights[second], pair / pair.sum(dim=1, keepdim=True), "ours is a share")
    assert (combine > 0).sum() < routing.chosen.sum()  # twice the raw p2 beats the draw less often than twice the share


def test_their_capacity_sticks_to_the_first_batch() -> None:
    """`None` is 2·ceil(T/E) of the first batch they see, and evaluation overwrites it; ours follows each batch."""
    theirs = nllb(4, None, batch_prioritized_routing=False, moe_eval_capacity_token_fraction=0.25)
    ours, hot = ours_like(theirs), nllb_inputs(1, 0.0).expand(24, D)
    assert int(theirs(hot[:8])[0].sum()) == int(ours(hot[:8]).kept[:, 0].sum()) == 4
    assert int(theirs(hot)[0].sum()) == 4
    assert int(ours(hot).kept[:, 0].sum()) == 12
    theirs.eval()(hot)
    assert int(theirs.train()(hot)[0].sum()) == 6  # ceil(24 / 4) of the evaluation before


def test_their_evaluation_capacity_rounds_in_binary() -> None:
    """ceil(0.07 · 100) is 8 in binary floating point and 7 in decimals."""
    theirs = nllb(4, None, batch_prioritized_routing=False, moe_eval_capacity_token_fraction=0.07).eval()
    ours = ours_like(theirs, eval_capacity_fraction=0.07).eval()
    hot = nllb_inputs(1, 0.0).expand(100, D)
    assert int(theirs(hot)[0].sum()) == 8
    assert int(ours(hot).kept[:, 0].sum()) == 7


@pytest.mark.usefixtures("equal_noise")
def test_their_logits_carry_the_noise() -> None:
    """Sampling adds to the logits in place, so their z-loss sees the noise; our Routing has the logits without it."""
    theirs = nllb(4, 64, second_expert_policy="sampling")
    x = nllb_inputs(24, 1.0)
    clean = theirs.classifier(x)
    assert_close(ours_like(theirs)(x, generator=torch.Generator()).router_logits, clean)
    assert (theirs(x)[2] - clean).abs().max() > 0.1
