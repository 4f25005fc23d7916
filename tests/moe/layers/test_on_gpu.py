"""The layer on a GPU: every dtype, compiled whole, without waits of the host, in the memory that the formula says.

`pytest -m gpu` runs these and nothing else; without a GPU they are skipped, and the count is printed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moe.kernels.backend import choose_backend
from moe.layers import ExpertChoiceRouter, GShardRouter, MoE, Routing, TopKRouter, load_balance_loss, router_z_loss
from moe.layers.initialization import WeightInit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run pytest -m gpu on a machine with one"),
]

DEVICE = "cuda"
D, F, E, T, K = 96, 144, 8, 200, 2
# relative to the largest magnitude of the reference, which is in float64
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top1": {"top_k": 1},
    "capacity": {"capacity_factor": 0.7},
    "swiglu": {"gated": True, "activation": "silu"},
    "biases": {"bias": True, "activation": "relu", "capacity_factor": 0.7},
    "shared": {"shared_d_ff": 24, "shared_gate": True, "gated": True, "bias": True},
}


def build(dtype: torch.dtype = torch.float32, **options: Any) -> MoE:
    layer = MoE(D, F, E, **{"top_k": K, **options}, backend="triton", device=DEVICE, dtype=dtype)
    layer.reset_parameters(seed=1, init=WeightInit("fairseq"))
    return layer


def inputs(dtype: torch.dtype = torch.float32, num_tokens: int = T) -> Tensor:
    x = torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(num_tokens), dtype=torch.float64)
    return x.to(DEVICE, dtype).requires_grad_()


def loss_of(y: Tensor, routing: Routing) -> Tensor:
    wide = y.double() if y.dtype == torch.float64 else y.float()
    return wide.square().sum() + load_balance_loss(routing) + 0.1 * router_z_loss(routing)


def with_gradients(layer: MoE, x: Tensor, **options: Any) -> list[Tensor]:
    """The output, the gradient of x and those of the parameters."""
    y, routing = layer(x, **options)
    return [y.detach(), *torch.autograd.grad(loss_of(y, routing), [x, *layer.parameters()])]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        exact = e.detach().double().cpu()
        assert exact.any()
        torch.testing.assert_close(a.detach().double().cpu(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))


def on_the_cpu(routing: Routing) -> Routing:
    return Routing._make(field.detach().cpu() if isinstance(field, Tensor) else field for field in routing)


def test_auto_is_triton_here() -> None:
    assert choose_backend("routed_expert_ffn", "auto", "cuda", has_triton=True) == "triton"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_every_gradient_are_the_references(name: str, masked: bool, dtype: torch.dtype) -> None:
    """The reference runs on the CPU in float64 and follows the choices made here, near-ties being anybody's."""
    layer, x = build(dtype, **LAYERS[name]), inputs(dtype)
    mask = torch.arange(T, device=DEVICE) % 5 != 2 if masked else None
    y, routing = layer(x, token_mask=mask)
    actual = [y, *torch.autograd.grad(loss_of(y, routing), [x, *layer.parameters()])]
    wide = MoE(D, F, E, **{"top_k": K, **LAYERS[name]}, backend="reference", dtype=torch.float64)
    wide.load_state_dict(copy.deepcopy(layer).double().cpu().state_dict())
    leaf = x.detach().double().cpu().requires_grad_()
    assert_close(actual, with_gradients(wide, leaf, routing=on_the_cpu(routing)), TOLERANCE[dtype])
    assert all(tensor.dtype == dtype for tensor in actual)
    if masked:
        assert not y[~mask].any()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("capacity_factor", [None, 0.7])
def test_the_fused_router_is_the_plain_one(scores: str, capacity_factor: float | None) -> None:
    """Choices, drops and counts are equal: both compare the same logits."""
    fused, plain = (
        TopKRouter(D, E, K, scores=scores, capacity_factor=capacity_factor, backend=backend, device=DEVICE)
        for backend in ("triton", "torch")
    )
    plain.load_state_dict(fused.state_dict())
    mask = torch.arange(T, device=DEVICE) % 5 != 2
    found, expected = fused(inputs(), mask), plain(inputs(), mask)
    for field in ("router_logits", "expert_indices", "chosen", "kept", "tokens_per_expert"):
        assert torch.equal(getattr(found, field), getattr(expected, field)), field
    assert_close([found.router_probs, found.expert_weights], [expected.router_probs, expected.expert_weights], 2e-6)
    assert found.kept.sum() == mask.sum() * K or capacity_factor is not None


