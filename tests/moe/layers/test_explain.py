"""What `explain` says, against what is measured and what the other formulas say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.layers import ExpertChoiceRouter, MoE
from moe.layers.explain import Machine, explain, measure_machine

MACHINE = Machine("paper", 1e12, 1e11, 1e-6, link_bytes_per_second=1e10)


def saved_bytes(layer: MoE, x: Tensor) -> int:
    """Bytes of every storage that autograd keeps for a backward pass, parameters left out, each once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("t", "d", "f", "e", "k", "gated", "dtype"),
    [
        (512, 64, 128, 8, 2, False, torch.float32),
        (512, 64, 128, 8, 2, True, torch.float32),
        (300, 32, 64, 16, 4, True, torch.bfloat16),
        (1000, 16, 64, 64, 3, False, torch.float64),
    ],
)
def test_activation_bytes_are_those_that_autograd_keeps(
    t: int, d: int, f: int, e: int, k: int, gated: bool, dtype: torch.dtype
) -> None:
    layer = MoE(d, f, e, k, gated=gated, dtype=dtype)
    measured = saved_bytes(layer, torch.randn(t, d, dtype=dtype, requires_grad=True))
    assert explain(layer, t, machine=MACHINE).activation_bytes == pytest.approx(measured, rel=0.002)


def test_counts_are_those_of_the_layer() -> None:
    layer = MoE(16, 32, 8, 2, gated=True)
    told = explain(layer, 100, machine=MACHINE)
    assert (told.total_params, told.active_params) == (layer.total_params, layer.active_params)
    assert told.flops == 3 * layer.flops(100)
    evaluation = explain(layer, 100, machine=MACHINE, training=False)
    assert evaluation.flops == layer.flops(100)
    assert evaluation.activation_bytes == 0
    assert evaluation.launches < told.launches


def test_communication_is_what_leaves_a_rank() -> None:
    """Of T·K rows of D numbers a share (P-1)/P leaves, four times."""
    layer = MoE(16, 32, 8, 2)
    assert explain(layer, 100, machine=MACHINE).communication_bytes == 0
    told = explain(layer, 100, machine=MACHINE, num_ranks=4)
    assert told.communication_bytes == 4 * 0.75 * 100 * 2 * 16 * 4
    assert told.communication_seconds == told.communication_bytes / 1e10


@pytest.mark.parametrize(
    ("bound", "layer", "tokens", "ranks", "machine"),
    [
        ("GEMM", (256, 1024, 8), 4096, 1, MACHINE),
        ("GEMM", (256, 1024, 8), 1, 1, MACHINE._replace(launch_seconds=0.0)),  # reading the weights of two experts
        ("permutation", (256, 4, 8), 4096, 1, MACHINE._replace(memory_bytes_per_second=1e9)),
        ("communication", (256, 256, 8), 4096, 8, MACHINE._replace(link_bytes_per_second=1e8)),
        ("launch", (16, 32, 512), 256, 1, MACHINE),
    ],
)
def test_the_bound_is_named(bound: str, layer: tuple[int, ...], tokens: int, ranks: int, machine: Machine) -> None:
    told = explain(MoE(*layer, device="meta"), tokens, machine=machine, num_ranks=ranks)
    assert told.bound == bound
    assert f"bound by {bound}" in str(told)


def test_expert_choice_counts_its_capacity() -> None:
    layer = MoE(16, 32, 8, router=ExpertChoiceRouter(16, 8, capacity_factor=3.0))
    assert explain(layer, 80, machine=MACHINE).flops == 3 * layer.flops(80)
    assert layer.flops(80) == 80 * 2 * 16 * 8 + 8 * 30 * 4 * 16 * 32


def test_a_machine_is_measured() -> None:
    machine = measure_machine()
    assert 1e9 < machine.gemm_flops_per_second < 1e14
    assert 1e8 < machine.memory_bytes_per_second < 1e13
    assert 1e-8 < machine.launch_seconds < 1e-3
    assert explain(MoE(8, 8, 2), 10).machine.name.startswith("cpu")


def test_bad_requests_are_refused() -> None:
    layer = MoE(8, 8, 4)
    for call, message in (
        (lambda: explain(layer, 0, machine=MACHINE), r"num_tokens \(0\)"),
        (lambda: explain(layer, 8, machine=MACHINE, num_ranks=3), r"num_ranks \(3\)"),
        (
            lambda: explain(layer, 8, machine=MACHINE._replace(link_bytes_per_second=None), num_ranks=2),
            "link_bytes_per_second",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
