"""What evaluation promises a sequence about its batch mates, as strongly as it is true.

Of the choices: everything. Of the numbers: no other sequence takes part in them, and they repeat bit for bit as long as
every expert gets as many rows, whatever those hold. Only where the number of an expert's rows changes may a matrix
product round otherwise, as any BLAS does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.config import ModelConfig, MoEConfig
from moe.layers import ExpertChoiceRouter, GShardRouter, MoE, TopKRouter
from moe.layers.initialization import WeightInit
from moe.layers.router import Router
from moe.model import ModelOutput, Transformer

B, S, D, FF, E = 4, 7, 16, 24, 6
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of the largest magnitude
ROUTERS: dict[str, Callable[[torch.dtype], Router]] = {
    "softmax": lambda dtype: TopKRouter(D, E, capacity_factor=0.3, dtype=dtype),
    "sigmoid": lambda dtype: TopKRouter(
        D, E, 3, scores="sigmoid", num_groups=3, top_groups=2, bias_balanced=True, dtype=dtype
    ),
    "jitter": lambda dtype: TopKRouter(D, E, jitter=0.3, dtype=dtype),
    "gshard": lambda dtype: GShardRouter(D, E, second_policy="random", batch_prioritized=True, dtype=dtype),
    "fairscale": lambda dtype: GShardRouter(D, E, rules="fairscale", dtype=dtype),  # B·S need not divide by E here
}


def build(router: Router, dtype: torch.dtype, backend: str = "auto") -> MoE:
    layer = MoE(D, FF, E, router.top_k, router=router, gated=True, shared_d_ff=5, dtype=dtype, backend=backend)
    layer.reset_parameters(seed=0, init=WeightInit(std=0.5))
    return layer.eval()


def sequences(dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_mates(x: Tensor, mates: Tensor) -> Tensor:
    """The first sequence of x in the company of others."""
    return torch.cat([x[:1], mates[1:]])


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_sequence_alone_chooses_the_same_and_differs_by_rounding(router: str, dtype: torch.dtype) -> None:
    layer, x = build(ROUTERS[router](dtype), dtype), sequences(dtype)
    x[1:] = x[0, 0]  # the mates all want the same experts
    together, routing = layer(x)
    alone, own = layer(x[:1])
    assert torch.equal(routing.expert_indices[:S], own.expert_indices)
    assert torch.equal(routing.kept[:S], own.kept)
    assert own.kept.all()
    assert error(routing.expert_weights[:S], own.expert_weights) < TOLERANCE[dtype]
    assert error(together[0], alone[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_same_number_of_rows_gives_the_same_bits(dtype: torch.dtype, backend: str) -> None:
    """The routing is recorded, so that the mates' numbers change and no count does."""
    layer, x = build(ROUTERS["softmax"](dtype), dtype, backend), sequences(dtype)
    y, routing = layer(x)
    for mates in (sequences(dtype, seed=1), 1e4 * sequences(dtype, seed=2), torch.zeros_like(x)):
        other = layer(with_mates(x, mates), routing=routing)[0]
        assert torch.equal(other[0], y[0])
        assert not torch.equal(other[1], y[1])


@pytest.mark.parametrize("router", ROUTERS)
def test_masked_mates_leave_no_trace_whatever_they_hold(router: str) -> None:
    layer, x = build(ROUTERS[router](torch.float32), torch.float32), sequences(torch.float32)
    mask = torch.arange(B)[:, None].expand(B, S) == 0
    y = layer(x, token_mask=mask)[0]
    for filling in (0.0, torch.nan, torch.inf):
        other, routing = layer(with_mates(x, torch.full_like(x, filling)), token_mask=mask)
        assert torch.equal(other, y)
        assert int(routing.tokens_per_expert.sum()) == S * layer.router.top_k


@pytest.mark.parametrize("router", ROUTERS)
def test_no_gradient_passes_from_one_sequence_to_another(router: str) -> None:
    layer, x = build(ROUTERS[router](torch.float32), torch.float32), sequences(torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0][0].square().sum(), [x])
    assert gradient[0].all()
    assert not gradient[1:].any()


