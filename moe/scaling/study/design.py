"""The two named designs: which models are compared, and what makes the comparison fair.

frontier (the paper's, Artetxe et al. 2021): a sparse model has its dense twin's shape, experts as wide as the dense
network, and the same tokens. It costs more FLOPs, so the two are compared on the total-FLOPs axis, through the dense
models that bracket it.

matched: a pair has equal total FLOPs per token within the study's tolerance, forward and backward, counting attention,
head, router, shared experts and recomputation. The width of the experts, or of the dense network, is solved for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moe.compose import compose, differences
from moe.config import RunConfig
from moe.config.study import StudyConfig
from moe.scaling.flops import executed_flops
from moe.scaling.params import count_params
from moe.scaling.study.files import fill

DENSE = "dense"
STATEMENTS = {
    "frontier": "Same-shape twins: an expert is as wide as the dense network, both arms read the same tokens. A sparse "
    "model costs more FLOPs than its twin, so arms are compared on the total-FLOPs axis, by interpolation between the "
    "dense models that bracket a sparse one's loss.",
    "matched": "Pairs of equal total FLOPs per token: forward and backward, with attention, head, router, shared "
    "experts and recomputation counted. A pair whose counts differ by more than the tolerance is refused.",
}


@dataclass(frozen=True)
class Arm:
    """One model of one size."""

    size: str
    name: str  # "dense", "8e", or with vary=dense "dense_8e"
    num_experts: int | None
    overrides: tuple[str, ...]
    config: RunConfig
    flops_per_token: float  # forward and backward, everything included
    total_params: int
    active_params: int


@dataclass(frozen=True)
class Pair:
    """A sparse model and its dense counterpart."""

    size: str
    dense: Arm
    sparse: Arm

    @property
    def difference(self) -> float:
        """Difference in FLOPs per token, relative to the dense model."""
        return self.sparse.flops_per_token / self.dense.flops_per_token - 1.0


@dataclass(frozen=True)
class Design:
    """All models of a study and their pairs."""

    name: str
    arms: tuple[Arm, ...]
    pairs: tuple[Pair, ...]

    def of_size(self, size: str) -> list[Arm]:
        return [arm for arm in self.arms if arm.size == size]


def derive(study: StudyConfig) -> Design:
    """Compose every model. Raises ValueError for a pair that cannot be matched or differs in more than its experts."""
    arms: list[Arm] = []
    pairs: list[Pair] = []
    for size in study.sizes:
        of_size, its_pairs = _frontier(study, size) if study.design == "frontier" else _matched(study, size)
        arms += of_size
        pairs += its_pairs
    for pair in pairs:
        _require_alike(study, pair)
    return Design(study.design, tuple(arms), tuple(pairs))


def unbracketed(design: Design) -> list[str]:
    """Sparse models with no dense model below, or fewer than two above them, in FLOPs per token.

    Their loss probably falls outside the dense bracket, where no speedup is defined (Artetxe et al. 2021).
    """
    dense = [arm.flops_per_token for arm in design.arms if arm.num_experts is None]
    notes = []
    for arm in design.arms:
        if arm.num_experts is None:
            continue
        below = sum(flops <= arm.flops_per_token for flops in dense)
        above = sum(flops > arm.flops_per_token for flops in dense)
        if not below or above < 2:
            notes.append(f"{arm.size}-{arm.name}: {below} dense sizes below and {above} above it")
    return notes


def _frontier(study: StudyConfig, size: str) -> tuple[list[Arm], list[Pair]]:
    settings = study.sizes[size]
    dense = _arm(study, size, DENSE, None, [])
    arms = [dense] if settings.dense else []
    sparse = [_arm(study, size, f"{n}e", n, ["model.expert_d_ff=null"]) for n in settings.experts]
    return [*arms, *sparse], [Pair(size, dense, arm) for arm in sparse]


def _matched(study: StudyConfig, size: str) -> tuple[list[Arm], list[Pair]]:
    arms: list[Arm] = []
    pairs = []
    for count in study.sizes[size].experts:
        if study.vary == "experts":
            dense = arms[0] if arms else _arm(study, size, DENSE, None, [])
            sparse = _solve(study, size, f"{count}e", count, "model.expert_d_ff", dense.flops_per_token)
        else:
            sparse = _arm(study, size, f"{count}e", count, [])
            dense = _solve(study, size, f"{DENSE}_{count}e", None, "model.d_ff", sparse.flops_per_token)
        pair = Pair(size, dense, sparse)
        if abs(pair.difference) > study.tolerance:
            changed = sparse if study.vary == "experts" else dense
            raise ValueError(
                f"the pair {size}: {sparse.name} cannot be matched: {changed.overrides[-1]} comes nearest and its "
                f"FLOPs per token ({sparse.flops_per_token:.5g}) differ by {pair.difference:+.2%} from the dense "
                f"model's ({dense.flops_per_token:.5g}), more than tolerance ({study.tolerance:.2%}); lower "
                f"width_multiple ({study.width_multiple}), vary the other arm or drop the pair"
            )
        arms += [arm for arm in (dense, sparse) if arm not in arms]
        pairs.append(pair)
    return arms, pairs


def _solve(study: StudyConfig, size: str, name: str, experts: int | None, key: str, target: float) -> Arm:
    """The model whose `key`, a multiple of width_multiple, comes nearest to `target` FLOPs, which are linear in it."""
    step = study.width_multiple
    base = _arm(study, size, name, experts, [f"{key}={step}"])

    def config(width: int) -> RunConfig:
        changes: dict[str, Any] = {key.removeprefix("model."): width}
        return replace(base.config, model=replace(base.config.model, **changes))

    one, two = (_flops(config(width)) for width in (step, 2 * step))
    width = step * max(1, round(1 + (target - one) / (two - one)))
    return _finish(size, name, experts, [*base.overrides[:-1], f"{key}={width}"], config(width))


def _arm(study: StudyConfig, size: str, name: str, experts: int | None, design: list[str]) -> Arm:
    own = [*study.overrides, *study.sizes[size].overrides]
    if experts is not None:
        own += [text.replace("{experts}", str(experts)) for text in study.sparse_overrides]
    owned = {text.split("=")[0] for text in design} | {"seed", "run_dir", "train.num_steps", "init_from"}
    for text in own:
        if text.split("=")[0].lstrip("+") in owned:
            raise ValueError(f"{text} of the study: design={study.design} sets it for every run; leave it out")
    overrides = [*fill(study, own), *design]
    config = compose(overrides)
    if (config.model.moe is None) != (experts is None):
        wanted = "no experts" if experts is None else f"{experts} experts"
        raise ValueError(f"{size}-{name} should have {wanted}: sparse_overrides alone add them, as +moe={{experts}}e")
    if config.model.moe is not None and config.model.moe.num_experts != experts:
        raise ValueError(
            f"{size}-{name} has {config.model.moe.num_experts} experts, not {experts}: see sparse_overrides"
        )
    if config.model.vocab_size is None:
        if config.data.tokenizer is not None:
            raise ValueError(
                "model.vocab_size must be stated in the overrides beside data.tokenizer: FLOPs follow from it"
            )
        overrides.insert(0, f"model.vocab_size={config.data.vocab_size}")
        config.model.vocab_size = config.data.vocab_size
    return _finish(size, name, experts, overrides, config)


def _finish(size: str, name: str, experts: int | None, overrides: list[str], config: RunConfig) -> Arm:
    params = count_params(config.model)
    return Arm(size, name, experts, tuple(overrides), config, _flops(config), params.total, params.active)


def _flops(config: RunConfig) -> float:
    """FLOPs per token, forward and backward, with recomputation."""
    return executed_flops(config.model, config.seq_len, recompute=config.train.recompute).total


def _require_alike(study: StudyConfig, pair: Pair) -> None:
    """Twins must share data, order, optimizer, batch, schedule and every model setting the design does not change."""
    allowed = ["model.moe", "model.expert_d_ff"]
    allowed += ["model.d_ff"] if study.design == "matched" and study.vary == "dense" else []
    changed = [
        text
        for text in differences(pair.dense.config, pair.sparse.config)
        if not any(text.split(":")[0] == key or text.startswith(f"{key}.") for key in allowed)
    ]
    if changed:
        raise ValueError(
            f"the pair {pair.size}: {pair.dense.name} and {pair.sparse.name} differ in {'; '.join(changed)}: both "
            f"arms must be alike but for their experts; move it from sparse_overrides to overrides"
        )
