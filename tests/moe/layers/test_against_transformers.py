"""The MoE blocks of five families in transformers with the same weights: choices, outputs and every gradient.

The last tests pin where they differ, so that nobody takes a difference for equality.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from moe.layers import MoE, Router, Routing, TopKRouter
from moe.layers.routing import count_assignments

pytest.importorskip("transformers", reason="transformers is the extra 'hf'")

# relative to the largest magnitude of the reference
EXACT = 1e-10  # float64
SINGLE = 1e-6  # float32
SINGLE_GRADIENT = 3e-6  # float32, two more products deep
D = 6


def modeling(family: str) -> ModuleType:
    return import_module(f"transformers.models.{family}.modeling_{family}")


def config_of(family: str, name: str, **options: Any) -> Any:
    config = getattr(import_module(f"transformers.models.{family}.configuration_{family}"), name)(**options)
    config._experts_implementation = "eager"
    return config


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    assert actual.shape == expected.shape
    scale = float(expected.detach().abs().max())
    assert scale > 0, f"{what}: a reference of zeros compares nothing"
    error = float((actual - expected).detach().abs().max())
    assert error <= tolerance * scale, f"{what}: error {error:.3g} at scale {scale:.3g}"


def random_numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Family(NamedTuple):
    """A block of transformers and how to say the same here."""

    package: str
    block: str
    config: str
    options: dict[str, Any]
    router: Callable[..., Router]
    shared_d_ff: int | None = None


E, K, FF = 8, 3, 10
_SIZES = {"hidden_size": D, "num_experts_per_tok": K, "hidden_act": "silu"}


def softmax_router(top_k: int = K, normalize: bool = True) -> Callable[..., TopKRouter]:
    return lambda **dtypes: TopKRouter(D, E, top_k, normalize=normalize, **dtypes)


def deepseek_router(normalize: bool, scale: float) -> Callable[..., TopKRouter]:
    options: dict[str, Any] = {"scores": "sigmoid", "num_groups": 4, "top_groups": 2, "bias_balanced": True}
    return lambda **dtypes: TopKRouter(D, E, K, normalize=normalize, weight_scale=scale, **options, **dtypes)


def _mixtral(top_k: int) -> Family:
    options = {"num_local_experts": E, "intermediate_size": FF, "num_experts_per_tok": top_k}
    return Family("mixtral", "MixtralSparseMoeBlock", "MixtralConfig", options, softmax_router(top_k))


def _olmoe(normalize: bool) -> Family:
    options = {"num_experts": E, "intermediate_size": FF, "norm_topk_prob": normalize}
    return Family("olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig", options, softmax_router(normalize=normalize))


def _qwen3(normalize: bool) -> Family:
    options = {"num_experts": E, "moe_intermediate_size": FF, "norm_topk_prob": normalize}
    router = softmax_router(normalize=normalize)
    return Family("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", options, router)


def _qwen2() -> Family:
    options = {"num_experts": E, "moe_intermediate_size": FF, "shared_expert_intermediate_size": 7}
    router = softmax_router(normalize=False)
    return Family("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig", options, router, 7)


def _deepseek(normalize: bool, scale: float) -> Family:
    options = {
        "n_routed_experts": E,
        "moe_intermediate_size": FF,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": scale,
        "norm_topk_prob": normalize,
    }
    router = deepseek_router(normalize, scale)
    return Family("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config", options, router, 2 * FF)


FAMILIES = {
    "mixtral": _mixtral(K),
    "mixtral_top_1": _mixtral(1),
    "olmoe": _olmoe(False),
    "olmoe_normalised": _olmoe(True),
    "qwen2_moe": _qwen2(),
    "qwen3_moe": _qwen3(True),
    "qwen3_moe_raw": _qwen3(False),
    "deepseek_v3": _deepseek(True, 2.5),
    "deepseek_v3_raw": _deepseek(False, 1.0),
}


def shared_network(theirs: nn.Module) -> nn.Module | None:
    return getattr(theirs, "shared_experts", getattr(theirs, "shared_expert", None))


def pair_of(name: str, dtype: torch.dtype, **router_options: Any) -> tuple[MoE, nn.Module]:
    """Their block with random weights, and our layer with the same."""
    family = FAMILIES[name]
    config = config_of(family.package, family.config, **{**_SIZES, **family.options})
    theirs = getattr(modeling(family.package), family.block)(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in (*theirs.parameters(), *theirs.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    bias = getattr(theirs.gate, "e_score_correction_bias", None)
    theirs = theirs.to(dtype)
    if bias is not None:
        theirs.gate.e_score_correction_bias = bias  # float32, as its checkpoints have it
    router = family.router(dtype=dtype, **router_options)
    gated = hasattr(theirs, "shared_expert_gate")
    ours = MoE(D, FF, E, router.top_k, activation="silu", gated=True, router=router, dtype=dtype,
               shared_d_ff=family.shared_d_ff, shared_gate=gated)  # fmt: skip
    with torch.no_grad():
        router.weight.copy_(theirs.gate.weight)
        if bias is not None:
            router.expert_bias.copy_(bias)
        for ours_part, part in named_parts(ours, theirs, lambda tensor: tensor):
            ours_part.copy_(part)
    return ours, theirs


def named_parts(ours: MoE, theirs: nn.Module, of: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each of our weights beside its part of theirs: `of` the parameter, so the parameter itself or its gradient."""
    gate, up = of(theirs.experts.gate_up_proj).chunk(2, dim=1)
    experts = ours.experts
    pairs = [(experts.w_gate, gate), (experts.w_in, up), (experts.w_out, theirs.experts.down_proj)]
    parts = [(of(a), b if b is gate or b is up else of(b)) for a, b in pairs]
    if ours.shared is not None:
        other = shared_network(theirs)
        for name, linear in (("w_gate", "gate_proj"), ("w_in", "up_proj"), ("w_out", "down_proj")):
            parts.append((of(getattr(ours.shared, name)), of(getattr(other, linear).weight)))
    if ours.shared_gate is not None:
        parts.append((of(ours.shared_gate), of(theirs.shared_expert_gate.weight)))
    return parts


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def sorted_choices(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """By expert: they leave the order of a token's choices open."""
    order = indices.argsort(dim=1)
    return indices.gather(1, order), weights.gather(1, order)


def some_tokens(dtype: torch.dtype, t: int = 26) -> Tensor:
    return random_numbers(2, t // 2, D, seed=5).to(dtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_and_combine_with_every_gradient(name: str) -> None:
    """In float64, given choices and weights: empty experts, repeated ones and all."""
    ours, theirs = pair_of(name, torch.float64)
    t, k = 26, ours.router.top_k
    generator = torch.Generator().manual_seed(4)
    indices = torch.stack([torch.randperm(E - 1, generator=generator)[:k] for _ in range(t)])  # expert 7 has no rows
    everything = torch.ones(t, k, dtype=torch.bool)
    probs = torch.full((t, E), 1.0 / E, dtype=torch.float64)
    results = []
    for run in (ours, theirs):
        x = some_tokens(torch.float64).view(t, D).requires_grad_()
        weights = torch.rand(t, k, generator=generator.manual_seed(6), dtype=torch.float64).requires_grad_()
        if run is ours:
            counts = count_assignments(indices, everything, E)
            routing = Routing(probs, probs, indices, weights, everything, everything, None, None, counts)
            y = ours.dispatcher(x, routing, ours.experts)
        else:
            y = theirs.experts(x, indices, weights)
        y.backward(random_numbers(t, D, seed=8))
        results.append((y, gradient(x), gradient(weights)))
    for what, actual, expected in zip(("y", "x", "weights"), *results, strict=True):
        assert_close(actual, expected, EXACT, what)
    experts = ours.experts
    gate, up = gradient(theirs.experts.gate_up_proj).chunk(2, dim=1)
    for weight, expected in (
        (experts.w_gate, gate),
        (experts.w_in, up),
        (experts.w_out, gradient(theirs.experts.down_proj)),
    ):
        assert_close(gradient(weight), expected, EXACT)
        assert not gradient(weight)[E - 1].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_block_with_every_gradient(name: str) -> None:
    """In float32 with the family's own router dtype, which is float32."""
    ours, theirs = pair_of(name, torch.float32)
    left, right = some_tokens(torch.float32).requires_grad_(), some_tokens(torch.float32).requires_grad_()
    y, routing = ours(left)
    expected = theirs(right)
    logits, weights, indices = theirs.gate(right)[:3]
    indices, weights = sorted_choices(indices, weights)
    our_indices, our_weights = sorted_choices(routing.expert_indices, routing.expert_weights)
    assert torch.equal(our_indices, indices)
    assert routing.tokens_per_expert.unique().numel() > 1
    assert_close(routing.router_logits, logits, SINGLE, "logits")
    assert_close(our_weights, weights, SINGLE, "weights")
    assert_close(y, expected, SINGLE, "y")
    upstream = some_tokens(torch.float32).flip(0)
    y.backward(upstream)
    expected.backward(upstream)
    assert_close(gradient(left), gradient(right), SINGLE_GRADIENT, "x")
    for actual, of_theirs in named_parts(ours, theirs, gradient):
        assert_close(actual, of_theirs, SINGLE_GRADIENT)
    if ours.router.top_k > 1:  # one normalised weight is 1: its gradient is rounding
        assert_close(gradient(ours.router.weight), gradient(theirs.gate.weight), SINGLE_GRADIENT, "router")


def test_groups_and_bias_decide() -> None:
    """What DeepSeek-V3's comparison above would not notice if either did nothing."""
    ours, _ = pair_of("deepseek_v3", torch.float32)
    x = some_tokens(torch.float32)
    chosen = ours(x)[1].expert_indices
    assert all(len({int(e) // 2 for e in row}) <= 2 for row in chosen)
    ours.router.num_groups = ours.router.top_groups = None
    without_groups = ours(x)[1].expert_indices
    assert not torch.equal(without_groups, chosen)
    ours.router.expert_bias.zero_()
    assert not torch.equal(ours(x)[1].expert_indices, without_groups)


def test_deepseek_routes_in_float32_below_bfloat16_weights() -> None:
    ours, theirs = pair_of("deepseek_v3", torch.bfloat16)
    x = some_tokens(torch.bfloat16)
    routing = ours(x)[1]
    logits, weights, indices = theirs.gate(x)
    assert routing.router_logits.dtype == logits.dtype == torch.float32
    indices, weights = sorted_choices(indices, weights)
    our_indices, our_weights = sorted_choices(routing.expert_indices, routing.expert_weights)
    assert torch.equal(our_indices, indices)
    assert_close(our_weights, weights, SINGLE)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
def test_the_softmax_families_take_logits_in_the_weights_dtype(name: str) -> None:
    """In bfloat16 theirs are rounded to 8 bits; ours are float32 unless router_dtype asks for the same."""
    ours, theirs = pair_of(name, torch.bfloat16)
    like_theirs, _ = pair_of(name, torch.bfloat16, router_dtype=torch.bfloat16)
    x = some_tokens(torch.bfloat16)
    logits = theirs.gate(x)[0]
    assert logits.dtype == torch.bfloat16
    assert torch.equal(like_theirs(x)[1].router_logits, logits)
    assert ours(x)[1].router_logits.dtype == torch.float32


def test_mixtral_jitters_the_experts_input_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs multiplies x itself, in place; the Switch Transformer (2.4), and we, only what the router sees."""
    ours, theirs = pair_of("mixtral", torch.float32)
    noise = torch.rand(26, D, generator=torch.Generator().manual_seed(9))
    theirs.jitter_noise = ours.router.jitter = 0.3
    factor = 0.7 + 0.6 * noise
    monkeypatch.setattr("moe.layers.router.uniform", lambda shape, like, generator: noise)
    monkeypatch.setattr(Tensor, "uniform_", lambda self, low, high: self.copy_(factor.view_as(self)))
    x = some_tokens(torch.float32)
    y, routing = ours(x, generator=torch.Generator())
    changed = x.clone()
    expected = theirs(changed)
    assert_close(changed, x * factor.view_as(x), SINGLE)
    assert_close(routing.router_logits, theirs.gate(changed)[0], SINGLE)  # the router sees the same
    assert (y - expected).abs().max() > 0.01 * expected.abs().max()
    assert_close(ours.eval()(changed)[0], expected, SINGLE)  # with their input the layers agree


def test_tiny_sigmoid_scores_are_normalised_too() -> None:
    """They add 1e-20 to the sum, ours is at least that: weights sum to the scale however small the scores are."""
    ours, theirs = pair_of("deepseek_v3", torch.float32)
    direction = random_numbers(1, D, seed=1).float()
    with torch.no_grad():
        for gate in (ours.router, theirs.gate):
            gate.weight.copy_(direction.expand(E, D) / direction.square().sum())  # all logits equal x · direction
    for logit in (-14.0, -20.0, -36.0):
        x = logit * direction
        for total in (theirs.gate(x)[1].detach().sum(), ours.router(x).expert_weights.detach().sum()):
            assert float(total) == pytest.approx(2.5, rel=1e-4)
