"""The benchmarks' own arithmetic, and that they refuse to print what is wrong: speeds, counts, ratios."""

from __future__ import annotations

import gc
import importlib.util
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import bench_flop_counts, clock, counts, peers, regression, report
from benchmarks import layer_contenders as layers
from benchmarks.bench_default_memory import HELD, decides
from benchmarks.bench_default_memory import held_ratios as peer_ratios
from benchmarks.bench_layer import DENSE, held_ratios
from benchmarks.clock import Clock, Sample, Timed
from benchmarks.contender import Contender, Cost, mismatch, saved_bytes
from benchmarks.layer_contenders import LayerCase
from benchmarks.loads import ROUTINGS, Shape, choose
from benchmarks.suite import FASTEST_PEER, REFERENCE_SHAPES, Held, Options, Ratio, Suite, WrongResultError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SHAPE = Shape(T=96, D=16, F=24, K=2, E=6)


@pytest.fixture(autouse=True, scope="module")
def _no_group_left() -> Iterator[None]:
    """fairscale's layer wants a process group; the tests of other files expect none."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def sample(seconds: float) -> Sample:
    return Sample(seconds / 3, seconds, seconds, seconds)


def constant(name: str, value: float, *, peer: bool = False, reference: Contender | None = None) -> Contender:
    """Something that takes no time and returns one number."""
    return Contender(
        name,
        lambda: torch.tensor([value]),
        Cost(flops=10.0, bytes=10.0),
        outcome=lambda y, _: {"y": y},
        reference=reference,
        peer=peer,
    )


def measuring(**options: object) -> Suite:
    return Suite(Options(flops=True, quick=True, rounds=1, **options))


# what is measured


def test_a_ratio_is_the_median_over_rounds_of_one_time_through_the_other() -> None:
    """Not the ratio of medians: a slow round lengthens both sides."""
    samples = {"a": [sample(1.0), sample(30.0), sample(2.0)], "b": [sample(2.0), sample(10.0), sample(2.0)]}
    assert clock.ratio(samples, "a", "b") == 1.0  # of 0.5, 3 and 1
    samples["b"][2] = None  # a slow peer sat it out
    assert clock.ratio(samples, "a", "b") == 1.75
    assert clock.spread(samples["a"]) == pytest.approx(29.0 / 2 / 2.0)


def threading_wait(seconds: float) -> None:
    threading.Event().wait(seconds)


def test_names_that_would_be_taken_for_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="must differ"):
        clock.interleave(Clock(CPU, 1), [Timed("a", int), Timed("a", int)], 1)


def test_waiting_costs_no_cpu_time_and_forward_is_told_from_backward() -> None:
    waiting = Timed("wait", lambda: threading_wait(0.05), lambda _: None)
    of_cpu, of_wall = Clock(CPU, 1).sample(waiting), Clock(CPU, 2).sample(waiting)
    assert of_cpu.total == of_cpu.cpu < 0.025 <= of_cpu.wall
    assert of_wall.total == of_wall.wall >= 0.05
    assert of_wall.forward > 0.9 * of_wall.total  # the wait was in the forward
    later = Clock(CPU, 2).sample(Timed("wait", lambda: None, lambda _: threading_wait(0.05)))
    assert later.forward < 0.1 * later.total


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 8), (512, 2)])
def test_a_router_sends_tokens_where_they_are_meant_to_go(routing: str, num_experts: int, top_k: int) -> None:
    shape = Shape(T=1024, D=128, F=4, K=top_k, E=num_experts)
    case = LayerCase.make(shape, routing, gated=False, device=CPU)
    wanted = choose(routing, shape, torch.Generator().manual_seed(3))
    meant = torch.bincount(wanted.flatten(), minlength=num_experts)
    assert wanted.sort(dim=1).values.diff(dim=1).min() > 0  # distinct
    # another draw, so only the shape of the load agrees: its largest share
    assert float(case.load.max()) == pytest.approx(float(meant.max()), rel=0.25, abs=8)
    assert int(case.load.sum()) == shape.T * shape.K
    if routing == "one-hot":
        assert case.load[:top_k].sum() > 0.9 * shape.T * shape.K


def test_zipf_falls_with_the_rank() -> None:
    shape = Shape(T=20000, D=1, F=1, K=1, E=16)
    counted = torch.bincount(choose("zipf", shape, torch.Generator().manual_seed(0)).flatten(), minlength=16)
    expected = 1.0 / torch.arange(1, 17)
    expected = expected / expected.sum() * shape.T
    assert torch.allclose(counted.float(), expected, rtol=0.1, atol=30.0)


@pytest.mark.parametrize("text", ["T=8,D=4,F=4,K=2", "T=8,D=4,F=4,K=9,E=8", "T=0,D=4,F=4,K=2,E=8", "8x4", "T=a,D=1"])
def test_shapes_that_make_no_layer_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="shape"):
        Shape.parse(text)
    assert Shape.parse("E=8, T=16,D=4,F=6,K=2") == Shape(16, 4, 6, 2, 8)


# the gate


def test_a_wrong_result_has_no_speed() -> None:
    suite = measuring()
    reference = constant("reference", 1.0)
    right, wrong = constant("right", 1.0, reference=reference), constant("wrong", 1.1, reference=reference)
    with pytest.raises(WrongResultError, match=r"wrong .*y differs by 0.1"):
        suite.run("case", [right, wrong], ratios=[Ratio("wrong [fp32]", "right [fp32]")])
    rows = {row.name: row for row in suite.rows}
    assert rows["right"].seconds is not None
    assert rows["wrong"].seconds is rows["wrong"].to_first is rows["wrong"].wall_seconds is None
    assert "differs" in rows["wrong"].check
    assert suite.held == []
    shown = [line for line in report.terminal_lines(suite) if line.startswith("wrong")]
    assert len(shown) == 1
    assert "WRONG" in shown[0]


def test_without_the_option_wrong_results_fail_too() -> None:
    with pytest.raises(WrongResultError):
        Suite(Options()).run("case", [constant("wrong", float("nan"), reference=constant("reference", 1.0))])


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        ({"y": torch.ones(2)}, None),
        ({"y": torch.tensor([1.0, 1.1])}, "differs by 0.1"),
        ({"y": torch.tensor([1.0, float("nan")])}, "differs by nan"),
        ({"y": torch.ones(1, 2)}, "shape"),
        ({}, "missing"),
    ],
)
def test_what_a_mismatch_is(outcome: dict[str, Tensor], message: str | None) -> None:
    found = mismatch(outcome, {"y": torch.ones(2)}, 1e-3)
    assert found is None if message is None else message in str(found)


def test_a_reference_of_zeros_compares_nothing() -> None:
    assert "zeros" in str(mismatch({"y": torch.zeros(2)}, {"y": torch.zeros(2)}, 1.0))


Mutation = Callable[[LayerCase], LayerCase]
MUTATIONS: dict[str, Mutation] = {
    "two experts swapped": lambda case: replace(case, w_in=case.w_in.flip(0)),
    "another router": lambda case: replace(case, router=case.router.flip(0)),
    "gradient upside down": lambda case: replace(case, upstream=case.upstream.flip(0)),
    "one weight in two": lambda case: replace(case, w_out=case.w_out * torch.tensor([1.0, 0.0]).repeat(12)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_the_check_catches_layers_that_compute_something_else(gated: bool, dtype: torch.dtype) -> None:
    case = LayerCase.make(SHAPE, "zipf", gated=gated, device=CPU)
    sampled = case.sampled()
    reference = layers.reference_loop(case, sampled)
    suite = Suite(Options())
    right = [layers.ours(case.to(dtype), sampled), layers.grouped_mm(case.to(dtype), sampled)]
    suite.run("right", [replace(each, reference=reference) for each in right])
    for what, mutate in MUTATIONS.items():
        wrong = replace(layers.ours(mutate(case).to(dtype), sampled), reference=reference)
        with pytest.raises(WrongResultError):
            suite.run(what, [wrong])


def test_the_reference_is_what_the_specification_computes() -> None:
    """The loop that all are checked by, against the layer on the reference backend."""
    for gated in (False, True):
        case = LayerCase.make(SHAPE, "uniform", gated=gated, device=CPU)
        specification = layers.ours(case, range(SHAPE.E), backend="reference")
        whole = replace(layers.loop_over_unbind(case, range(SHAPE.E)), reference=specification)
        sampled = case.sampled()
        assert 1 < len(sampled) < SHAPE.E
        part = replace(layers.reference_loop(case, sampled), reference=layers.ours(case, sampled, backend="reference"))
        Suite(Options()).run("reference", [whole, part])


@pytest.mark.parametrize("name", [name for name, peer in peers.PEERS.items() if peer.installed])
def test_every_installed_peer_computes_the_same(name: str) -> None:
    peer = peers.PEERS[name]
    ran = 0
    for gated in (False, True):
        case = LayerCase.make(SHAPE, "uniform", gated=gated, device=CPU)
        if not peer.takes(case):
            continue
        contender = peer.build(case, case.sampled())
        contender = replace(contender, reference=layers.loop_over_unbind(case, case.sampled()))
        Suite(Options()).run(name, [contender])
        ran += 1
        assert contender.outcome is not None or contender.unchecked
    assert ran > 0 or peer.gpu


# counts


def test_every_count_of_flops_is_compared_with_the_counter_of_torch() -> None:
    sources = [
        *bench_flop_counts.layer_counts(False, [SHAPE]),
        *bench_flop_counts.layer_counts(True, [SHAPE]),
        *bench_flop_counts.head_counts(),
        *bench_flop_counts.model_counts(),
    ]
    for what, analytic, counted in sources:
        assert analytic == counted > 0, what
    compared = {what.split(",")[0] for what, _, _ in sources}
    functions = {name for name in vars(counts) if name.endswith(("_flops", "_cost"))}
    elsewhere = {"ffn_flops", "router_flops", "moved_cost"}  # moe.scaling's own, and one that counts none
    assert functions - elsewhere == compared


def test_a_wrong_count_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_flop_counts, "SHAPES", [SHAPE])
    monkeypatch.setattr(counts, "router_flops", lambda d_model, num_experts: d_model * num_experts)
    suite = Suite(Options())
    with pytest.raises(AssertionError, match="by formula"):
        bench_flop_counts.bench_flop_counts("gelu", suite)
    assert not all(suite.counts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes_are_those_of_the_formula(dtype: torch.dtype) -> None:
    case = LayerCase.make(Shape(T=512, D=64, F=128, K=2, E=8), "uniform", gated=False, device=CPU).to(dtype)
    ours = layers.ours(case, [0])
    assert saved_bytes(ours) == pytest.approx(ours.cost.saved_formula, rel=0.005)
    assert saved_bytes(layers.grouped_mm(case, [0])) > saved_bytes(ours)


def test_measuring_saved_bytes_keeps_nothing_alive() -> None:
    """Hooks that hand back an output itself tie its graph, and the weights, into a circle that is never freed."""
    case = LayerCase.make(SHAPE, "uniform", gated=False, device=CPU)
    contender = layers.ours(case, [0])
    saved_bytes(contender)
    weight = weakref.ref(contender.parameters[1])
    del contender
    gc.collect()
    assert weight() is None


def test_padding_counts_the_slots_that_hold_no_token() -> None:
    pytest.importorskip("fairscale", reason="fairscale is the extra 'fairscale'")
    shape = Shape(T=64, D=64, F=12, K=2, E=4)
    uneven = peers.fairscale(LayerCase.make(shape, "one-hot", gated=False, device=CPU), [0])
    # two experts take all: 64 tokens each into 32 slots, and the two others' slots stay empty
    assert uneven.cost.padded_share == pytest.approx(0.5, abs=0.02)
    assert uneven.cost.executed_flops is not None
    slots, passes = 4 * 32, 3
    experts = passes * slots * 4 * 64 * 12
    einsum = 2 * 64 * slots * 64  # of (T, E·C) and (T, D), once to dispatch and once to combine; a mask has no gradient
    router = passes * 2 * 64 * 64 * 4
    assert uneven.cost.executed_flops == experts + router + (2 + 3) * einsum
    assert layers.ours(LayerCase.make(shape, "one-hot", gated=False, device=CPU), [0]).cost.padded_share == 0.0


# ratios that are held


def test_the_requirements_are_those_of_the_reference_row() -> None:
    for shape in REFERENCE_SHAPES:
        plain, gated = held_ratios(shape, False), held_ratios(shape, True)
        assert plain[0] == Ratio("ours [fp32]", "dense [fp32]", *DENSE[shape.E])
        assert gated[0].limit is None
        assert all(ratio in peer_ratios(shape, gated) for gated in (False, True) for ratio in HELD[gated, shape.E])
    elsewhere = SHAPE._replace(E=8)
    assert all(ratio.limit is None for ratio in [*held_ratios(elsewhere, False), *peer_ratios(elsewhere, True)])


def test_peers_that_something_is_required_beside_keep_their_rounds() -> None:
    """The labels that the ratios name are those that the peers' rows have."""
    asked = {}
    for shape in REFERENCE_SHAPES:
        small = Shape(T=4 * shape.E, D=4, F=4, K=2, E=shape.E)
        for gated in (False, True):
            case = LayerCase.make(small, "uniform", gated=gated, device=CPU)
            taking = {n: p for n, p in peers.PEERS.items() if p.installed and p.takes(case) and n != "fairscale"}
            held = peer_ratios(shape, gated)
            asked[shape.E, gated] = {n for n, p in taking.items() if decides(p.build(case, case.sampled()), held)}
            labels = {ratio.denominator for ratio in held if "Mixtral" in ratio.denominator}
            if importlib.util.find_spec("transformers") is not None:
                assert labels <= {p.build(case, case.sampled()).label for p in taking.values()}
    assert asked[8, False] == {"grouped_mm", "loop_unbind", "loop"}
    assert asked[64, False] == {"loop"} and asked[512, False] == set()
    if importlib.util.find_spec("transformers") is not None:
        assert asked[8, True] == asked[64, True] == {"transformers", "transformers_eager"}
        assert asked[512, True] == {"transformers"}