def test_the_same_bits_every_time() -> None:
    layer, x = build(torch.bfloat16, **LAYERS["swiglu"], capacity_factor=0.7), inputs(torch.bfloat16)
    first = with_gradients(layer, x)
    assert all(all(map(torch.equal, with_gradients(layer, x), first)) for _ in range(5))


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_compiles_whole_and_at_most_twice(name: str, _fresh_compiler: None) -> None:
    """One static and one dynamic graph, whatever the loads: with a capacity too, no size depends on data."""
    layer = build(**LAYERS[name])
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for num_tokens in (T, 120, 88, 304):
        x = inputs(num_tokens=num_tokens)
        assert_close(with_gradients(compiled, x), with_gradients(layer, x), TOLERANCE[torch.float32])
    assert counter.frame_count == 2


@contextmanager
def waits_are_errors() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


ROUTERS = {
    "groups_and_bias": lambda: TopKRouter(
        D, E, K, scores="sigmoid", num_groups=4, top_groups=2, bias_balanced=True, backend="triton", device=DEVICE
    ),
    "gshard": lambda: GShardRouter(D, E, backend="triton", device=DEVICE),
    "expert_choice": lambda: ExpertChoiceRouter(D, E, backend="triton", device=DEVICE),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [*LAYERS, *ROUTERS, "dropout"])
def test_the_host_waits_for_nothing(name: str, masked: bool) -> None:
    options = LAYERS.get(name, {"dropout": 0.1} if name == "dropout" else {})
    layer = build(**options, **({"router": ROUTERS[name]()} if name in ROUTERS else {}))
    x = inputs()
    mask = torch.arange(T, device=DEVICE) % 5 != 2 if masked else None
    with_gradients(layer, x, token_mask=mask)  # compiles the kernels
    with waits_are_errors():
        gradients = with_gradients(layer, x, token_mask=mask)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_wait_would_be_an_error() -> None:
    x = inputs()
    with waits_are_errors(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()
    with waits_are_errors(), pytest.raises(RuntimeError, match="synchronizing"):
        torch.tensor(3, device=DEVICE)


def test_replays_and_frozen_experts_wait_for_nothing() -> None:
    layer, x = build(**LAYERS["biases"]), inputs()
    layer.experts.requires_grad_(False)
    leaves = [x, layer.router.weight]
    recorded = layer(inputs(num_tokens=T).flip(0))[1]
    for routing in (None, recorded):
        torch.autograd.grad(loss_of(*layer(x, routing=routing)), leaves)
        with waits_are_errors():
            torch.autograd.grad(loss_of(*layer(x, routing=routing)), leaves)


def kept_bytes(num_tokens: int, d_model: int, d_ff: int, num_experts: int, gated: bool, element: int) -> int:
    """What a dropless layer holds after its forward, beside its input and parameters. Nothing of size R·D is in it."""
    rows = num_tokens * K
    router = 4 * (num_tokens + num_experts) * d_model if element == 2 else 0  # input and weight in float32
    routing = 2 * 4 * num_tokens * num_experts + (8 + 4 + 1) * rows + 8 * num_experts
    order = 4 * 8 * rows + 8 * (num_tokens + 1) + 8 * (num_experts + 1)
    hidden = (2 if gated else 1) * rows * d_ff * element
    return router + routing + order + hidden + num_tokens * d_model * element  # and the output


SMALLEST_BLOCK = 512  # bytes, to which CUDA's caching allocator rounds each tensor up
MOST_TENSORS = 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_memory_is_what_the_formula_says(gated: bool, dtype: torch.dtype) -> None:
    sizes = (4096, 512, 1024, 16)
    num_tokens, d_model, d_ff, num_experts = sizes
    options = {"gated": gated, "backend": "triton", "device": DEVICE, "dtype": dtype}
    layer = MoE(d_model, d_ff, num_experts, K, activation="silu", **options)
    x = torch.randn(num_tokens, d_model, device=DEVICE, dtype=dtype).requires_grad_()
    torch.autograd.grad(layer(x)[0].float().sum(), [x, *layer.parameters()])  # compiles the kernels
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y, routing = layer(x)
    kept = torch.cuda.memory_allocated() - before
    expected = kept_bytes(*sizes, gated, x.element_size())
    assert abs(kept - expected) <= MOST_TENSORS * SMALLEST_BLOCK, (kept, expected)
    assert num_tokens * K * d_model * x.element_size() > 2 * MOST_TENSORS * SMALLEST_BLOCK  # one such tensor would show
    del y, routing
    assert torch.cuda.memory_allocated() == before
