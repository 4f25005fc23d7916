"""Outputs and every gradient of the expert networks against the one-expert-at-a-time reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe.kernels.expert_ffn import GradientMemory, expert_ffn, op, torch_impl

D, F = 5, 7
LOADS = {
    "even": [3, 3, 3],
    "odd": [1, 7, 2, 5],
    "empty_first_middle_last": [0, 4, 0, 3, 0],
    "one_hot": [0, 0, 11, 0],
    "one_expert": [6],
    "nothing": [0, 0],
}
NAMES = ("rows", "w_in", "w_gate", "w_out", "b_in", "b_out")


def problem(
    load: list[int], *, gated: bool, bias: bool, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(sum(load) + len(load))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    e = len(load)
    return {
        "rows": draw(sum(load), D),
        "w_in": draw(e, F, D),
        "w_gate": draw(e, F, D) if gated else None,
        "w_out": draw(e, D, F),
        "b_in": draw(e, F) if bias else None,
        "b_out": draw(e, D) if bias else None,
    }


def offsets_of(load: list[int]) -> Tensor:
    return torch.tensor([0, *load]).cumsum(0)


def run(
    tensors: dict[str, Tensor | None],
    load: list[int],
    activation: str,
    backend: str,
    memory: GradientMemory | None = None,
) -> dict[str, Tensor]:
    """Output and gradients by name."""
    rows, *weights = (tensors[name] for name in NAMES)
    options = {"activation": activation, "backend": backend, "gradient_memory": memory}
    y = expert_ffn(rows, offsets_of(load), *weights, **options)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    leaves = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def in_float64(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {n: None if t is None else t.detach().double().requires_grad_() for n, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize(
    ("gated", "bias", "activation"),
    [
        *[(False, True, "gelu"), (True, False, "silu"), (True, True, "relu")],
        *[(False, False, "gelu_tanh"), (True, True, "gelu_tanh")],
    ],
)
def test_output_and_every_gradient(
    load: list[int],
    gated: bool,
    bias: bool,
    activation: str,
    dtype: torch.dtype,
    assert_equal_to_scale: Callable[[Tensor, Tensor], None],
    poisoned_memory: None,
) -> None:
    tensors = problem(load, gated=gated, bias=bias, dtype=dtype)
    expected = run(in_float64(tensors), load, activation, "reference")
    actual = run(tensors, load, activation, "torch")
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == dtype
        assert_equal_to_scale(actual[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_sizes_that_torch_groups(
    load: list[int],
    dtype: torch.dtype,
    assert_equal_to_scale: Callable[[Tensor, Tensor], None],
    monkeypatch: pytest.MonkeyPatch,
    poisoned_memory: None,
) -> None:
    """Widths whose strides are multiples of 16 bytes take another path; both give the reference's result."""
    monkeypatch.setitem(globals(), "D", 16)
    monkeypatch.setitem(globals(), "F", 24)
    tensors = problem(load, gated=True, bias=True, dtype=dtype)
    assert torch_impl._grouped_mm_takes(tensors["rows"], tensors["w_in"]) == (sum(load) > 0)
    expected = run(in_float64(tensors), load, "silu", "reference")
    actual = run(tensors, load, "silu", "torch")
    for name in expected:
        assert_equal_to_scale(actual[name], expected[name])