def test_the_fastest_peer_is_the_one_that_counts() -> None:
    suite = measuring()
    contenders = [
        constant("ours", 1.0),
        replace(constant("slow", 1.0, peer=True), forward=lambda: spin(0.03)),
        replace(constant("quick", 1.0, peer=True), forward=lambda: spin(0.01)),
    ]
    contenders[0] = replace(contenders[0], forward=lambda: spin(0.02))
    suite.run("case", contenders, ratios=[Ratio("ours [fp32]", FASTEST_PEER, 1 / 0.97)])
    assert suite.held[0].value == pytest.approx(2.0, rel=0.3)
    assert any(line.startswith("MISSED") for line in report.held_lines(suite))


def spin(seconds: float) -> Tensor:
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
    return torch.ones(1)


@pytest.mark.parametrize(
    ("value", "across_processes", "fails"),
    [
        (1.0, False, False),
        (1.19, False, False),
        (1.21, False, True),
        (1.59, True, False),
        (1.61, True, True),
        (float("nan"), False, True),
        (float("nan"), True, True),
    ],
)
def test_a_worse_ratio_fails_the_comparison(tmp_path: Path, value: float, across_processes: bool, fails: bool) -> None:
    path = tmp_path / "ratios.json"
    suite = Suite(Options(), held=[Held("a / b", 1.0, None, None), Held("c / d", 2.0, None, None)])
    regression.write(path, suite)
    again = Suite(Options(), held=[Held("a / b", value, None, None, across_processes), Held("new", 9.0, None, None)])
    found = regression.compare(path, again)
    assert found.compared == 1
    assert bool(found.failures) == fails
    regression.write(path, again)
    assert set(json.loads(path.read_text())["ratios"]) == {"a / b", "c / d", "new"}  # other cases stay


def test_a_comparison_of_nothing_fails(tmp_path: Path) -> None:
    path = tmp_path / "ratios.json"
    regression.write(path, Suite(Options(), held=[Held("a / b", 1.0, None, None)]))
    assert regression.compare(path, Suite(Options(), held=[Held("other", 1.0, None, None)])).failures
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a file of ratios"):
        regression.compare(path, Suite(Options()))


def test_the_committed_ratios_are_those_that_are_required() -> None:
    committed = json.loads((ROOT / "benchmarks/regression.json").read_text())
    assert committed["tolerance"] == regression.TOLERANCE
    assert committed["tolerance_across_processes"] == regression.TOLERANCE_ACROSS_PROCESSES
    for shape in REFERENCE_SHAPES:
        assert f"layer, GELU, {shape}: ours [fp32] / dense [fp32]" in committed["ratios"]
    assert all(0 < ratio < 100 for ratio in committed["ratios"].values())
