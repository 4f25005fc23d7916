"""docs/gradient_contract.md held to one process: ranks, axes, micro-batches, recompute, options, masks, precision.

Every case is a named test; all cases of a number of ranks run in one spawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.data.loader import TokenBatch
from moe.distributed.world import World
from moe.evaluation.perplexity import SplitScore, evaluate
from moe.layers.moe import MoE
from tests.moe.distributed.contract import (
    CLIP_NORM,
    Case,
    Measured,
    MeshesOf,
    build,
    expected,
    measure,
    rank_batch,
    relative_error,
    trainer_of,
    with_options,
)
from tests.ranks import run_ranks

ROUNDING = 1e-10  # float64, of the largest entry; measured at most 2e-15
# |g - exact| / |exact| over all gradients together, measured 2e-7, 7e-3 and 1e-3. bfloat16 keeps 8 bits of each factor,
# float16 11, and a near-tie may go to another expert; a gradient of half or twice the size is off by 0.5 or 1
NEAR = {"fp32": 1e-6, "bf16": 0.03, "fp16": 0.005}
AXES = {2: ((1, 1), (1, 2), (2, 1)), 4: ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1))}  # (dp_replicate, ep)
SPARSE = ("dropless", "capacity", "gshard", "shared", "balanced", "global", "sequence")


def mesh_cases(ranks: int) -> Iterator[Case]:
    """Every model on every mesh, with micro-batches and recompute in turn; one model with all of them."""
    yield from (Case(ranks, "dense", 1, replicate, 2, True) for replicate in (1, 2))
    turns = list(product((1, 2), (False, True)))
    for i, model in enumerate(SPARSE):
        for j, (replicate, ep) in enumerate(AXES[ranks]):
            if ranks == 2 or (i + j) % 3 == 0 or model == "dropless":  # at 4 ranks two meshes each
                yield Case(ranks, model, ep, replicate, *turns[(i + j) % 4])
    yield from (Case(ranks, "capacity", ranks, 1, *turn) for turn in turns)


def option_cases(ranks: int) -> Iterator[Case]:
    """The ways of rows over the wire, that a rank's load is limited, and offloading."""
    everywhere = Case(ranks, "shared", ranks)
    yield everywhere
    yield with_options(everywhere, overlap_parts=2)
    yield with_options(everywhere, ranks_per_node=ranks // 2)
    yield with_options(everywhere, ranks_per_node=ranks // 2, overlap_parts=2)
    yield with_options(everywhere._replace(recompute=True), rows_limit=16)
    yield with_options(everywhere, rows_limit=16, ranks_per_node=ranks // 2, overlap_parts=2)
    if ranks == 4:
        # in the second layer the fullest ranks of the two groups that share experts take in 104 and 109 rows: one group
        # needs no rounds for itself, and FSDP2 gathers an expert from ranks of both
        yield with_options(Case(ranks, "shared", 2), rows_limit=104)
    if ranks == 2:
        yield with_options(everywhere, reshard_after_forward=False)
        yield with_options(everywhere, cpu_offload=True)
    for model in ("capacity", "gshard"):
        yield Case(ranks, model, ranks)
        yield with_options(Case(ranks, model, ranks), fixed_capacity=True)
    yield with_options(Case(ranks, "capacity", ranks), fixed_capacity=True, overlap_parts=2)


def batch_cases(ranks: int) -> Iterator[Case]:
    """Masked tokens, ranks with fewer sequences than others, a rank of padding alone."""
    yield from (Case(ranks, model, ranks, batch="masked") for model in ("capacity", "sequence"))
    yield from (Case(ranks, model, ranks, 1, 2, batch="uneven") for model in ("dropless", "capacity", "global"))
    yield from (Case(ranks, model, ranks, batch="padded") for model in ("shared", "gshard", "global", "sequence"))
    yield from (Case(ranks, model, ranks, 1, 2, batch="answers") for model in ("dropless", "global"))
    yield Case(ranks, "dense", 1, 1, 2, batch="answers")
    yield with_options(Case(ranks, "capacity", ranks, batch="padded"), fixed_capacity=True)
    yield Case(ranks, "dropless", 1, ranks, batch="padded")


def resized_cases(ranks: int) -> Iterator[Case]:
    """The same 8 sequences whatever the number of ranks."""
    for model in ("unbalanced", "global", "sequence", "dropless", "capacity"):
        yield Case(ranks, model, ranks, sequences=8 // ranks)
    yield from (Case(ranks, model, ranks, 1, 2, sequences=8 // ranks) for model in ("unbalanced", "sequence"))


def noisy_cases(ranks: int) -> Iterator[Case]:
    """Dropout and jitter, which are draws of each rank: not equal to one process, but equal when recomputed."""
    yield from (Case(ranks, "noisy", ranks, 1, 2, recompute) for recompute in (False, True))
    yield Case(ranks, "noisy", 1, 1, 2)
    yield from (Case(ranks, "jitter", ep, 1, 2) for ep in (1, ranks))


EXACT = {
    ranks: list(
        dict.fromkeys([*mesh_cases(ranks), *option_cases(ranks), *batch_cases(ranks), *resized_cases(ranks)]).keys()
    )
    for ranks in (2, 4)
}
NOISY = {ranks: list(noisy_cases(ranks)) for ranks in (2, 4)}
ROUGH = [Case(2, "dropless", 2, precision=precision) for precision in ("fp32", "bf16", "fp16")]
ROUGH += [Case(2, "dropless", 1, precision=precision) for precision in ("fp32", "bf16")]
ALL = [*EXACT[2], *EXACT[4]]
STEPS = {1: Case(1, "balanced", sequences=8, micro_batches=1, batch="masked")}
STEPS |= {ranks: Case(ranks, "balanced", ranks, sequences=8 // ranks, batch="masked") for ranks in (2, 4)}


class Windows:
    """Three batches of held-out text, the last one shorter and padded."""

    domain, num_bytes = "made-up", 100

    @property
    def document_lengths(self) -> list[int]:
        masks = [batch.token_mask for batch in self]
        return [sum(32 if mask is None else int(mask.sum()) for mask in masks)]

    def __iter__(self) -> Iterator[TokenBatch]:
        case = Case(1, batch="masked")
        for step in range(3):
            batch = rank_batch(case, 0, 100 + step)
            yield batch if step == 2 else batch._replace(token_mask=None)


def train_and_score(world: World, case: Case, meshes: MeshesOf | None) -> tuple[list[Any], list[Tensor], SplitScore]:
    """Three updates: metrics, the balancing biases, and the score of what was trained."""
    model = build(case, None if meshes is None else meshes(case))
    trainer = trainer_of(case, world, model, lambda step: rank_batch(case, world.rank, step))
    steps = [trainer.step() for _ in range(3)]
    biases = [module.router.expert_bias for module in model.modules() if isinstance(module, MoE)]
    return steps, biases, evaluate(model, [Windows()], world=world)


def program(world: World) -> tuple[dict[Case, Measured], Any]:
    cases = [*EXACT[world.size], *NOISY[world.size], *(ROUGH if world.size == 2 else [])]
    return measure(world, cases), train_and_score(world, STEPS[world.size], MeshesOf(world))


@pytest.fixture(scope="module")
def two_ranks() -> list[Any]:
    return run_ranks(program, 2)


@pytest.fixture(scope="module")
def four_ranks() -> list[Any]:
    return run_ranks(program, 4)


@pytest.fixture(scope="module")
def all_ranks(request: pytest.FixtureRequest) -> Any:
    """Case -> what each rank measured; a number of ranks is started when a test first asks for it."""
    return lambda ranks: request.getfixturevalue("two_ranks" if ranks == 2 else "four_ranks")


def of_first(all_ranks: Any, case: Case) -> Measured:
    measured: Measured = all_ranks(case.ranks)[0][0][case]
    return measured


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_gradient_is_that_of_one_process(all_ranks: Any, case: Case) -> None:
    actual, wanted = of_first(all_ranks, case).gradients, expected(case).gradients
    assert list(actual) == list(wanted)
    errors = {name: relative_error(actual[name], gradient) for name, gradient in wanted.items()}
    assert max(errors.values()) <= ROUNDING, errors
    assert sum(bool(gradient.any()) for gradient in wanted.values()) == len(wanted)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_rank_knows_the_losses_and_the_norm_of_all(all_ranks: Any, case: Case) -> None:
    wanted = expected(case)
    for measured, _ in all_ranks(case.ranks):
        assert measured[case].losses == pytest.approx(wanted.losses, rel=ROUNDING)
        assert measured[case].norm == pytest.approx(wanted.norm, rel=ROUNDING)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_clipping_scales_as_in_one_process(all_ranks: Any, case: Case) -> None:
    actual, wanted = of_first(all_ranks, case).clipped, expected(case).clipped
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in actual.values()))
    assert norm == pytest.approx(CLIP_NORM, rel=1e-4)
    assert max(relative_error(actual[name], gradient) for name, gradient in wanted.items()) <= ROUNDING


@pytest.mark.parametrize("case", [case for case in ALL if case.model != "dense"], ids=str)
def test_router_statistics_are_those_of_all_tokens(all_ranks: Any, case: Case) -> None:
    wanted = expected(case).statistics
    assert len(wanted) == 2
    for measured, _ in all_ranks(case.ranks):
        for layer, oracle in zip(measured[case].statistics, wanted, strict=True):
            for name, value in oracle._asdict().items():
                # entropy and shares are float32
                torch.testing.assert_close(getattr(layer, name), value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("model", ["unbalanced", "global", "sequence"])
def test_ranks_and_micro_batches_do_not_matter(all_ranks: Any, ranks: int, model: str) -> None:
    """8 sequences in one process and one forward pass, against 8 / W of each of W ranks, in micro-batches too."""
    wanted = expected(Case(1, model, sequences=8))
    for micro_batches in (1, 2) if model != "global" else (1,):
        actual = of_first(all_ranks, Case(ranks, model, ranks, 1, micro_batches, sequences=8 // ranks))
        assert max(relative_error(actual.gradients[n], g) for n, g in wanted.gradients.items()) <= ROUNDING
        for name in ("loss", "cross_entropy", "router_z", *(["load_balance"] if model != "unbalanced" else [])):
            assert actual.losses[name] == pytest.approx(wanted.losses[name], rel=ROUNDING), name


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("model", ["dropless", "capacity"])
def test_a_local_group_is_another_with_other_ranks(all_ranks: Any, ranks: int, model: str) -> None:
    """The local balance loss and capacity are functions of a rank's micro-batch, and the page says so."""
    wanted = expected(Case(1, model, sequences=8)).gradients
    actual = of_first(all_ranks, Case(ranks, model, ranks, sequences=8 // ranks)).gradients
    assert max(relative_error(actual[name], gradient) for name, gradient in wanted.items()) > 1e-3


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_way_of_the_rows_changes_no_bit(all_ranks: Any, ranks: int) -> None:
    """Overlap, two levels and both; and where weights are kept: against the flat exchange."""
    everywhere = Case(ranks, "shared", ranks)
    plain = of_first(all_ranks, everywhere).gradients
    for options in (
        {"overlap_parts": 2},
        {"ranks_per_node": ranks // 2},
        {"ranks_per_node": ranks // 2, "overlap_parts": 2},
        *([{"reshard_after_forward": False}, {"cpu_offload": True}] if ranks == 2 else []),
    ):
        other = of_first(all_ranks, with_options(everywhere, **options)).gradients
        assert [name for name, gradient in plain.items() if not torch.equal(gradient, other[name])] == []


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_recomputation_changes_no_bit(all_ranks: Any, ranks: int, micro_batches: int) -> None:
    once, again = (
        of_first(all_ranks, Case(ranks, "capacity", ranks, 1, micro_batches, recompute)) for recompute in (False, True)
    )
    assert [name for name, g in once.gradients.items() if not torch.equal(g, again.gradients[name])] == []


@pytest.mark.parametrize("ranks", [2, 4])
def test_recomputation_sees_the_same_dropout_and_jitter(all_ranks: Any, ranks: int) -> None:
    once, again = (of_first(all_ranks, case) for case in NOISY[ranks][:2])
    assert [name for name, g in once.gradients.items() if not torch.equal(g, again.gradients[name])] == []
    assert once.losses == again.losses


@pytest.mark.parametrize("ranks", [2, 4])
def test_jitter_does_not_depend_on_where_experts_are_and_dropout_does(all_ranks: Any, ranks: int) -> None:
    """A router draws for its own tokens; dropout in the experts draws for the rows that came to them."""
    errors = {}
    for model in ("jitter", "noisy"):
        here, spread = (of_first(all_ranks, Case(ranks, model, ep, 1, 2)).gradients for ep in (1, ranks))
        errors[model] = max(relative_error(spread[name], gradient) for name, gradient in here.items())
    assert errors["jitter"] <= ROUNDING
    assert errors["noisy"] > 1e-3


@pytest.mark.parametrize("case", ROUGH, ids=str)
def test_lower_precision_stays_near(all_ranks: Any, case: Case) -> None:
    actual, wanted = of_first(all_ranks, case), expected(case)
    assert list(actual.gradients) == list(wanted.gradients)
    squares = [float((actual.gradients[name].double() - g).square().sum()) for name, g in wanted.gradients.items()]
    assert math.sqrt(sum(squares)) / wanted.norm <= NEAR[case.precision]
    assert actual.norm == pytest.approx(wanted.norm, rel=NEAR[case.precision])
    assert actual.losses == pytest.approx(wanted.losses, rel=NEAR[case.precision])


@pytest.fixture(scope="module")
def one_process() -> tuple[list[Any], list[Tensor], SplitScore]:
    return train_and_score(World(0, 1, torch.device("cpu"), None, 0.0), STEPS[1], None)


@pytest.mark.parametrize("ranks", [2, 4])
def test_whole_updates_repeat_those_of_one_process(all_ranks: Any, one_process: Any, ranks: int) -> None:
    """Losses, norms and loads of three updates, and the balancing biases, which move by the load of all ranks."""
    steps, biases, _ = one_process
    assert any(bias.any() for bias in biases)
    for _, (own_steps, own_biases, _) in all_ranks(ranks):
        for own, alone in zip(own_steps, steps, strict=True):
            for name in ("cross_entropy", "router_z_loss", "grad_norm"):
                assert getattr(own, name) == pytest.approx(getattr(alone, name), rel=1e-6), name
            loads = [[router.load_max_over_mean, router.dead_experts] for router in own.routers]
            assert loads == [[router.load_max_over_mean, router.dead_experts] for router in alone.routers]
        assert all(torch.equal(a, b) for a, b in zip(own_biases, biases, strict=True))


@pytest.mark.parametrize("ranks", [2, 4])
def test_perplexity_over_ranks_is_that_of_one_process(all_ranks: Any, one_process: Any, ranks: int) -> None:
    """Three batches over 2 and 4 ranks: some ranks are idle, and meet the others in every layer."""
    wanted = one_process[2]
    assert wanted.domains["made-up"].num_tokens < 96  # some are padding
    for _, (_, _, score) in all_ranks(ranks):
        own, alone = score.domains["made-up"]._asdict(), wanted.domains["made-up"]._asdict()
        assert own == pytest.approx(alone, rel=1e-6)  # of weights after three updates, which are equal to 1e-8
        assert score.tokens_per_expert == wanted.tokens_per_expert
