"""The expert networks of the GPU path, in Triton's interpreter, against the reference. Started by test_triton.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe.kernels import launch
from moe.kernels.expert_ffn import expert_ffn, routed_expert_ffn, triton_impl, triton_op
from moe.kernels.grouped_gemm import triton_impl as products
from moe.kernels.grouped_gemm import triton_tiles
from moe.kernels.permute import permute, sort_by_expert, unpermute
from moe.layers import MoE
from moe.layers.initialization import WeightInit

Compare = Callable[[Tensor, Tensor], None]
D, F, E = 19, 35, 4
LOADS = {"odd": [1, 19, 2, 5], "empty_first_middle_last": [0, 18, 0, 3, 0], "one_hot": [0, 0, 21, 0], "nothing": [0, 0]}
NAMES = ("w_in", "w_gate", "w_out", "b_in", "b_out")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in each direction at sizes that an interpreter can afford."""
    tile = triton_tiles.Tile(rows=16, columns=32, inner=16, num_warps=1, num_stages=1, per_processor=1)
    for module in (products, triton_impl):
        monkeypatch.setattr(module, "choose_tile", lambda *_: tile)


def draw(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def experts_of(count: int, *, gated: bool, bias: bool, dtype: torch.dtype) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(count)
    return {
        "w_in": draw(generator, dtype, count, F, D),
        "w_gate": draw(generator, dtype, count, F, D) if gated else None,
        "w_out": draw(generator, dtype, count, D, F),
        "b_in": draw(generator, dtype, count, F) if bias else None,
        "b_out": draw(generator, dtype, count, D) if bias else None,
    }


def wide(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {n: None if t is None else t.detach().double().requires_grad_() for n, t in tensors.items()}


def with_gradients(y: Tensor, leaves: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Output and gradients by name."""
    present = {name: tensor for name, tensor in leaves.items() if tensor is not None}
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return {
        "y": y.detach(),
        **dict(zip(present, torch.autograd.grad(y, list(present.values()), upstream), strict=True)),
    }


def plain(tensors: dict[str, Tensor | None], load: list[int], activation: str, backend: str) -> dict[str, Tensor]:
    offsets = torch.tensor([0, *load]).cumsum(0)
    experts = [tensors[name] for name in NAMES]
    y = expert_ffn(tensors["rows"], offsets, *experts, activation=activation, backend=backend)
    return with_gradients(y, tensors)


VARIANTS = [(False, True, "gelu"), (True, False, "silu"), (True, True, "relu"), (False, False, "gelu_tanh")]


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize(("gated", "bias", "activation"), VARIANTS)
def test_output_and_every_gradient(
    load: list[int], gated: bool, bias: bool, activation: str, assert_equal_to_scale: Compare, poisoned_memory: None
) -> None:
    tensors = experts_of(len(load), gated=gated, bias=bias, dtype=torch.float32)
    tensors["rows"] = draw(torch.Generator().manual_seed(1), torch.float32, sum(load), D)
    expected = plain(wide(tensors), load, activation, "reference")
    actual = plain(tensors, load, activation, "triton")
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == torch.float32
        assert_equal_to_scale(actual[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype, assert_equal_to_scale: Compare, poisoned_memory: None) -> None:
    load = [3, 0, 17]
    tensors = experts_of(3, gated=True, bias=True, dtype=dtype)
    tensors["rows"] = draw(torch.Generator().manual_seed(1), dtype, sum(load), D)
    expected = plain(wide(tensors), load, "silu", "reference")
    actual = plain(tensors, load, "silu", "triton")
    for name in expected:
        assert actual[name].dtype == dtype
        assert_equal_to_scale(actual[name], expected[name])


@pytest.mark.parametrize(
    ("gated", "bias", "activation", "dtype"), [(*VARIANTS[0], torch.float32), *((*v, torch.float16) for v in VARIANTS)]
)
def test_weights_by_descriptor_give_the_bits_of_pointers(
    gated: bool, bias: bool, activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """Both fused kernels, and the products beside them: output and every gradient, rows given and rows gathered."""
    generator = torch.Generator().manual_seed(3)
    d, f, load = 24, 40, [3, 0, 17]
    order = sort_by_expert(torch.tensor([[0, 2], [2, 0], [2, 1]]), torch.rand(3, 2) < 2, 3, backend="torch")
    shapes = ((3, f, d), (3, f, d) if gated else None, (3, d, f), (3, f) if bias else None, (3, d) if bias else None)
    experts = [None if shape is None else draw(generator, dtype, *shape) for shape in shapes]
    present = [tensor for tensor in experts if tensor is not None]
    rows, x = draw(generator, dtype, sum(load), d), draw(generator, dtype, 3, d)
    weights = draw(generator, torch.float32, 3, 2)
    results, loads = [], []

    def noted(kernel: object, grid: tuple[int, ...], **arguments: object) -> None:
        loads.append(arguments.get("LOADS", arguments.get("DESCRIBED", "no product")))
        launch.launch(kernel, grid, **arguments)

    for module in (products, triton_impl):
        monkeypatch.setattr(module, "launch", noted)
    for capability in (80, 90):
        loads.clear()
        for module in (products, triton_impl):
            monkeypatch.setattr(module, "capability_of", lambda device, capability=capability: capability)
        offsets = torch.tensor([0, *load]).cumsum(0)
        y = expert_ffn(rows, offsets, *experts, activation=activation, backend="triton")
        z = routed_expert_ffn(x, weights, order, *experts, activation=activation, backend="triton")
        upstream = [torch.linspace(-0.1, 0.1, t.numel()).view_as(t).to(dtype) for t in (y, z)]
        gradients = torch.autograd.grad([y, z], [rows, x, weights, *present], upstream)
        results.append([y.detach(), z.detach(), *gradients])
        used = {load for load in loads if load != "no product"}
        assert used == ({"pointers", False} if capability == 80 else {"nk", "kn", True})
    assert all(tensor.isfinite().all() for tensor in results[0])
    assert all(map(torch.equal, *results))


def routing(t: int, k: int, kept_fraction: float, experts: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t * 10 + k)
    indices = torch.tensor(experts)[torch.randint(len(experts), (t, k), generator=generator)]
    return indices, torch.rand(t, k, generator=generator) < kept_fraction


ROUTINGS = {
    "some_dropped": routing(11, 2, 0.7, [0, 1, 3]),
    "one_hot": routing(17, 1, 1.1, [2]),
    "eight_choices": routing(3, 8, 1.1, [0, 1, 2, 3]),
    "no_tokens": routing(0, 2, 1.1, [0]),
    "one_token": routing(1, 2, 1.1, [0, 3]),
    "all_dropped": routing(4, 2, -1.0, [0]),
}


def routed(tensors: dict[str, Tensor | None], case: str, activation: str, backend: str) -> dict[str, Tensor]:
    order = sort_by_expert(*ROUTINGS[case], E, backend="torch")
    experts = [tensors[name] for name in NAMES]
    y = routed_expert_ffn(tensors["x"], tensors["weights"], order, *experts, activation=activation, backend=backend)
    return with_gradients(y, tensors)


def routed_problem(case: str, gated: bool, bias: bool, dtype: torch.dtype) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    t, k = ROUTINGS[case][0].shape
    tensors = experts_of(E, gated=gated, bias=bias, dtype=dtype)
    return {"x": draw(generator, dtype, t, D), "weights": draw(generator, torch.float32, t, k), **tensors}


@pytest.mark.parametrize("case", ROUTINGS)
@pytest.mark.parametrize(("gated", "bias", "activation"), VARIANTS)
def test_there_through_the_experts_and_back(
    case: str, gated: bool, bias: bool, activation: str, assert_equal_to_scale: Compare, poisoned_memory: None
) -> None:
    """The oracle is a loop over tokens and choices in float64, written out here."""
    tensors = routed_problem(case, gated, bias, torch.float32)
    exact = wide(tensors)
    expected = with_gradients(loop_over_tokens(exact, case, activation), exact)
    actual = routed(tensors, case, activation, "triton")
    for name in expected:
        assert actual[name].dtype == torch.float32
        assert_equal_to_scale(actual[name], expected[name])


def loop_over_tokens(tensors: dict[str, Tensor | None], case: str, activation: str) -> Tensor:
    tanh = torch.nn.GELU(approximate="tanh")
    act = {"gelu": torch.nn.GELU(), "gelu_tanh": tanh, "relu": torch.nn.ReLU(), "silu": torch.nn.SiLU()}[activation]
    indices, kept = ROUTINGS[case]
    y = 0.0 * tensors["x"] + 0.0 * sum(t.sum() for t in tensors.values() if t is not None)  # every leaf has a gradient
    rows = list(y.unbind(0))
    for t, k in kept.nonzero().tolist():
        w_in, w_gate, w_out, b_in, b_out = (
            None if tensors[name] is None else tensors[name][indices[t, k]] for name in NAMES
        )
        x = tensors["x"][t]
        hidden = w_in @ x if b_in is None else w_in @ x + b_in
        inner = act(hidden) if w_gate is None else act(w_gate @ x) * hidden
        out = w_out @ inner if b_out is None else w_out @ inner + b_out
        rows[t] = rows[t] + tensors["weights"][t, k] * out
    return torch.stack(rows) if rows else y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_routed_in_half_precision(dtype: torch.dtype, assert_equal_to_scale: Compare, poisoned_memory: None) -> None:
    tensors = routed_problem("some_dropped", True, True, dtype)
    expected = routed(wide(tensors), "some_dropped", "silu", "reference")
    actual = routed(tensors, "some_dropped", "silu", "triton")
    for name in expected:
        assert_equal_to_scale(actual[name].to(dtype), expected[name])
    assert actual["weights"].dtype == torch.float32


def test_the_composition_of_the_other_backends_is_the_same_function(assert_equal_to_scale: Compare) -> None:
    tensors = routed_problem("some_dropped", True, True, torch.float64)
    tensors["weights"] = tensors["weights"].detach().double().requires_grad_()
    results = {
        backend: routed(tensors, "some_dropped", "silu", backend) for backend in ("triton", "torch", "reference")
    }
    for name, expected in results["reference"].items():
        for backend in ("torch", "triton"):
            assert_equal_to_scale(results[backend][name], expected)


def test_weights_of_dropped_slots_are_not_read() -> None:
    tensors = routed_problem("some_dropped", False, True, torch.float32)
    kept = ROUTINGS["some_dropped"][1]
    clean = routed(tensors, "some_dropped", "gelu", "triton")
    tensors["weights"] = torch.where(kept, tensors["weights"].detach(), torch.nan).requires_grad_()
    poisoned = routed(tensors, "some_dropped", "gelu", "triton")
    assert all(torch.equal(poisoned[name], clean[name]) for name in clean)
    assert not poisoned["weights"][~kept].any()


def test_gradients_of_any_stride(assert_equal_to_scale: Compare) -> None:
    """Stride 0 from .sum(), through both ops."""
    tensors = routed_problem("some_dropped", True, False, torch.float32)
    order = sort_by_expert(*ROUTINGS["some_dropped"], E)
    experts = [tensors[name] for name in NAMES]
    present = [tensor for tensor in tensors.values() if tensor is not None]
    results = []
    for backend in ("triton", "torch"):
        y = routed_expert_ffn(tensors["x"], tensors["weights"], order, *experts, activation="silu", backend=backend)
        results.append(torch.autograd.grad(y.sum(), present))
    for actual, expected in zip(*results, strict=True):
        assert_equal_to_scale(actual, expected)


def test_what_is_kept_for_the_backward() -> None:
    """Nothing of size R·D: the input, the pre-activation, the parameters and the order."""
    tensors = routed_problem("eight_choices", True, False, torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        routed_expert_ffn(
            tensors["x"],
            tensors["weights"],
            sort_by_expert(*ROUTINGS["eight_choices"], E),
            *(tensors[name] for name in NAMES),
            activation="silu",
            backend="triton",
        )
    assert (24, D) not in sizes
    assert sizes.count((24, F)) == 2


def test_dtypes_that_differ_are_refused() -> None:
    tensors = routed_problem("one_token", False, False, torch.float32)
    tensors["x"] = tensors["x"].detach().half()
    with pytest.raises(
        ValueError, match=r"rows \(torch.float16\) and weights \(torch.float32\) must have the same dtype"
    ):
        routed(tensors, "one_token", "gelu", "triton")
    tensors["rows"] = tensors["x"]
    with pytest.raises(ValueError, match="must have the same dtype"):
        plain(tensors, [1, 0, 0, 0], "gelu", "triton")


def test_a_compiler_sees_opaque_ops() -> None:
    """The shapes that the ops promise are the shapes they give; compiled and eager results are equal to the bit."""
    tensors = routed_problem("some_dropped", True, True, torch.float32)
    order = sort_by_expert(*ROUTINGS["some_dropped"], E, backend="triton")
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def loss(x: Tensor, weights: Tensor, *experts: Tensor) -> Tensor:
        y = triton_op.run(x, weights, order, order.expert_offsets, *experts, "silu")
        rows = permute(y, order, backend="triton")
        rows = triton_op.run(rows, None, None, order.expert_offsets, *experts, "silu")
        return unpermute(rows, weights, order, backend="triton").square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(*present.values())
        results.append([value.detach(), *torch.autograd.grad(value, list(present.values()))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("options", [{}, {"gated": True, "bias": True, "shared_d_ff": 5}, {"dropout": 0.3}], ids=str)
def test_the_layer_runs_on_these_kernels(
    options: dict[str, object], assert_equal_to_scale: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole MoE: fused while nothing drops out between the experts and their sum, else one op after the other."""
    fused = []
    run = triton_op.run
    monkeypatch.setattr(triton_op, "run", lambda *args: fused.append(args[1] is not None) or run(*args))
    results = []
    for backend in ("triton", "torch"):
        layer = MoE(D, 24, E, 2, capacity_factor=0.9, backend=backend, **options)
        layer.reset_parameters(seed=0, init=WeightInit(std=0.5))
        x = torch.randn(13, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(1)
        y, _ = layer(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        results.append([y.detach(), *gradients])
    assert fused == ["dropout" not in options]
    for actual, expected in zip(*results, strict=True):
        assert_equal_to_scale(actual, expected)


def test_the_tanh_form_holds_far_from_zero(assert_equal_to_scale: Compare) -> None:
    """Where its cube is large the sigmoid is 0 or 1, and the slope has no 0 · infinity."""
    far = torch.tensor([-1e4, -30.0, -6.0, -0.0, 0.0, 6.0, 30.0, 1e4], dtype=torch.float32)
    tensors: dict[str, Tensor | None] = dict.fromkeys(NAMES)
    for name in ("w_in", "w_out"):
        tensors[name] = torch.ones(1, 1, 1, requires_grad=True)
    tensors["rows"] = far[:, None].clone().requires_grad_()
    expected = plain(wide(tensors), [8], "gelu_tanh", "reference")
    actual = plain(tensors, [8], "gelu_tanh", "triton")
    for name in expected:
        assert_equal_to_scale(actual[name], expected[name])
