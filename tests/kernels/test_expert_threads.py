"""One expert per thread: the results of one thread, whoever calls, and no trace in torch's settings."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe.kernels import expert_threads
from moe.kernels.expert_ffn import expert_ffn
from moe.kernels.expert_threads import Span, over_experts, split, wins

D, F, E = 8, 12, 96


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make_spans(load: Sequence[int]) -> list[Span]:
    ends = torch.tensor(load).cumsum(0).tolist()
    return [(e, end - rows, end) for e, (rows, end) in enumerate(zip(load, ends, strict=True)) if rows]


def problem(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    load = torch.randint(0, 4, (E,), generator=generator)
    shapes = {"rows": (int(load.sum()), D), "w_in": (E, F, D), "w_gate": (E, F, D), "w_out": (E, D, F)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return tensors | {"offsets": torch.cat([torch.zeros(1, dtype=torch.int64), load.cumsum(0)])}


def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and all gradients, by name."""
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items() if name != "offsets"}
    weights = (leaves["w_in"], leaves["w_gate"], leaves["w_out"], None, None)
    y = expert_ffn(leaves["rows"], tensors["offsets"], *weights, activation="silu", backend="torch")
    y.square().sum().backward()
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many experts each call of `over_experts` was given."""
    calls: list[int] = []
    original = over_experts

    def count(work: object, spans: Sequence[Span]) -> None:
        calls.append(len(spans))
        original(work, spans)

    monkeypatch.setattr(expert_threads, "over_experts", count)
    # an op of torch.library runs what was registered last, of either name that kernels/ is imported by
    monkeypatch.setattr("kernels.expert_threads.over_experts", count)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_results_are_those_of_one_thread_bit_for_bit(
    two_threads: None, counted: list[int], dtype: torch.dtype
) -> None:
    tensors = problem(dtype)
    threaded = run(tensors)
    assert len(counted) == 9  # three products forward, three for gradients of rows, three of weights
    torch.set_num_threads(1)
    single = run(tensors)
    assert len(counted) == 9
    assert threaded.keys() == single.keys() and len(single) == 5
    for name, value in single.items():
        assert torch.equal(threaded[name], value), name


def test_without_autograd_and_in_inference_mode(two_threads: None, counted: list[int]) -> None:
    tensors = problem()
    weights = (tensors["w_in"].requires_grad_(), tensors["w_gate"], tensors["w_out"], None, None)
    expected = run(problem())["y"]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = expert_ffn(tensors["rows"], tensors["offsets"], *weights, activation="silu", backend="torch")
        assert torch.equal(y, expected) and not y.requires_grad
    assert len(counted) == 9 + 2 * 3


def test_compiled(two_threads: None, counted: list[int]) -> None:
    tensors = problem()
    expected = run(tensors)["y"]
    counted.clear()
    weights = (tensors["w_in"], tensors["w_gate"], tensors["w_out"], None, None)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(rows: Tensor) -> Tensor:
        return expert_ffn(rows, tensors["offsets"], *weights, activation="silu", backend="torch")

    assert torch.equal(call(tensors["rows"]), expected)
    assert len(counted) == 3


def test_a_counter_of_flops_sees_every_product(two_threads: None, counted: list[int]) -> None:
    """A mode of torch's dispatcher is one thread's: what others multiply would be missing, and grouped_mm is."""
    tensors = problem()
    with FlopCounterMode(display=False) as counter:
        run(tensors)
    assert counted == []
    assert counter.get_total_flops() == 3 * 3 * 2 * tensors["rows"].shape[0] * D * F  # matrices, directions


def test_under_torch_func(two_threads: None, counted: list[int]) -> None:
    tensors = problem()
    weights = (tensors["w_in"], tensors["w_gate"], tensors["w_out"], None, None)

    def loss(rows: Tensor) -> Tensor:
        return expert_ffn(rows, tensors["offsets"], *weights, activation="silu", backend="torch").square().sum()

    grad = torch.func.grad(loss)(tensors["rows"])
    assert len(counted) == 3  # the products of the forward: the specification is what gets differentiated
    expected = run(tensors)["rows"]
    assert (grad - expected).abs().max() <= 1e-5 * expected.abs().max()  # rounding: sums in another order


def test_it_is_for_many_small_experts_of_even_load(two_threads: None) -> None:
    assert wins(make_spans([8] * 512))
    assert not wins(make_spans([8] * (expert_threads.FEWEST_EXPERTS - 1)))
    assert not wins(make_spans([expert_threads.MOST_ROWS + 1] * 512))
    assert not wins(make_spans([1] * 511 + [600]))  # the thread with the busiest would be waited for
    assert not wins([])
    torch.set_num_threads(1)
    assert not wins(make_spans([8] * 512))


@pytest.mark.parametrize("load", [[1] * 7, [5, 0, 0, 9, 1, 0, 300, 2], [3], [1, 1000], list(range(64))], ids=str)
@pytest.mark.parametrize("num_parts", [1, 2, 8])
def test_parts_hold_every_expert_once_in_order(load: list[int], num_parts: int) -> None:
    spans = make_spans(load)
    parts = split(spans, num_parts)
    assert [span for part in parts for span in part] == spans
    assert 1 <= len(parts) <= num_parts and all(parts)


def test_parts_are_of_even_work() -> None:
    parts = split(make_spans([8] * 512), 8)
    assert [len(part) for part in parts] == [64] * 8


def test_the_callers_threads_and_those_of_later_threads_stay(two_threads: None) -> None:
    expert_threads._pools.clear()  # so that a pool is made here
    seen: list[int] = []
    inside: list[int] = []
    over_experts(lambda part: inside.append(torch.get_num_threads()), make_spans([1] * 64))
    assert set(inside) == {1}
    assert torch.get_num_threads() == 2
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [2]


def test_the_work_is_spread_and_the_threads_are_kept(two_threads: None) -> None:
    def who() -> set[str]:
        names: set[str] = set()
        meeting = threading.Barrier(2, timeout=30)

        def work(part: Sequence[Span]) -> None:
            if len(names) < 2:
                names.add(threading.current_thread().name)
                meeting.wait()  # passed only where two threads work at a time

        over_experts(work, make_spans([1, 1]))
        return names

    first, again = who(), who()
    assert len(first) == 2 and first == again
    assert threading.current_thread().name not in first


def test_what_goes_wrong_is_raised_when_all_have_stopped(two_threads: None) -> None:
    done: list[int] = []

    def work(part: Sequence[Span]) -> None:
        if part[0][0] == 0:
            raise RuntimeError("expert 0")
        done.append(len(part))

    with pytest.raises(RuntimeError, match="expert 0"):
        over_experts(work, make_spans([1] * 64))
    assert sum(done) == 64 - 8


def test_several_callers_at_a_time(two_threads: None) -> None:
    tensors = problem()
    expected = run(tensors)
    results: list[dict[str, Tensor]] = []
    callers = [threading.Thread(target=lambda: results.append(run(tensors))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4
    for result in results:
        for name, value in expected.items():
            assert torch.equal(result[name], value), name


def test_a_forked_process_makes_its_own_threads_and_importing_makes_none() -> None:
    """In a process of its own: a fork of this one would carry pytest's state."""
    program = """
import os, threading, torch
from moe.kernels.expert_threads import over_experts
torch.set_num_threads(2)
assert threading.active_count() == 1, "importing starts threads"
spans = [(e, e, e + 1) for e in range(64)]
def total():
    seen = []
    over_experts(lambda part: seen.append(len(part)), spans)
    return sum(seen)
assert total() == 64 and threading.active_count() == 3
child = os.fork()
if child == 0:
    os._exit(0 if total() == 64 else 1)
assert os.waitpid(child, 0)[1] == 0
assert total() == 64 and threading.active_count() == 3
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_layer_that_has_used_threads_is_copied(two_threads: None) -> None:
    from moe.layers import MoE

    torch.manual_seed(0)
    layer = MoE(D, F, E, 2)
    x = torch.randn(200, D)
    y = layer(x)[0]
    names = {thread.name for thread in threading.enumerate()}
    assert any(name.startswith("experts") for name in names)
    assert torch.equal(copy.deepcopy(layer)(x)[0], y)
    assert {thread.name for thread in threading.enumerate()} == names
