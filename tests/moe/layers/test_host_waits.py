"""On the GPU path nothing is read by the host, forward or backward, and each step starts a known number of kernels.

Seen without a GPU: the layer runs in Triton's interpreter, in a process of its own (this file as a program), which
counts what would make the host wait if the tensors were on a GPU, and every start of a kernel. test_on_gpu.py lets
CUDA itself say the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from moe.kernels.topk_routing import require_finite
from moe.layers import ExpertChoiceRouter, GShardRouter, MoE, TopKRouter, load_balance_loss, router_z_loss

pytest.importorskip("triton", reason="Triton has packages for Linux only")

ROOT = Path(__file__).parents[3]
D, F, E, T = 8, 12, 4, 10

LAYERS: dict[str, Callable[[], MoE]] = {
    "dropless": lambda: MoE(D, F, E, backend="triton"),
    "capacity": lambda: MoE(D, F, E, capacity_factor=0.6, backend="triton"),
    "gated": lambda: MoE(D, F, E, gated=True, activation="silu", backend="triton"),
    "biases": lambda: MoE(D, F, E, bias=True, backend="triton"),
    "shared": lambda: MoE(D, F, E, shared_d_ff=4, shared_gate=True, backend="triton"),
    "sigmoid": lambda: MoE(D, F, E, router=TopKRouter(D, E, scores="sigmoid", backend="triton"), backend="triton"),
    "groups_and_bias": lambda: MoE(D, F, E, router=TopKRouter(D, E, **GROUPS, backend="triton"), backend="triton"),
    "gshard": lambda: MoE(D, F, E, router=GShardRouter(D, E, backend="triton"), backend="triton"),
    "expert_choice": lambda: MoE(D, F, E, router=ExpertChoiceRouter(D, E, backend="triton"), backend="triton"),
    "dropout": lambda: MoE(D, F, E, dropout=0.1, capacity_factor=0.6, backend="triton"),
}
GROUPS: dict[str, Any] = {"num_groups": 2, "top_groups": 1, "bias_balanced": True}

MASKED = {f"{name} masked": name for name in ("dropless", "capacity", "expert_choice", "dropout")}
REPLAYED = {f"{name} replayed": name for name in ("dropless", "capacity")}

# Of a dropless layer without biases; _schedule_kernel is started again where the next product has other tiles.
FORWARD = {"_route_kernel": 1, "_count_kernel": 1, "_place_kernel": 1, "_schedule_kernel": 1, "first_kernel": 1}
FORWARD |= {"_product_kernel": 1, "_sum_rows_kernel": 1}
BACKWARD = {"_schedule_kernel": 1, "activation_backward_kernel": 1, "_outer_kernel": 2, "_product_kernel": 1}
BACKWARD |= {"_sum_rows_kernel": 1, "_route_backward_kernel": 1}
MORE_FORWARD: dict[str, dict[str, int]] = {
    "capacity": {"_count_kernel": 1, "_keep_kernel": 1},
    "groups_and_bias": {"_route_kernel": -1, "_top_k_kernel": 2},
    "gshard": {"_route_kernel": -1, "_top_k_kernel": 2, "_count_kernel": 1, "_keep_kernel": 1},
    "expert_choice": {"_route_kernel": -1},
    "dropout": {"_count_kernel": 1, "_keep_kernel": 1, "_gather_kernel": 1},
}
MORE_BACKWARD: dict[str, dict[str, int]] = {
    "gated": {"_outer_kernel": 1},
    "biases": {"grouped_sum_kernel": 2},
    **{name: {"_route_backward_kernel": -1} for name in ("groups_and_bias", "gshard", "expert_choice")},
    "dropout": {"_unpermute_backward_kernel": 1},
}

# ATen operators after which CUDA's host code reads a result, or copies between host and device
WAITS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor", "lift_fresh"),
}
METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__iter__")


def _plus(base: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return {name: n for name in base | more if (n := base.get(name, 0) + more.get(name, 0))}


@pytest.fixture(scope="session")
def measured() -> dict[str, dict[str, dict[str, int]]]:
    """What the program at the end of this file counted, by case."""
    result = subprocess.run(
        [sys.executable, __file__],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*LAYERS, *MASKED, *REPLAYED])
def test_the_host_waits_for_nothing(name: str, measured: dict[str, Any]) -> None:
    assert measured[name]["waits"] == {}


@pytest.mark.parametrize("name", LAYERS)
def test_the_kernels_of_a_step_are_these(name: str, measured: dict[str, Any]) -> None:
    assert measured[name]["forward"] == _plus(FORWARD, MORE_FORWARD.get(name, {}))
    assert measured[name]["backward"] == _plus(BACKWARD, MORE_BACKWARD.get(name, {}))


@pytest.mark.parametrize(
    ("place", "seen"),
    [
        ("sort", {"Tensor.item": 1, "item": 1}),
        ("dispatcher", {"Tensor.tolist": 1}),
        ("backward", {"Tensor.cpu": 1}),
        ("capacity as a copied number", {"lift_fresh": 1}),
        ("rows by a mask", {"index by a mask": 1}),
    ],
)
def test_the_count_sees_a_wait_wherever_it_is(place: str, seen: dict[str, int], measured: dict[str, Any]) -> None:
    assert measured[f"a wait in: {place}"]["waits"] == seen


def test_the_check_of_scores_reads_nothing_off_the_cpu() -> None:
    """A tensor without data cannot be read; the program below leaves this check out."""
    require_finite(torch.empty(3, device="meta"), None)


# ---- the program ----


class HostWaits(TorchDispatchMode):
    """Counts reads and copies by the host, inside custom operators too; kernels that the interpreter runs aside."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.inside_a_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = OPDEFS.get(func.name().split(".")[0]) if func.namespace == "moe" else None
        if own is not None:  # its operators are seen only if its body runs under this mode
            with self:
                return own._init_fn(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::")
        if name in WAITS or name.split(".")[0] in WAITS:
            self.see(name.split(".")[0])
        by_masks = [a for arg in args if isinstance(arg, list) for a in arg if isinstance(a, Tensor)]
        if name.startswith("index") and any(a.dtype in (torch.bool, torch.uint8) for a in by_masks):
            self.see("index by a mask")
        return func(*args, **(kwargs or {}))

    def see(self, name: str) -> None:
        if not self.inside_a_kernel:
            self.waits[name] += 1


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _watch_methods_and_launches(counter: list[HostWaits]) -> None:
    """Methods of tensors that on a CPU read without an operator, and `launch` wherever it was imported."""
    for method in METHODS:
        plain = getattr(Tensor, method)

        def seen(*args: Any, _plain: Any = plain, _name: str = method, **kwargs: Any) -> Any:
            counter[0].see(f"Tensor.{_name}")
            return _plain(*args, **kwargs)

        setattr(Tensor, method, seen)
    for module in [m for name, m in sys.modules.items() if name.startswith("moe.kernels.") and hasattr(m, "launch")]:
        plain_launch = module.launch

        def launch(kernel: Any, grid: Any, _plain: Any = plain_launch, **kwargs: Any) -> None:
            mode = counter[0]
            if 0 not in grid:
                mode.kernels[kernel.__name__] += 1
            mode.inside_a_kernel = True
            try:
                _plain(kernel, grid, **kwargs)
            finally:
                mode.inside_a_kernel = False

        module.launch = launch


def _step(layer: MoE, counter: list[HostWaits], **options: Any) -> dict[str, dict[str, int]]:
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mode = counter[0] = HostWaits()
    with mode:
        y, routing = layer(x, **options)
        loss = y.square().sum() + load_balance_loss(routing) + router_z_loss(routing)
        forward, mode.kernels = mode.kernels, Counter()
        torch.autograd.backward(loss)
    assert all(p.grad is not None for p in layer.parameters())
    return {"waits": dict(mode.waits), "forward": dict(forward), "backward": dict(mode.kernels)}


def _after(function: Any, wait: Callable[[Any], Any], call: int = 1) -> Any:
    """`function`, with a wait after its `call`-th call."""
    calls = []

    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            wait(result)
        return result

    return run


def _with_a_wait(counter: list[HostWaits]) -> dict[str, Any]:
    """The same step with one wait put into each of several places."""
    from moe.kernels.expert_ffn import triton_impl as experts
    from moe.kernels.permute import triton_impl as moves
    from moe.layers.dispatch import LocalDispatcher

    places: dict[str, tuple[Any, str, Any]] = {
        "sort": (moves, "sort_by_expert", _after(moves.sort_by_expert, lambda order: order.expert_offsets[-1].item())),
        "dispatcher": (LocalDispatcher, "forward", _after(LocalDispatcher.forward, lambda y: y.detach()[0].tolist())),
        # the first call is the forward's
        "backward": (experts, "sum_rows", _after(experts.sum_rows, lambda sums: sums.cpu(), call=2)),
        "capacity as a copied number": (torch, "full", lambda size, value, **_: torch.tensor(value)),
        "rows by a mask": (
            moves,
            "sort_by_expert",
            _after(moves.sort_by_expert, lambda order: order.slots[order.slots > 2]),
        ),
    }
    results = {}
    for place, change in places.items():
        with _replaced(*change):
            results[f"a wait in: {place}"] = _step(LAYERS["capacity"](), counter)
    return results


def _measure() -> dict[str, Any]:
    from moe.kernels.expert_ffn import triton_impl, triton_op  # noqa: F401 - loaded before `launch` is watched
    from moe.kernels.permute import op as moves
    from moe.kernels.topk_routing import op as routing
    from moe.kernels.topk_routing import triton_impl as choice  # noqa: F401
    from moe.layers import expert_choice_router

    # what looks at data on a CPU alone
    routing.require_finite = expert_choice_router.require_finite = lambda *args: None
    moves.look_for_experts = triton_op._check_offsets = lambda *args: None
    counter = [HostWaits()]
    _watch_methods_and_launches(counter)
    mask = torch.arange(T) % 4 != 1
    results = {}
    for name, build in LAYERS.items():
        results[name] = _step(build(), counter)
    for name, plain in MASKED.items():
        results[name] = _step(LAYERS[plain](), counter, token_mask=mask)
    for name, plain in REPLAYED.items():
        recorded = LAYERS[plain]()(torch.randn(T, D), token_mask=mask)[1]
        results[name] = _step(LAYERS[plain](), counter, routing=recorded)
    return results | _with_a_wait(counter)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure()) + "\n")
