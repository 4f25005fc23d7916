"""Defects that other libraries shipped around the layer: dtypes, copies, compilation, recomputation, first weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointError, checkpoint

from moe.kernels.permute import sort_by_expert
from moe.layers import Experts, FeedForward, MoE, Routing, TopKRouter, load_balance_loss
from moe.layers.initialization import WeightInit

D, FF, E = 8, 12, 6


def layer(num_experts: int = E, **options: object) -> MoE:
    made = MoE(D, FF, num_experts, **options)
    made.reset_parameters(seed=0, init=WeightInit(std=0.5))
    return made


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_autocast_gives_a_linear_layers_dtype(weights: torch.dtype, inputs: torch.dtype) -> None:
    """scattermoe#17, transformers#43828: under autocast the grouped product refused mixed dtypes, or gave the next
    layer one that it refused."""
    module = layer(bias=True, gated=True, shared_d_ff=4, shared_gate=True).to(weights)
    linear = nn.Linear(D, D).to(weights)
    x = torch.randn(7, D, dtype=inputs, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)[0]
        assert y.dtype == linear(x).dtype == torch.bfloat16
        linear(y).float().sum().backward()
    assert x.grad.dtype == inputs
    assert all(parameter.grad.dtype == weights for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_compute_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    """torchtitan models/common/moe.py: experts are cast to bfloat16 whatever the dtype of the model."""
    module = layer(gated=True, dtype=dtype)
    x = torch.randn(16, D, dtype=dtype)
    with torch.no_grad():
        y, routing = module(x)
        expected = torch.zeros(16, D, dtype=torch.float64)
        w_in, w_gate, w_out = (getattr(module.experts, name).double() for name in ("w_in", "w_gate", "w_out"))
        for t, token in enumerate(x.double()):
            for e, weight in zip(routing.expert_indices[t], routing.expert_weights[t].double(), strict=True):
                expected[t] += weight * (w_out[e] @ (F.gelu(w_gate[e] @ token) * (w_in[e] @ token)))
    assert y.dtype == dtype
    error = float((y - expected).abs().max() / expected.abs().max())
    assert error < {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]


def test_a_layer_can_be_copied_and_pickled_after_use() -> None:
    """Tutel#177, Megatron-DeepSpeed#380: deepcopy for an average of the weights failed on what the module held."""
    module = layer(router=TopKRouter(D, E, scores="sigmoid", bias_balanced=True))
    x = torch.randn(9, D)
    y, routing = module(x)
    y.sum().backward()
    average, thawed = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    module.router.update_bias([routing], rate=10.0)
    with torch.no_grad():
        module.experts.w_in.zero_()
    for other in (average, thawed):
        assert torch.equal(other(x)[0], y)
        assert other.router.expert_bias.data_ptr() != module.router.expert_bias.data_ptr()


@pytest.mark.parametrize("seed", [None, 3])
def test_a_layer_from_the_meta_device_is_one_that_was_built(seed: int | None) -> None:
    """Ours: the shared gate was zero when built, and drawn when a layer from the meta device was made real."""
    options = {"shared_d_ff": 4, "shared_gate": True, "gated": True, "bias": True}
    torch.manual_seed(5)
    built = MoE(D, FF, E, **options)
    torch.manual_seed(5)
    real = MoE(D, FF, E, device="meta", **options).to_empty(device="cpu")
    for layer in (built, real) if seed is not None else (real,):
        layer.reset_parameters(seed)
    assert 0.002 < float(built.shared_gate.detach().std()) < 0.1  # transformers' Qwen2MoePreTrainedModel: N(0, 0.02²)
    for (name, a), (_, b) in zip(built.named_parameters(), real.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_shared_gate_is_drawn_when_a_meta_layer_is_made_real() -> None:
    """Megatron-LM#4749: the weight of the shared expert's gate stayed on the meta device."""
    options = {"shared_d_ff": 4, "shared_gate": True, "gated": True, "bias": True}
    expected = layer(**options).state_dict()
    module = layer(device="meta", **options).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    module.reset_parameters(seed=0, init=WeightInit(std=0.5))
    assert module.shared_gate.any()
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


def test_no_two_experts_start_equal_and_none_depends_on_its_neighbours() -> None:
    """fastmoe#4: one seed for every worker made all experts start equal; seeding by rank ties them to the ranks."""
    few, many = layer(4).experts, layer(16).experts
    for name in ("w_in", "w_out"):
        weights = getattr(many, name).detach()
        for e in range(16):
            assert not any(torch.equal(weights[e], weights[other]) for other in range(e))
        assert torch.equal(getattr(few, name), weights[:4])


@pytest.mark.parametrize("gated", [False, True])
def test_an_idle_expert_has_a_gradient_of_zero(gated: bool) -> None:
    """DeepSpeed#4808, #4966: an expert without tokens took no part in backward, and the other ranks waited for it."""
    module = layer(gated=gated, bias=True)
    with torch.no_grad():
        module.router.weight.zero_()  # equal scores: experts 0 and 1 take everything
    for num_tokens in (5, 0):
        module.zero_grad(set_to_none=True)
        module(torch.randn(num_tokens, D))[0].sum().backward()
        for parameter in module.experts.parameters():
            assert parameter.grad is not None
            assert not parameter.grad[2:].any()
            assert bool(parameter.grad[:2].any()) == (num_tokens > 0)


def test_the_shared_network_is_added_not_averaged() -> None:
    """OLMo-core nn/moe/moe.py: routed and shared outputs are averaged, which no public checkpoint means."""
    module = layer(shared_d_ff=5)
    x = torch.randn(9, D)
    routed = layer()
    routed.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("shared")})
    shared = FeedForward(D, 5)
    shared.load_state_dict(module.shared.state_dict())
    torch.testing.assert_close(module(x)[0], routed(x)[0] + shared(x), rtol=1e-6, atol=1e-6)


