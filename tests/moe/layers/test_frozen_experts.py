"""A backward that makes no gradient which nobody asked for: counted in FLOPs, and on the GPU path in kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe.kernels.expert_ffn import torch_impl
from moe.kernels.launch import recording
from moe.layers import MoE
from moe.layers.initialization import WeightInit

D, F, E, T, K = 7, 9, 4, 13, 2  # odd widths: products of single experts, which torch's counter sees
PRODUCT = 2 * T * K * D * F  # FLOPs of one product of all rows with their experts

# frozen: products that its absence saves. x stands for the layer's input.
PLAIN = {
    "": 0,
    "w_in": 1,
    "w_out": 1,
    "w_in w_out": 2,
    "x": 1,
    "x w_in": 3,  # w_out's gradient needs the activation, which is kept, and nothing from before it
    "x w_out": 2,
    "x w_in w_out": 4,  # the router's weight still learns, from the experts' outputs
}
GATED = {"": 0, "w_gate": 1, "w_in w_gate": 2, "w_out": 1, "x": 2, "x w_in w_gate": 5, "x w_in w_gate w_out": 6}
BIASED = {"": 0, "b_in b_out": 0, "w_in w_out": 2, "x w_in w_out": 3, "x w_in b_in": 3, "x w_in w_out b_in": 4}
CASES = [
    *(({}, frozen, saved) for frozen, saved in PLAIN.items()),
    *(({"gated": True, "activation": "silu"}, frozen, saved) for frozen, saved in GATED.items()),
    *(({"bias": True}, frozen, saved) for frozen, saved in BIASED.items()),
]
IDS = [f"{'-'.join(options) or 'plain'}: {frozen or 'nothing'}" for options, frozen, _ in CASES]


def build(options: dict[str, Any], frozen: str) -> tuple[MoE, Tensor]:
    layer = MoE(D, F, E, K, backend="torch", **options)
    layer.reset_parameters(seed=1, init=WeightInit("fairseq"))
    for name, parameter in layer.experts.named_parameters():
        parameter.requires_grad_(name not in frozen.split())
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(0))
    return layer, x.requires_grad_("x" not in frozen.split())


def backward(layer: Any, x: Tensor) -> int:
    """FLOPs of the backward pass."""
    loss = layer(x)[0].square().sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("options", "frozen", "saved"), CASES, ids=IDS)
def test_the_backward_is_shorter_by_exactly_these_products(options: dict[str, Any], frozen: str, saved: int) -> None:
    (whole, whole_x), (layer, x) = build(options, ""), build(options, frozen)
    routers = 2 * T * D * E if "x" in frozen.split() else 0  # of the router's input, which torch leaves out itself
    assert backward(whole, whole_x) - backward(layer, x) == saved * PRODUCT + routers
    check_gradients(layer, x, whole, whole_x, frozen)


def check_gradients(layer: MoE, x: Tensor, whole: MoE, whole_x: Tensor, frozen: str) -> None:
    """None for what is frozen, the same bits for the rest."""
    expected = {f"experts.{name}": p.grad for name, p in whole.experts.named_parameters()}
    expected |= {"x": whole_x.grad, "router.weight": whole.router.weight.grad}
    found = {"x": x.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if name.removeprefix("experts.") in frozen.split():
            assert gradient is None
        else:
            assert torch.equal(gradient, expected[name]), name
            assert gradient.any(), name


@pytest.mark.parametrize(("options", "frozen"), [({}, "w_in"), ({"bias": True}, "x w_in w_out")], ids=str)
def test_a_compiled_backward_leaves_the_same_out(
    options: dict[str, Any], frozen: str, _fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op that a compiler sees hides its products from the counter, so its request is noted."""
    asked = []
    plain = torch_impl.backward
    monkeypatch.setattr(torch_impl, "backward", lambda *args: asked.append(list(args[-1])) or plain(*args))
    (whole, whole_x), (layer, x) = build(options, ""), build(options, frozen)
    backward(whole, whole_x)
    backward(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    names = ("x", "w_in", "w_gate", "w_out", "b_in", "b_out")
    exists = ["x", "w_in", "w_out", *(("b_in", "b_out") if options else ())]
    assert asked == [[name in exists for name in names], [name in exists and name not in frozen for name in names]]
    check_gradients(layer, x, whole, whole_x, frozen)


# on the GPU path one product makes both the gradient before the activation and that of the routing weights: it stays
KERNELS = {
    "x": {"_product_kernel": 1, "_sum_rows_kernel": 1},
    "w_in": {"_outer_kernel": 1},
    "w_gate": {"_outer_kernel": 1},
    "w_out": {"_outer_kernel": 1},
    "b_in": {"grouped_sum_kernel": 1},
    "b_out": {"grouped_sum_kernel": 1},
}


@pytest.mark.parametrize("frozen", ["", *KERNELS, "x w_in w_gate w_out", "x w_in w_gate b_in"])
def test_the_gpu_path_starts_fewer_kernels(frozen: str) -> None:
    """Launches of its backward, recorded from tensors without data."""
    pytest.importorskip("triton", reason="Triton has packages for Linux only")
    missing = started("") - started(frozen)
    assert missing == sum((Counter(KERNELS[name]) for name in frozen.split()), Counter())
    assert started("")["_outer_kernel"] == 3


def started(frozen: str) -> Counter[str]:
    from moe.kernels.expert_ffn import triton_impl
    from moe.kernels.permute import RowOrder

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    of_rows = [empty(T * K, dtype=torch.int64) for _ in range(4)]
    order = RowOrder(*of_rows, empty(T + 1, dtype=torch.int64), empty(E + 1, dtype=torch.int64))
    x, weights, hidden, b_out = empty(T, D), empty(T, K), empty(T * K, F), empty(E, D)
    experts = (empty(E, F, D), empty(E, F, D), empty(E, D, F), b_out)
    needs = [name not in frozen.split() for name in ("x", "w_in", "w_gate", "w_out", "b_in", "b_out")]
    with recording() as launches:
        triton_impl.routed_backward(x, hidden, hidden, x, weights, order, *experts, True, "silu", needs)
    names = Counter(launch.kernel.__name__ for launch in launches)
    del names["_schedule_kernel"]  # started for a product whose tiles are of another height
    return names
