"""The layer as a citizen of torch: compile, autocast, recomputation, copies, functional calls, partial gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from moe.layers import ExpertChoiceRouter, GShardRouter, MoE, TopKRouter, load_balance_loss, router_z_loss
from moe.layers.initialization import WeightInit

D, FF, E = 8, 12, 6
TOKENS = (12, 18, 24, 36, 30)  # divisible by E, as fairscale's rule wants it
TOLERANCE = 1e-6  # float32, relative to the largest magnitude of the reference

Make = Callable[..., Any]
ROUTERS: dict[str, Make] = {
    "top1": lambda **f: TopKRouter(D, E, 1, **f),
    "softmax": lambda **f: TopKRouter(D, E, **f),
    "capacity": lambda **f: TopKRouter(D, E, capacity_factor=0.5, eval_capacity_factor=0.75, **f),
    "sigmoid_groups_bias": lambda **f: TopKRouter(
        D, E, scores="sigmoid", weight_scale=2.5, num_groups=3, top_groups=2, bias_balanced=True, **f
    ),
    "max_groups_unnormalized": lambda **f: TopKRouter(
        D, E, normalize=False, num_groups=2, top_groups=1, group_score="max", **f
    ),
    "gshard": lambda **f: GShardRouter(D, E, **f),
    "gshard_prioritized": lambda **f: GShardRouter(
        D, E, batch_prioritized=True, normalize_before_dropping=True, eval_capacity_fraction=0.25, **f
    ),
    "fairscale": lambda **f: GShardRouter(D, E, rules="fairscale", second_policy="all", **f),
    "expert_choice": lambda **f: ExpertChoiceRouter(D, E, **f),
}
DRAWING: dict[str, Make] = {
    "jitter": lambda **f: TopKRouter(D, E, jitter=0.2, **f),
    "sampling": lambda **f: GShardRouter(D, E, second_policy="sampling", **f),
    "random": lambda **f: GShardRouter(D, E, second_policy="random", **f),
}
EXPERTS: dict[str, dict[str, Any]] = {
    "swiglu": {"gated": True, "activation": "silu"},
    "biases": {"bias": True, "activation": "relu"},
    "shared": {"shared_d_ff": 4, "shared_gate": True, "gated": True, "bias": True},
}


def build(router: str = "softmax", **options: Any) -> MoE:
    factory = {name: options[name] for name in ("device", "dtype") if name in options}
    made = MoE(D, FF, E, 1 if router == "top1" else 2, router=(ROUTERS | DRAWING)[router](**factory), **options)
    return reset(made)


def reset(layer: MoE) -> MoE:
    layer.reset_parameters(seed=1, init=WeightInit("fairseq"))  # biases are drawn too
    return layer


def inputs(num_tokens: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def gradients(layer: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    """Of a loss that everything returned takes part in: x first, then the parameters."""
    y, routing = layer(x, **options)
    loss = y.square().sum() + load_balance_loss(routing) + 0.1 * router_z_loss(routing)
    return list(torch.autograd.grad(loss, [x, *layer.parameters()]))


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for a, e in zip(actual, expected, strict=True):
        scale = float(e.detach().abs().max())
        assert scale > 0
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance * scale)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_compiled(layer: MoE) -> None:
    """Whole, equal to eager in training and evaluation, with one static and one dynamic graph for each."""
    for training in (True, False):
        torch._dynamo.reset()
        layer.train(training)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        for num_tokens in TOKENS:
            x = inputs(num_tokens)
            if training:
                assert_close(gradients(compiled, x), gradients(layer, x))
            else:
                with torch.no_grad():
                    assert_close([compiled(x)[0]], [layer(x)[0]])
        assert counter.frame_count == 2


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_compiles_whole_and_at_most_twice(router: str) -> None:
    check_compiled(build(router))


@pytest.mark.parametrize("experts", EXPERTS)
def test_all_kinds_of_experts_compile_whole_and_at_most_twice(experts: str) -> None:
    check_compiled(build("capacity", **EXPERTS[experts]))


@pytest.mark.parametrize("router", DRAWING)
def test_a_router_that_draws_compiles_around_its_draw(router: str) -> None:
    """A torch.Generator cannot be inside a graph: in training the graph breaks there; evaluation draws nothing."""
    layer, x = build(router), inputs()
    compiled = torch.compile(layer, backend="aot_eager")
    assert_close(gradients(compiled, x, generator=seeded()), gradients(layer, x, generator=seeded()))
    layer.eval()
    whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close([whole(inputs())[0]], [layer(inputs())[0]])


def test_without_fullgraph_the_graph_breaks_at_the_sort_alone() -> None:
    """What docs/layers.md says: fullgraph=True lets Dynamo trace operators whose output size depends on data."""
    layer, x = build("softmax"), inputs()
    explained = torch._dynamo.explain(layer)(x)
    assert explained.graph_break_count > 0
    assert all("moe.sort_slots_by_expert" in str(reason.reason) for reason in explained.break_reasons)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    assert_close(gradients(compiled, x), gradients(layer, x))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch._dynamo.explain(layer)(x).graph_break_count == 0


def test_masks_and_replay_compile_whole() -> None:
    layer, x, mask = build("capacity"), inputs(), torch.arange(24) % 5 != 2
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, x, token_mask=mask), gradients(layer, x, token_mask=mask))
    recorded = layer(inputs().flip(0))[1]
    assert_close(gradients(compiled, x, routing=recorded), gradients(layer, x, routing=recorded))
    assert not torch.equal(layer(x, routing=recorded)[0], layer(x)[0])


def test_inductor_agrees() -> None:
    layer, x = build("softmax", gated=True, activation="silu"), inputs()
    compiled = torch.compile(layer, fullgraph=True)
    assert_close(gradients(compiled, x), gradients(layer, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", ["swiglu", "biases"])
def test_autocast_is_a_cast_of_experts_and_input_with_a_float32_router(dtype: torch.dtype, experts: str) -> None:
    layer, x = build("softmax", **EXPERTS[experts]), inputs()
    with torch.autocast("cpu", dtype=dtype):
        y, routing = layer(x)
    expected, _ = copy.deepcopy(layer).to(dtype)(x.to(dtype), routing=routing, recorded_weights=True)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    assert routing.router_logits.dtype == routing.expert_weights.dtype == torch.float32
    assert torch.equal(routing.router_logits, layer(x)[1].router_logits)
    actual = torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])
    exact = torch.autograd.grad(layer(x)[0].square().sum(), [x, *layer.parameters()])
    assert all(gradient.dtype == torch.float32 for gradient in actual)
    assert_close(list(actual), list(exact), {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", ["sigmoid_groups_bias", "gshard", "expert_choice"])
def test_every_dtype_runs_both_ways(router: str, dtype: torch.dtype) -> None:
    layer, x = build(router, dtype=dtype, **EXPERTS["shared"]), inputs(dtype=dtype)
    y, routing = layer(x)
    assert y.dtype == dtype
    assert routing.router_logits.dtype == torch.promote_types(dtype, torch.float32)
    wide = copy.deepcopy(layer).double()
    expected = wide(x.double(), routing=routing)[0]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert_close([y.double()], [expected], tolerance)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("router", ["capacity", "gshard", "expert_choice", *DRAWING])
def test_both_kinds_of_recomputation_give_the_same_gradients(router: str, use_reentrant: bool) -> None:
    layer, x = build(router, dropout=0.3, shared_d_ff=4), inputs()

    def run(x: Tensor) -> Tensor:  # what draws is set to the same state each time it runs
        y, routing = layer(x, generator=seeded() if router in DRAWING else None)
        return y.square().sum() + load_balance_loss(routing)

    leaves = [x, *layer.parameters()]
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)  # dropout
        loss = checkpoint(run, x, use_reentrant=use_reentrant) if recompute else run(x)
        loss.backward()
        results.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(gradient.any() for gradient in results[0])


@pytest.mark.parametrize("router", [*ROUTERS, *DRAWING])
def test_state_and_copies_carry_everything(router: str) -> None:
    layer = build(router, **EXPERTS["shared"])
    bias = getattr(layer.router, "expert_bias", None)
    if bias is not None:
        bias.copy_(torch.linspace(-1, 1, E))
    other = build(router, **EXPERTS["shared"])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(layer.state_dict())
    copied = copy.deepcopy(layer)
    assert ("router.expert_bias" in layer.state_dict()) == (bias is not None)
    expected = layer(inputs(), generator=seeded())[0]
    for same in (other, copied):
        assert torch.equal(same(inputs(), generator=seeded())[0], expected)


@pytest.mark.parametrize("router", [*ROUTERS, *DRAWING])
def test_a_meta_layer_made_real_equals_one_built_directly(router: str) -> None:
    layer = build(router, **EXPERTS["shared"])
    meta = MoE(
        D,
        FF,
        E,
        layer.router.top_k if router != "expert_choice" else 2,
        router=(ROUTERS | DRAWING)[router](device="meta"),
        device="meta",
        **EXPERTS["shared"],
    )
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    real = meta.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in real.state_dict().values():
            tensor.fill_(torch.nan)
    state = reset(real).state_dict()
    assert state.keys() == layer.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("router", ["capacity", "gshard", "expert_choice"])
def test_torch_func_gives_the_gradients_of_autograd(router: str) -> None:
    layer, x = build(router, **EXPERTS["biases"]), inputs()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    functional = torch.func.grad(loss)(parameters, x.detach())
    expected = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    assert_close(list(functional.values()), list(expected))
    replaced = torch.func.functional_call(layer, {"experts.w_out": torch.zeros(E, D, FF)}, (x,))[0]
    with torch.no_grad():
        layer.experts.w_out.zero_()
    assert torch.equal(replaced, layer(x)[0])


def test_gradients_of_a_part_are_those_of_the_whole() -> None:
    layer, x = build("softmax", **EXPERTS["shared"]), inputs()
    named = dict(layer.named_parameters())
    whole = dict(zip(named, torch.autograd.grad(layer(x)[0].square().sum(), list(named.values())), strict=True))
    for name, parameter in named.items():
        (alone,) = torch.autograd.grad(layer(x)[0].square().sum(), [parameter])
        assert torch.equal(alone, whole[name])
        layer.zero_grad()
        x.grad = None
        layer(x)[0].square().sum().backward(inputs=[parameter])
        assert torch.equal(parameter.grad, whole[name])
        assert x.grad is None
        assert [n for n, p in named.items() if p.grad is not None] == [name]


def test_frozen_parameters_get_none_and_change_nothing() -> None:
    layer = build("softmax", **EXPERTS["biases"])
    x = inputs().detach()
    layer(x)[0].square().sum().backward()
    expected = {name: parameter.grad for name, parameter in layer.named_parameters()}
    for frozen in ("router", "experts.w_in", "experts.b_"):
        layer.zero_grad()
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        layer(x)[0].square().sum().backward()
        for name, parameter in layer.named_parameters():
            if name.startswith(frozen):
                assert parameter.grad is None
            else:
                assert torch.equal(parameter.grad, expected[name])


def test_hooks_run_once_and_see_what_passes() -> None:
    layer, x = build("softmax", **EXPERTS["shared"]), inputs()
    seen: dict[str, list[Any]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *arguments: seen.setdefault(name, []).append(arguments[-1])

    for name in ("router", "experts", "dispatcher", "shared"):
        layer.get_submodule(name).register_forward_hook(note(name))
    layer.register_forward_hook(note("layer"))
    layer.experts.register_full_backward_hook(note("experts_gradient"))
    for name, parameter in layer.named_parameters():
        parameter.register_post_accumulate_grad_hook(note(name))
    y, routing = layer(x)
    y.square().sum().backward()
    assert all(len(calls) == 1 for calls in seen.values())
    assert seen["router"][0] is routing
    assert seen["layer"][0][0] is y
    assert seen["experts"][0].shape == (48, D)
    assert seen["experts_gradient"][0][0].shape == (48, D)
    assert seen.keys() >= {name for name, _ in layer.named_parameters()}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_numbers_are_the_same(context: Callable[[], Any]) -> None:
    layer, x = build("gshard", **EXPERTS["shared"]), inputs()
    expected = layer(x)[0]
    with context():
        y, routing = layer(x.detach())
    assert torch.equal(y, expected)
    assert not any(t.requires_grad for t in (y, *routing) if isinstance(t, Tensor))


def test_autocast_leaves_float64_alone_as_linear_does() -> None:
    module, x = MoE(8, 12, 6, dtype=torch.float64, shared_d_ff=4), torch.randn(5, 8, dtype=torch.float64)
    expected = module(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x)[0], expected)


@pytest.mark.parametrize("name", ["jitter", "sampling", "random"])
def test_routers_that_draw_from_a_seed_compile_whole_and_at_most_twice(name: str) -> None:
    """A seed is a tensor, so new noise is no new graph; it draws what a generator of that seed draws."""
    made = {
        "jitter": lambda: TopKRouter(8, 6, 2, jitter=0.2),
        "sampling": lambda: GShardRouter(8, 6, second_policy="sampling"),
        "random": lambda: GShardRouter(8, 6, second_policy="random"),
    }[name]()
    layer = MoE(8, 12, 6, router=made)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step, t in enumerate((8, 12, 13, 30, 7)):
        x = torch.randn(t, 8, requires_grad=True)
        y, routing = compiled(x, generator=torch.tensor(step))
        expected, eager = layer(x, generator=torch.Generator().manual_seed(step))
        assert torch.equal(routing.expert_indices, eager.expert_indices)
        assert torch.equal(routing.kept, eager.kept)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)
        upstream = torch.randn_like(y)
        leaves = [x, *layer.parameters()]
        for ours, theirs in zip(
            torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2


def test_a_seed_is_one_integer() -> None:
    layer = MoE(8, 12, 6, router=TopKRouter(8, 6, 2, jitter=0.2))
    with pytest.raises(ValueError, match=r"a seed \(torch.float32, \(2,\)\) must be one int64 number"):
        layer(torch.randn(3, 8), generator=torch.zeros(2))
