"""What one MoE layer costs on a machine, and what bounds it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from moe.layers.moe import MoE
from moe.scaling.communication import all_to_all_bytes
from moe.scaling.memory import moe_activation_bytes, permutation_bytes


class Machine(NamedTuple):
    """The four rates that bound a layer. Take them from a data sheet, or from `measure_machine`."""

    name: str
    gemm_flops_per_second: float
    memory_bytes_per_second: float
    launch_seconds: float  # per op, for ops that do no work
    link_bytes_per_second: float | None = None  # sent by one rank to the others; None if not stated


class Explanation(NamedTuple):
    """The cost of one layer for `num_tokens` tokens of one rank. Seconds are lower bounds from the machine's rates."""

    num_tokens: int
    machine: Machine
    total_params: int
    active_params: int
    flops: int  # useful, forward, or forward and backward in training
    expert_bytes: int  # weights read and, in training, gradients written
    permutation_bytes: int
    communication_bytes: int  # sent by one rank, all passes
    activation_bytes: int  # kept for the backward; 0 in evaluation
    launches: int  # ops of the torch path; on a CPU, one GEMM per matrix and expert with rows
    gemm_seconds: float  # the larger of arithmetic time and time to read the experts
    permutation_seconds: float
    communication_seconds: float
    launch_seconds: float

    @property
    def bound(self) -> str:
        """Which of the four takes longest: "GEMM", "permutation", "communication" or "launch"."""
        seconds = {
            "GEMM": self.gemm_seconds,
            "permutation": self.permutation_seconds,
            "communication": self.communication_seconds,
            "launch": self.launch_seconds,
        }
        return max(seconds, key=lambda name: seconds[name])

    def __str__(self) -> str:
        reading = self.expert_bytes / self.machine.memory_bytes_per_second
        gemm = "arithmetic" if self.gemm_seconds > reading else "reading weights"
        rows = [
            (f"{self.num_tokens:,} tokens on {self.machine.name}", f"bound by {self.bound}"),
            ("parameters, total / active", f"{self.total_params:,} / {self.active_params:,}"),
            ("useful FLOPs", f"{self.flops:.4g}"),
            ("activations kept", f"{self.activation_bytes / 2**20:.1f} MiB"),
            (f"GEMM (bound by {gemm})", f"{self.gemm_seconds * 1e3:.3f} ms"),
            ("permutation", f"{self.permutation_seconds * 1e3:.3f} ms, {self.permutation_bytes / 2**20:.1f} MiB"),
            ("communication", f"{self.communication_seconds * 1e3:.3f} ms, {self.communication_bytes / 2**20:.1f} MiB"),
            ("launch", f"{self.launch_seconds * 1e3:.3f} ms, {self.launches:,} ops"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def explain(
    layer: MoE, num_tokens: int, *, machine: Machine | None = None, num_ranks: int = 1, training: bool = True
) -> Explanation:
    """Name what bounds `layer` for `num_tokens` tokens per rank, with the counts behind it.

    machine: its rates; `None` measures them on the layer's device in a second. num_ranks: the number of ranks that
    share the experts (expert parallelism), at even load. training: forward and backward, else forward alone. Overlap
    is not counted: the sum of the four is an upper bound of the ideal time, the largest a lower one. Raises ValueError
    for invalid numbers, and if several ranks need a link_bytes_per_second that the machine does not state.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens ({num_tokens}) must be at least 1")
    num_experts, d_ff, d_model = layer.experts.w_in.shape
    if num_ranks < 1 or num_experts % num_ranks != 0:
        raise ValueError(f"num_ranks ({num_ranks}) must be at least 1 and divide num_experts ({num_experts})")
    if machine is None:
        machine = measure_machine(layer.experts.w_in.device, layer.experts.w_in.dtype)
    if num_ranks > 1 and machine.link_bytes_per_second is None:
        raise ValueError(f"machine {machine.name} states no link_bytes_per_second, which {num_ranks} ranks need")
    element = layer.experts.w_in.element_size()
    rows = layer.router.num_rows(num_tokens)
    top_k = round(rows / num_tokens)  # for expert choice, the mean
    flops = layer.flops(num_tokens) * (3 if training else 1)
    local_experts = num_experts // num_ranks
    busy = min(local_experts, rows)
    weight_bytes = busy * sum(p[0].numel() for p in layer.experts.parameters()) * element
    expert_bytes = weight_bytes * (3 if training else 1)  # read forward, read backward, gradient written
    sent = all_to_all_bytes(num_tokens, d_model, top_k, num_ranks=num_ranks, element_bytes=element, training=training)
    moved = permutation_bytes(num_tokens, d_model, top_k, element_bytes=element, training=training)
    kept = moe_activation_bytes(
        num_tokens,
        d_model,
        d_ff,
        num_experts,
        top_k,
        element_bytes=element,
        router_bytes=max(element, 4),
    )
    launches = _launches(layer, busy, training)
    bandwidth = machine.memory_bytes_per_second
    return Explanation(
        num_tokens=num_tokens,
        machine=machine,
        total_params=layer.total_params,
        active_params=layer.active_params,
        flops=flops,
        expert_bytes=expert_bytes,
        permutation_bytes=moved,
        communication_bytes=sent,
        activation_bytes=kept if training else 0,
        launches=launches,
        gemm_seconds=max(flops / machine.gemm_flops_per_second, expert_bytes / bandwidth),
        permutation_seconds=moved / bandwidth,
        communication_seconds=0.0 if machine.link_bytes_per_second is None else sent / machine.link_bytes_per_second,
        launch_seconds=launches * machine.launch_seconds,
    )


_ROUTING_OPS = 40  # router, sort, gather, combine and their backward, counted with the profiler


def _launches(layer: MoE, busy_experts: int, training: bool) -> int:
    matrices = 3 if layer.experts.w_gate is not None else 2
    grouped = 1 if layer.experts.w_in.device.type == "cuda" else busy_experts
    return _ROUTING_OPS + grouped * matrices * (3 if training else 1)


def measure_machine(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Measure a device's GEMM rate, memory bandwidth and launch time, each as the best of several repeats."""
    device = torch.device(device)
    a, b = (torch.randn(1024, 1024, device=device).to(dtype) for _ in range(2))
    product = a @ b
    gemm = _best_seconds(lambda: torch.mm(a, b, out=product), device)
    source = torch.zeros(2**24, device=device)  # 64 MiB: beyond every cache
    target = torch.zeros_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device)
    tiny = torch.zeros(1, device=device)

    def thousand() -> None:
        for _ in range(1000):
            tiny.add_(1.0)

    launch = _best_seconds(thousand, device) / 1000
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Machine(f"{device.type}{threads}, {str(dtype)[6:]}", 2 * 1024**3 / gemm, 2 * source.nbytes / copy, launch)


def _best_seconds(work: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