@pytest.mark.parametrize(
    "router",
    [
        TopKRouter(D, E, capacity_factor=0.3),
        TopKRouter(D, E, eval_capacity_factor=0.3),
        GShardRouter(D, E, eval_capacity_fraction=0.05),
        ExpertChoiceRouter(D, E),
    ],
    ids=["training", "eval_capacity", "eval_fraction", "expert_choice"],
)
def test_where_a_capacity_is_asked_for_mates_do_count(router: Router) -> None:
    """The documented exceptions, and proof that the tests above could fail."""
    layer, x = build(router, torch.float32), sequences(torch.float32)
    layer.train(getattr(router, "capacity_factor", None) == 0.3)
    x[1:] = x[0, 0]
    crowded = torch.cat([x[1:], x[:1]])  # the sequence comes last
    assert error(layer(crowded)[0][-1], layer(x[:1])[0][0]) > 0.01


MODELS: dict[str, dict[str, object]] = {
    "softmax_capacity": {"capacity_factor": 0.2},
    "sigmoid_bias_groups": {
        "scores": "sigmoid",
        "num_experts": 6,
        "num_groups": 3,
        "top_groups": 2,
        "bias_balance_rate": 0.1,
        "weight_scale": 2.5,
    },
    "jitter_shared": {"jitter": 0.3, "shared_d_ff": 5, "shared_gate": True},
    "gshard": {"router": "gshard", "second_policy": "random"},
}


@pytest.fixture(params=MODELS)
def model(
    request: pytest.FixtureRequest, model_config: Callable[..., ModelConfig], moe_config: MoEConfig
) -> Transformer:
    config = model_config(sparse=True, moe_placement="first", moe=replace(moe_config, **MODELS[request.param]))
    made = Transformer(config, dtype=torch.float64)
    made.reset_parameters(seed=0)
    with torch.no_grad():
        made.embedding.weight.mul_(20)
        for name, buffer in made.named_buffers():
            assert name.endswith("expert_bias")
            buffer.copy_(torch.linspace(-0.2, 0.2, buffer.numel()))
    return made.eval()


def tokens(batch: int = 3, length: int = 10) -> Tensor:
    return torch.randint(37, (batch, length), generator=torch.Generator().manual_seed(4))


def test_decoding_token_by_token_equals_the_whole_sequence(model: Transformer) -> None:
    """Logits and the experts of every token, with a cache, for prompts of unequal length."""
    whole: ModelOutput = model(tokens())
    padding = torch.tensor([0, 2, 1])
    cache = model.new_cache(3, 12, padding)
    padded = torch.zeros(3, 12, dtype=torch.int64)
    for row, skip in enumerate(padding.tolist()):
        padded[row, skip : skip + 10] = tokens()[row]
    steps = [model(padded[:, i : i + 1], cache=cache) for i in range(12)]
    for row, skip in enumerate(padding.tolist()):
        logits = torch.stack([step.logits[row, 0] for step in steps[skip : skip + 10]])
        torch.testing.assert_close(logits, whole.logits[row], rtol=1e-10, atol=1e-10)
        for layer, routing in enumerate(whole.routings):
            chosen = torch.stack([step.routings[layer].expert_indices[row] for step in steps[skip : skip + 10]])
            assert torch.equal(chosen, routing.expert_indices.view(3, 10, -1)[row])


def test_a_sequence_of_the_model_does_not_depend_on_its_mates(model: Transformer) -> None:
    alone, embedded = model(tokens()[:1]), []
    model.embedding.register_forward_hook(lambda module, arguments, output: embedded.append(output))
    together = model(tokens())
    torch.testing.assert_close(together.logits[:1], alone.logits, rtol=1e-10, atol=1e-10)
    for routing, own in zip(together.routings, alone.routings, strict=True):
        assert torch.equal(routing.expert_indices[:10], own.expert_indices)
    (gradient,) = torch.autograd.grad(together.logits[0].square().sum(), embedded)
    assert gradient[0].any()
    assert not gradient[1:].any()