def test_rows_of_an_expert_are_in_the_order_of_the_tokens() -> None:
    """scattermoe parallel_experts.py, fastmoe cuda/local_exchange.cuh: an unstable sort, or atomics, order the rows."""
    num_tokens, num_experts = 3000, 4
    indices = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(0)).topk(2).indices
    kept = torch.ones_like(indices, dtype=torch.bool)
    order = sort_by_expert(indices, kept, num_experts)
    for start, end in zip(order.expert_offsets[:-1], order.expert_offsets[1:], strict=True):
        rows = order.slot_of_row[start:end]
        assert (rows.diff() > 0).all()
    assert torch.equal(indices.flatten()[order.slot_of_row], indices.flatten().sort().values)


@pytest.mark.parametrize("training", [True, False])
def test_one_graph_serves_any_load_of_the_experts(training: bool) -> None:
    """prime-rl#996, torchtitan#1364, #2312: counts read by Python broke the graph, experts without tokens made a new
    one."""
    torch._dynamo.reset()
    module = layer(gated=True).train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for spread in (1.0, 100.0, 0.0):  # some, nearly one, exactly two experts
        x = spread * torch.randn(1, D) + torch.randn(10, D) if spread else torch.zeros(10, D)
        y, routing = compiled(x.requires_grad_(training))
        torch.testing.assert_close(y, module(x)[0], rtol=1e-6, atol=1e-6)
        if training:
            y.sum().backward()
    assert (routing.tokens_per_expert == 0).sum() == E - 2
    assert counter.frame_count == 1


def test_a_changing_number_of_tokens_compiles_twice() -> None:
    """torchtitan#2007: a number of tokens taken for a constant costs compilations and, with recomputation, graphs that
    do not fit (#1971)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer(capacity_factor=1.0), backend=counter, fullgraph=True)
    for num_tokens in (16, 9, 33, 12, 40, 7):
        compiled(torch.randn(num_tokens, D, requires_grad=True))[0].sum().backward()
    assert counter.frame_count == 2  # one for 16 tokens, one for any number


class Drifting(nn.Module):
    """Sees another input when it is computed again, as behind sums of no fixed order, but far enough to route anew."""

    def __init__(self, module: MoE, recorded: Routing | None = None) -> None:
        super().__init__()
        self.module = module
        self.recorded = recorded
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.module(x if self.calls == 1 else -x, routing=self.recorded)[0]


def test_a_recorded_routing_pins_the_rows_of_a_recomputed_layer() -> None:
    """Automodel#2635, torchtitan#1117: recomputation routed other numbers of tokens to the experts, and the shapes of
    what had been saved no longer matched."""
    module = layer(capacity_factor=0.5)
    x = (1.0 + torch.randn(24, D)).requires_grad_()
    recorded, other = module(x)[1], module(-x)[1]
    assert int(other.kept.sum()) != int(recorded.kept.sum())
    with pytest.raises(CheckpointError, match="different metadata"):
        checkpoint(Drifting(module), x, use_reentrant=False).sum().backward()
    x.grad = None
    pinned = Drifting(module, recorded)
    checkpoint(pinned, x, use_reentrant=False).sum().backward()
    assert pinned.calls == 2
    assert x.grad.any()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_square_experts_have_the_orientation_of_linear(backend: str) -> None:
    """transformers#47031: expert matrices of as many rows as columns were loaded transposed; no shape could tell."""
    experts = Experts(D, D, 2, gated=True, activation="silu", bias=True, backend=backend)
    experts.reset_parameters(seed=0, init=WeightInit("fairseq"))  # biases included
    w_in, w_gate, w_out = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, D)
    with torch.no_grad():
        for name, linear in (("in", w_in), ("gate", w_gate), ("out", w_out)):
            linear.weight.copy_(getattr(experts, f"w_{name}")[1])
            if linear.bias is not None:
                linear.bias.copy_(getattr(experts, f"b_{name}")[1])
    rows = torch.randn(3, D)
    expected = w_out(F.silu(w_gate(rows)) * w_in(rows))
    torch.testing.assert_close(experts(rows, torch.tensor([0, 0, 3])), expected, rtol=1e-5, atol=1e-6)


def test_experts_alone_say_what_they_need() -> None:
    """Ours: a bare AssertionError from a public module."""
    experts = Experts(D, FF, E, dropout=0.1)
    rows = torch.zeros(4, D)
    with pytest.raises(ValueError, match=r"needs expert_offsets \(E\+1,\) int64"):
        experts(rows)
    order = sort_by_expert(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1, dtype=torch.bool), E)
    with pytest.raises(ValueError, match="cannot apply dropout"):
        experts(rows, order=order, expert_weights=torch.ones(4, 1))
    assert experts.eval()(rows, order=order, expert_weights=torch.ones(4, 1)).shape == rows.shape


def test_recomputation_that_is_not_reentrant_keeps_auxiliary_gradients() -> None:
    """What MoE's docstring says of torch.utils.checkpoint: the reentrant one looks for tensors at the top alone."""
    module, x = layer(), torch.randn(9, D, requires_grad=True)

    def gradient(routing: Routing) -> Tensor:
        return torch.autograd.grad(load_balance_loss(routing), module.router.weight)[0]

    expected = gradient(module(x)[1])
    assert torch.equal(gradient(checkpoint(module, x, use_reentrant=False)[1]), expected)
    assert not checkpoint(module, x, use_reentrant=True)[1].router_probs.requires_grad
