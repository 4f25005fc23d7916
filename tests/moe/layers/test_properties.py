"""The whole layer, with every router and option, against loops over tokens and choices in float64 written here.

Choices are made anew in plain Python from the scores that the router returned, which are compared with the loop's own:
a tie must not be decided by the last bit of two different sums. Nothing else of the layer is used by the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.layers import ExpertChoiceRouter, FeedForward, GShardRouter, MoE, Router, Routing, TopKRouter
from moe.layers.noise import gumbel, uniform
from moe.layers.router_losses import load_balance_loss, router_z_loss

pytest.importorskip("hypothesis", reason="hypothesis is of the extra 'test'")

from hypothesis import example, given, settings
from hypothesis import strategies as st

TOLERANCE = 1e-10  # of a tensor's error, relative to its largest magnitude in the loop
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class Case(NamedTuple):
    """One layer and one input. What a router cannot have is left out by the strategy."""

    t: int = 7
    e: int = 5
    k: int = 2
    seed: int = 0
    d: int = 3
    d_ff: int = 4
    activation: str = "gelu"
    gated: bool = False
    bias: bool = False
    shared: str = "none"
    backend: str = "torch"
    mask: str = "none"
    ties: str = "none"
    layout: str = "plain"
    upstream: str = "random"
    training: bool = True
    router: Any = ()  # the options of the router, a dict


FIELDS: dict[str, tuple[Any, ...]] = {
    "d": (1, 3, 4, 6),
    "d_ff": (1, 2, 5, 8),
    "activation": tuple(ACTIVATIONS),
    "gated": (False, True),
    "bias": (False, True),
    "shared": ("none", "none", "plain", "gate"),
    "backend": ("torch", "reference"),
    "mask": ("none", "none", "none", "some", "some", "nan", "nan", "all"),  # nan: some, and padding holds NaN
    "ties": ("none", "none", "twins", "zero"),  # twins: every row of the router occurs twice; zero: a router of zeros
    "layout": ("plain", "transposed", "strided", "sequences", "expanded"),  # expanded: one token T times, stride 0
    "upstream": ("random", "ones", "row"),  # ones: that of y.sum(), strides 0 and 0; row: stride 0 over tokens
    "training": (True, False),
}


def a_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


@st.composite
def cases(draw: st.DrawFn, options: Callable[[st.DrawFn, int, int, int], dict[str, Any]], least_e: int = 1) -> Case:
    e = draw(a_of(*(e for e in (1, 2, 3, 5, 8, 12, 33, 64) if e >= least_e)))
    t = draw(a_of(9, 16, 23, 24, 37, 7, 4, 3, 2, 1, 0))  # the first is what a failure shrinks to
    k = min(draw(st.integers(1, 8)), e)
    fields = {name: draw(a_of(*values)) for name, values in FIELDS.items()}
    return Case(t, e, k, draw(st.integers(0, 10**6)), **fields, router=options(draw, t, e, k))


LONG_FACTORS = (4 / 3, 10 / 9, 1.1 * 1.1)  # their digits times a count of tokens are more than an int64 holds
FACTORS = (None, 0.1, 0.3, 0.5, 1.0, 1.1, *LONG_FACTORS)


def top_k_options(draw: st.DrawFn, t: int, e: int, k: int) -> dict[str, Any]:
    groups = [(n, m) for n in (1, 2, 3, 4, 8) if e % n == 0 for m in range(1, n + 1) if m * (e // n) >= k]
    num_groups, top_groups = draw(a_of((None, None), *groups))
    return {
        "scores": draw(a_of("softmax", "sigmoid")),
        "normalize": draw(a_of(None, True, False)),
        "weight_scale": draw(a_of(1.0, 2.5)),
        "capacity_factor": draw(a_of(*FACTORS)),
        "eval_capacity_factor": draw(a_of(*FACTORS)),
        "num_groups": num_groups,
        "top_groups": top_groups,
        "group_score": draw(a_of("max", "top2")),
        "bias_balanced": draw(st.booleans()),
        "jitter": draw(a_of(None, 0.2)),
    }


def gshard_options(draw: st.DrawFn, t: int, e: int, k: int) -> dict[str, Any]:
    return {
        "rules": draw(a_of("fairseq", "fairscale")) if t % e == 0 else "fairseq",
        "second_policy": draw(a_of(None, "all", "sampling", "random")),
        "normalize_before_dropping": draw(st.booleans()),
        "batch_prioritized": draw(st.booleans()),
        "eval_capacity_fraction": draw(a_of(None, 0.1, 0.3, 1.0)),
        "eval_as_original": draw(st.booleans()),
    }


def expert_choice_options(draw: st.DrawFn, t: int, e: int, k: int) -> dict[str, Any]:
    return {"capacity_factor": draw(a_of(0.3, 1.0, 1.1, 2.0, 100.0, *LONG_FACTORS))}


# ---- the layer and its input ----


def build(case: Case, kind: type[Router]) -> MoE:
    generator = torch.Generator().manual_seed(case.seed)
    options = {"backend": case.backend, "dtype": torch.float64, **dict(case.router)}
    top_k = {GShardRouter: 2, ExpertChoiceRouter: case.e}.get(kind, case.k)
    router = TopKRouter(case.d, case.e, top_k, **options) if kind is TopKRouter else kind(case.d, case.e, **options)
    networks = {"activation": case.activation, "gated": case.gated, "bias": case.bias, "backend": case.backend}
    shared = {"shared_d_ff": None if case.shared == "none" else 3, "shared_gate": case.shared == "gate"}
    layer = MoE(case.d, case.d_ff, case.e, top_k, router=router, dtype=torch.float64, **networks, **shared)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
        if case.ties == "twins":
            router.weight.copy_(router.weight[torch.arange(case.e) // 2 * 2])
        elif case.ties == "zero":
            router.weight.zero_()
        if getattr(router, "expert_bias", None) is not None:
            router.expert_bias.copy_(0.2 * torch.randn(case.e, generator=generator))
    return layer.train(case.training)


def make_input(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The leaf that the gradient is asked for, x (..., D), a view of it, token_mask (...) and a gradient for y."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    t, d = case.t, case.d
    batch = next((b for b in range(2, t) if t % b == 0), 1)  # T = B·S, B = 1 for a prime
    shape, view = {
        "plain": ((t, d), lambda leaf: leaf),
        "transposed": ((d, t), lambda leaf: leaf.t()),
        "strided": ((2 * t, 2 * d), lambda leaf: leaf[::2, 1::2]),
        "sequences": ((t // batch, batch, d), lambda leaf: leaf.transpose(0, 1)),
        "expanded": ((1, d), lambda leaf: leaf.expand(t, d)),
    }[case.layout]
    leaf = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    x = view(leaf)
    mask = None
    if case.mask != "none":
        mask = torch.rand(x.shape[:-1], generator=generator) < (0.0 if case.mask == "all" else 0.6)
        if case.mask == "nan" and case.layout != "expanded":
            x.detach()[~mask] = torch.nan
    upstreams = {"random": x.shape, "ones": (1,), "row": (1, d)}
    values = torch.randn(upstreams[case.upstream], generator=generator, dtype=torch.float64)
    upstream = torch.ones_like(values) if case.upstream == "ones" else values
    return leaf, x, mask, upstream.expand(x.shape)


# ---- the loops ----


class Choices(NamedTuple):
    """Lists over tokens and choices."""

    indices: list[list[int]]
    chosen: list[list[bool]]
    kept: list[list[bool]]


def best(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:count]


def serve(
    indices: list[list[int]], chosen: list[list[bool]], capacity: float, e: int, order: list[int]
) -> list[list[bool]]:
    """First choices in `order`, then second ones; whoever finds fewer than `capacity` before itself is kept."""
    taken, kept = [0] * e, [[False] * len(row) for row in indices]
    for k in range(len(indices[0]) if indices else 0):
        for t in order:
            if chosen[t][k]:
                kept[t][k] = taken[indices[t][k]] < capacity
                taken[indices[t][k]] += 1
    return kept


def exact_ceil(factor: float | None, count: int, divisor: int = 1) -> float:
    return math.inf if factor is None else math.ceil(Fraction(str(factor)).limit_denominator(10**6) * count / divisor)


def top_k_choices(router: TopKRouter, routing: Routing, valid: list[bool]) -> Choices:
    e, indices = router.num_experts, []
    for logits, probs in zip(routing.router_logits.tolist(), routing.router_probs.tolist(), strict=True):
        scores = logits
        if router.expert_bias is not None:
            scores = [p + b for p, b in zip(probs, router.expert_bias.tolist(), strict=True)]
        elif router.num_groups is not None:
            scores = probs
        if router.num_groups is not None:
            size = e // router.num_groups
            count = 1 if router.group_score == "max" else 2
            blocks = [scores[i : i + size] for i in range(0, e, size)]
            allowed = best([sum(sorted(block)[-count:]) for block in blocks], router.top_groups)
            scores = [s if i // size in allowed else -math.inf for i, s in enumerate(scores)]
        indices.append(best(scores, router.top_k))
    chosen = [[v] * router.top_k for v in valid]
    factor = router.capacity_factor if router.training else router.eval_capacity_factor
    capacity = exact_ceil(factor, sum(valid) * router.top_k, e)
    return Choices(indices, chosen, serve(indices, chosen, capacity, e, list(range(len(valid)))))


def gshard_choices(router: GShardRouter, routing: Routing, valid: list[bool], seed: int) -> Choices:
    t, e = routing.router_probs.shape
    draws, generator = router.training or router.eval_as_original, torch.Generator().manual_seed(seed)
    probs, contest = routing.router_probs.tolist(), routing.router_logits.detach()
    if draws and router.second_policy == "sampling":
        contest = contest + gumbel((t, e), contest, generator)
    luck = uniform((t,), contest, generator).tolist() if draws and router.second_policy == "random" else None
    indices, chosen = [], []
    for i, wishes in enumerate(contest.tolist()):
        first = best(probs[i], 1)[0]
        second = next(x for x in best(wishes, 2) if x != first)
        share = probs[i][second]
        if router.normalize_before_dropping:
            share /= probs[i][first] + probs[i][second]
        indices.append([first, second])
        chosen.append([valid[i], valid[i] and (luck is None or 2 * share > luck[i])])
    capacity = 2 * math.ceil(t / e) if router.rules == "fairseq" else 2 * t // e
    if not router.training:
        fraction = router.eval_capacity_fraction
        if fraction is not None or not router.eval_as_original:
            capacity = exact_ceil(fraction, t)
    order = list(range(t))
    if router.batch_prioritized:
        order.sort(key=lambda i: -max(probs[i]))
    return Choices(indices, chosen, serve(indices, chosen, capacity, e, order))


def expert_choices(router: ExpertChoiceRouter, routing: Routing, valid: list[bool]) -> Choices:
    t, e = routing.router_probs.shape
    tokens = [i for i in range(t) if valid[i]]
    capacity = exact_ceil(router.capacity_factor, len(tokens), e)
    kept = [[False] * e for _ in range(t)]
    for j, column in enumerate(routing.router_probs.T.tolist()):
        for i in sorted(tokens, key=lambda i: (-column[i], i))[: min(int(capacity), len(tokens))]:
            kept[i][j] = True
    return Choices([list(range(e))] * t, kept, kept)


def network(x: Tensor, weights: list[Tensor | None], activation: str) -> Tensor:
    """One token (D,) through one network."""
    w_in, w_gate, w_out, b_in, b_out = weights
    act = ACTIVATIONS[activation]
    hidden = w_in @ x if b_in is None else w_in @ x + b_in
    hidden = act(hidden) if w_gate is None else act(w_gate @ x) * hidden
    return w_out @ hidden if b_out is None else w_out @ hidden + b_out


def weights_of(module: Any, e: int | None = None) -> list[Tensor | None]:
    tensors = [getattr(module, name) for name in ("w_in", "w_gate", "w_out", "b_in", "b_out")]
    return [tensor if tensor is None or e is None else tensor[e] for tensor in tensors]


def choice_weights(router: Router, probs: Tensor, experts: list[int], kept: list[bool]) -> list[Tensor]:
    """What each choice of one token weighs, dropped ones zero."""
    values = [probs[e] if k else probs[e] * 0.0 for e, k in zip(experts, kept, strict=True)]
    if isinstance(router, GShardRouter):
        total = sum(probs[e] for e in experts) if router.normalize_before_dropping else sum(values)
        return [value / total if any(kept) else value for value in values]
    if isinstance(router, TopKRouter):
        total = sum(values) if router.normalize and any(kept) else 1.0
        return [value / total * router.weight_scale for value in values]
    return values


class Expected(NamedTuple):
    """Masked tokens have zeros. Without tokens the first three are empty."""

    y: Tensor  # (T, D)
    logits: Tensor  # (T, E)
    weights: Tensor  # (T, K)
    loss: Tensor


def loop(layer: MoE, x: Tensor, router_x: Tensor, valid: list[bool], choices: Choices) -> Expected:
    """Token by token and choice by choice; masked ones are not looked at. x, router_x: (T, D) differ by jitter."""
    router, activation = layer.router, layer.experts.activation
    rows, all_logits, all_weights = (
        list(x.new_zeros(len(valid), width).unbind()) for width in (x.shape[1], router.num_experts, router.top_k)
    )
    balance = x.new_zeros(router.num_experts)
    squares = x[:0].sum()  # no tokens: a loss of zero that has a gradient
    counts = [0] * router.num_experts
    for t in [t for t, v in enumerate(valid) if v]:
        logits = router.weight @ router_x[t]
        probs = logits.sigmoid() if getattr(router, "scores", "softmax") == "sigmoid" else logits.softmax(0)
        weights = choice_weights(router, probs, choices.indices[t], choices.kept[t])
        for k, e in enumerate(choices.indices[t]):
            counts[e] += choices.chosen[t][k]
            if choices.kept[t][k]:
                rows[t] = rows[t] + weights[k] * network(x[t], weights_of(layer.experts, e), activation)
        if isinstance(layer.shared, FeedForward):
            scale = 1.0 if layer.shared_gate is None else torch.sigmoid(layer.shared_gate[0] @ x[t])
            rows[t] = rows[t] + scale * network(x[t], weights_of(layer.shared), activation)
        balance = balance + probs / probs.sum() / sum(valid)  # (E,) the mean probability
        squares = squares + torch.logsumexp(logits, 0) ** 2 / sum(valid)
        all_logits[t], all_weights[t] = logits, torch.stack(weights)
    shares = torch.tensor(counts, dtype=torch.float64) / max(sum(counts), 1)
    loss = (balance * shares).sum() * router.num_experts + squares
    y, logits, weights = (torch.stack(v) if v else x.new_zeros(0) for v in (rows, all_logits, all_weights))
    return Expected(y, logits, weights, loss)


# ---- the comparison ----


def assert_close(what: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, what
    if expected.numel():
        error, scale = (float(v.detach().abs().max()) for v in (actual - expected, expected))
        assert error <= TOLERANCE * scale, f"{what}: error {error:.3g} at scale {scale:.3g}"


def compare(case: Case, kind: type[Router]) -> None:
    layer = build(case, kind)
    router = layer.router
    leaf, x, mask, upstream = make_input(case)
    y, routing = layer(x, token_mask=mask, generator=torch.Generator().manual_seed(case.seed))
    flat = x.reshape(-1, case.d)
    valid = [True] * case.t if mask is None else mask.flatten().tolist()
    router_x = flat
    if getattr(router, "jitter", None) is not None and router.training:
        noise = uniform(flat.shape, flat, torch.Generator().manual_seed(case.seed))
        router_x = flat * (1.0 + router.jitter * (2.0 * noise - 1.0))
    if isinstance(router, TopKRouter):
        choices = top_k_choices(router, routing, valid)
    elif isinstance(router, GShardRouter):
        choices = gshard_choices(router, routing, valid, case.seed)
    else:
        choices = expert_choices(router, routing, valid)
    expected = loop(layer, flat, router_x, valid, choices)
    for t in range(case.t):
        if valid[t]:
            assert routing.expert_indices[t].tolist() == choices.indices[t], t
    assert routing.chosen.tolist() == choices.chosen
    assert routing.kept.tolist() == choices.kept
    loss = load_balance_loss(routing) + router_z_loss(routing)
    for what, a, b in (
        ("logits", routing.router_logits[valid], expected.logits.view(-1, case.e)[valid]),
        ("weights", routing.expert_weights, expected.weights.view(-1, router.top_k)),
        ("y", y, expected.y.view(x.shape)),
        ("loss", loss, expected.loss),
    ):
        assert_close(what, a, b)
    named = {"x": leaf, **dict(layer.named_parameters())}
    leaves = list(named.values())
    options = {"allow_unused": True, "materialize_grads": True}  # no token, no use
    of_layer = torch.autograd.grad([y, loss], leaves, [upstream, torch.ones_like(loss)], retain_graph=True, **options)
    total = (expected.y.view(x.shape) * upstream).sum() + expected.loss
    for name, a, b in zip(named, of_layer, torch.autograd.grad(total, leaves, **options), strict=True):
        assert_close(f"gradient of {name}", a, b)


def grid(count: int) -> Callable[..., Any]:
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@grid(160)
@given(cases(top_k_options))
@example(Case(t=0, upstream="ones"))
@example(Case(t=1, e=64, k=8, ties="zero", layout="expanded"))
@example(Case(t=37, e=64, k=8, ties="twins", mask="some", gated=True, bias=True, router={"capacity_factor": 0.5}))
@example(Case(t=24, e=8, k=3, mask="all", router={"capacity_factor": 1.0}))
def test_top_k(case: Case) -> None:
    compare(case, TopKRouter)


@grid(120)
@given(cases(gshard_options, least_e=2))
@example(Case(t=0, e=2, upstream="ones"))
@example(Case(t=24, e=3, layout="expanded", mask="some", router={"rules": "fairscale", "batch_prioritized": True}))
def test_gshard(case: Case) -> None:
    compare(case, GShardRouter)


@grid(80)
@given(cases(expert_choice_options))
@example(Case(t=0, e=2, upstream="ones"))
@example(Case(t=37, e=5, ties="zero", mask="some", router={"capacity_factor": 1.1}))
def test_expert_choice(case: Case) -> None:
    compare(case, ExpertChoiceRouter)