@pytest.mark.parametrize(
    ("gated", "activation"), [(False, "gelu"), (False, "gelu_tanh"), (False, "relu"), (True, "silu")]
)
def test_the_reference_is_a_loop_over_tokens(gated: bool, activation: str) -> None:
    """Against nn.Linear-style maths written out here, one row at a time."""
    load = LOADS["empty_first_middle_last"]
    t = problem(load, gated=gated, bias=True)
    experts = torch.repeat_interleave(torch.arange(len(load)), torch.tensor(load))
    tanh = torch.nn.GELU(approximate="tanh")
    act = {"gelu": torch.nn.GELU(), "gelu_tanh": tanh, "relu": torch.nn.ReLU(), "silu": torch.nn.SiLU()}[activation]
    y = run(t, load, activation, "reference")["y"]
    for row, e in enumerate(experts.tolist()):
        x = t["rows"][row]
        hidden = t["w_in"][e] @ x + t["b_in"][e]
        hidden = act(t["w_gate"][e] @ x) * hidden if gated else act(hidden)
        torch.testing.assert_close(y[row], t["w_out"][e] @ hidden + t["b_out"][e], rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    tensors = problem([2, 0, 3], gated=True, bias=True)

    def call(*leaves: Tensor) -> Tensor:
        rows, w_in, w_gate, w_out, b_in, b_out = leaves
        return expert_ffn(rows, offsets_of([2, 0, 3]), w_in, w_gate, w_out, b_in, b_out, activation="silu")

    assert torch.autograd.gradcheck(call, [tensors[name] for name in NAMES])


def test_experts_without_rows_have_zero_gradients() -> None:
    gradients = run(problem([0, 4, 0], gated=True, bias=True), [0, 4, 0], "gelu", "torch")
    for name in NAMES[1:]:
        assert not gradients[name][[0, 2]].any()
        assert gradients[name][1].any()


def test_rows_of_any_stride_are_accepted() -> None:
    tensors = problem([2, 3], gated=False, bias=False)
    wide = torch.randn(5, 2 * D, dtype=torch.float64)
    strided, dense = dict(tensors), dict(tensors)
    strided["rows"], dense["rows"] = wide[:, ::2].requires_grad_(), wide[:, ::2].contiguous().requires_grad_()
    a, b = run(strided, [2, 3], "gelu", "torch"), run(dense, [2, 3], "gelu", "torch")
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize(("gated", "activation"), [(True, "silu"), (False, "gelu")])
@pytest.mark.parametrize("memory", [None, GradientMemory()], ids=["", "gradient memory"])
def test_autocast_computes_in_its_dtype_and_gives_the_weights_gradients_in_theirs(
    load: list[int],
    gated: bool,
    activation: str,
    memory: GradientMemory | None,
    assert_equal_to_scale: Callable[[Tensor, Tensor], None],
    poisoned_memory: None,
) -> None:
    tensors = problem(load, gated=gated, bias=True, dtype=torch.float32)
    expected = run(in_float64(tensors), load, activation, "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(tensors, load, activation, "torch", memory)
    assert result["y"].dtype == torch.bfloat16
    assert all(result[name].dtype == torch.float32 for name in result if name != "y")
    for name in expected:
        assert_equal_to_scale(result[name].bfloat16(), expected[name])


@pytest.mark.parametrize("stored_low", [["w_in"], ["w_gate"], ["w_out"], ["w_in", "w_gate", "b_out"]], ids=str)
@pytest.mark.parametrize("memory", [None, GradientMemory()], ids=["", "gradient memory"])
def test_autocast_takes_each_weight_in_a_dtype_of_its_own(
    stored_low: list[str], memory: GradientMemory | None, assert_equal_to_scale: Callable[[Tensor, Tensor], None]
) -> None:
    """Frozen weights may be kept in bfloat16 beside trained ones in float32."""
    load = [3, 0, 2]
    tensors = problem(load, gated=True, bias=True, dtype=torch.float32)
    tensors |= {name: tensors[name].detach().bfloat16().requires_grad_() for name in stored_low}
    expected = run(in_float64(tensors), load, "silu", "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(tensors, load, "silu", "torch", memory)
    for name in expected:
        assert_equal_to_scale(result[name].bfloat16(), expected[name])
        assert name == "y" or result[name].dtype == tensors[name].dtype


def test_weights_of_any_stride_are_accepted(assert_equal_to_scale: Callable[[Tensor, Tensor], None]) -> None:
    strided, w_in = torch.randn(2, 8, 32), torch.empty(2, 8, 16)
    rows, w_out = torch.randn(16, 16), torch.randn(2, 16, 8)
    w_in.copy_(strided[:, :, ::2])
    found, expected = (
        expert_ffn(rows, offsets_of([8, 8]), weight, None, w_out, None, None, activation="gelu")
        for weight in (strided[:, :, ::2], w_in)
    )
    assert_equal_to_scale(found, expected)


@pytest.mark.parametrize("name", ["w_in", "w_gate", "w_out"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_two_dtypes_are_refused(name: str, backend: str) -> None:
    tensors = problem([2, 3], gated=True, bias=False, dtype=torch.float32)
    tensors[name] = tensors[name].bfloat16()
    with pytest.raises(ValueError, match=rf"rows \(torch.float32\) and {name} \(torch.bfloat16\)"):
        run(tensors, [2, 3], "gelu", backend)


MUTATIONS = {
    "zeros": lambda y, load: torch.zeros_like(y),
    "swapped_experts": lambda y, load: torch.cat(
        [y[load[0] : load[0] + load[1]], y[: load[0]], y[load[0] + load[1] :]]
    ),
    "last_row_missing": lambda y, load: torch.cat([y[:-1], torch.zeros_like(y[-1:])]),
    "off_by_one": lambda y, load: y.roll(1, dims=0),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_notices(mutation: str, assert_equal_to_scale: Callable[[Tensor, Tensor], None]) -> None:
    """The assertion of the tests above fails for a wrong result of the usual kinds."""
    load = [3, 2, 4]
    y = run(problem(load, gated=False, bias=True), load, "gelu", "reference")["y"]
    with pytest.raises(AssertionError, match="error"):
        assert_equal_to_scale(MUTATIONS[mutation](y, load), y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, r"activation \('tanh'\) must be one of: gelu, relu, silu"),
        ({"backend": "fast"}, r"backend \('fast'\) of expert_ffn must be one of"),
        ({"expert_offsets": torch.tensor([0, 2, 4])}, r"number of rows \(5\), not from 0 to 4"),
        ({"expert_offsets": torch.tensor([0, 6, 5])}, "must not descend, but the rows of expert 1 run from 6 to 5"),
        ({"expert_offsets": torch.tensor([0, 5])}, r"expert_offsets \(2,\) must be \(3,\)"),
        ({"w_out": torch.zeros(2, F, D)}, r"w_out \(2, 7, 5\) must be \(2, 5, 7\)"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], message: str) -> None:
    t = problem([2, 3], gated=False, bias=False)
    arguments = {**t, "expert_offsets": offsets_of([2, 3]), "activation": "gelu"} | change
    with pytest.raises(ValueError, match=message):
        expert_ffn(**arguments)


def test_activations_of_op_and_reference_agree() -> None:
    assert set(op.ACTIVATIONS) == {"gelu", "gelu_tanh", "relu", "silu"}
