"""One run of the benchmarks: check, warm up, measure in turns, and collect the rows."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import clock as clocks
from .contender import TOLERANCE, Contender, mismatch, saved_bytes
from .loads import Shape

REFERENCE_SHAPES = [Shape(T=2048, D=256, F=1024, K=2, E=e) for e in (8, 64, 512)]
QUICK_SHAPES = [Shape(T=512, D=64, F=256, K=2, E=e) for e in (8, 64)]
ROUNDS, QUICK_ROUNDS = 7, 3
FEW_ROUNDS = 3  # for rows without a limit, or far from it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    """The command-line options."""

    flops: bool = False  # measure
    quick: bool = False
    full: bool = False  # also rows that repeat what others show, and every round of every row
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    backends: tuple[str, ...] = ("auto",)
    peers: tuple[str, ...] = ()
    shapes: tuple[Shape, ...] | None = None  # None is the reference shapes, or the quick ones
    threads: int = 1
    rounds: int | None = None  # None is 7, or 3 with `quick`

    @property
    def small(self) -> bool:
        """Quick sizes, also used without --flops, when every benchmark runs once."""
        return self.quick or not self.flops

    @property
    def num_rounds(self) -> int:
        return self.rounds if self.rounds is not None else QUICK_ROUNDS if self.quick else ROUNDS

    @property
    def few_rounds(self) -> int:
        """Rounds of contenders and cases marked as few. An explicit number of rounds applies to every row."""
        everywhere = self.full or self.rounds is not None
        return self.num_rounds if everywhere else min(FEW_ROUNDS, self.num_rounds)

    @property
    def all_rows(self) -> bool:
        """With --full, and without --flops, when every benchmark has to show that it works."""
        return self.full or not self.flops

    @property
    def layer_shapes(self) -> list[Shape]:
        if self.shapes is not None:
            return list(self.shapes)
        return QUICK_SHAPES if self.small else REFERENCE_SHAPES

    @property
    def torch_dtypes(self) -> list[torch.dtype]:
        return [DTYPES[name] for name in self.dtypes]


@dataclass(frozen=True)
class Row:
    """One table row, for one call of one contender. Missing values are None."""

    case: str
    name: str
    dtype: str
    backend: str
    routing: str
    check: str  # "ok 3e-07", why there is none, or what differed
    seconds: float | None = None  # on the ratio clock; median over rounds
    spread: float | None = None  # half the range, relative to the median
    forward_seconds: float | None = None
    cpu_seconds: float | None = None
    wall_seconds: float | None = None
    rounds: int = 0
    useful_flops: float = 0.0
    executed_flops: float = 0.0
    flops_per_second: float | None = None  # useful FLOPs
    gemm_share: float | None = None  # of the dtype's GEMM rate, measured in the same rounds
    bytes: float = 0.0
    bandwidth_share: float | None = None  # of a copy's bandwidth, measured in the same rounds
    bound_share: float | None = None  # max(FLOPs / GEMM rate, bytes / bandwidth), relative to the time
    saved_bytes: int | None = None
    saved_formula: int | None = None
    padded_share: float | None = None
    to_dense: float | None = None  # time relative to the dense twin's in the same dtype
    to_first: float | None = None  # time relative to the case's first contender's


class Ratio(NamedTuple):
    """A required ratio of times in one case: at most `limit`, ideally `goal`. Tracked by --compare."""

    numerator: str  # labels of contenders, or "fastest peer"
    denominator: str
    limit: float | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Held:
    """A measured ratio."""

    name: str
    value: float
    limit: float | None
    goal: float | None
    across_processes: bool = False  # one scheduler slice more or less decides such a time: --compare allows it more


@dataclass
class Suite:
    """Collects what the benchmarks measure."""

    options: Options
    rows: list[Row] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    counts: dict[str, bool] = field(default_factory=dict)  # FLOP count -> whether it equals torch's counter
    limits: dict[str, list[float]] = field(default_factory=dict)  # name -> rate in each case
    regressions: Any = None  # a regression.Comparison, with --compare
    loads: dict[str, float] = field(default_factory=dict)  # case and routing -> busiest expert, relative to the mean

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    def run(
        self,
        case: str,
        contenders: Sequence[Contender],
        *,
        ratios: Sequence[Ratio] = (),
        threads: int | None = None,
        few: bool = False,
    ) -> None:
        """Check everything against its reference, then measure with --flops.

        The others are compared with the first contender. A contender that fails its check is not measured: its row says
        what differed, and in the end a WrongResultError names all such. few: FEW_ROUNDS suffice for the whole case.
        """
        before = torch.get_num_threads()
        threads = threads or self.options.threads
        torch.set_num_threads(threads)
        try:
            checks, first_samples = self._check_all(contenders, threads)
            release_memory()  # a reference's gradients, before others are timed
            wrong = {label: text for label, text in checks.items() if text.startswith(_WRONG)}
            if self.options.flops:
                sound = [c for c in contenders if c.label not in wrong]
                if sound:
                    self._measure(case, sound, checks, ratios, threads, first_samples, few)
                self.rows += [_row_head(case, c, checks[c.label]) for c in contenders if c.label in wrong]
        finally:
            torch.set_num_threads(before)
        if wrong:
            raise WrongResultError("; ".join(f"{case}: {label}: {text}" for label, text in wrong.items()))

    def _check_all(
        self, contenders: Sequence[Contender], threads: int
    ) -> tuple[dict[str, str], dict[str, clocks.Sample]]:
        """Run each once, as check and warm-up. -> by label, the check's result and that call's sample.

        References run first: the call that warms one up also provides the outcome the others are checked against.
        """
        clock = clocks.Clock(self.device, threads)
        expected: dict[Any, Mapping[str, Tensor]] = {}  # by the reference's forward, which `replace` preserves
        references = {c.reference.forward for c in contenders if c.reference is not None}
        checks, samples = {}, {}
        for c in sorted(contenders, key=lambda c: c.forward not in references):
            if c.reference is not None and c.reference.forward not in expected:
                expected[c.reference.forward] = _outcome(c.reference)
            returned: list[Any] = []
            samples[c.label] = clock.sample(clocks.Timed(c.label, *_keeping(c, returned)))
            output, result = returned if c.backward is not None else (returned[0], None)
            checks[c.label] = c.unchecked or "no reference"
            if c.forward in references and c.outcome is not None:
                expected[c.forward] = c.outcome(output, result)
            if c.outcome is not None and c.reference is not None:
                wrong = mismatch(c.outcome(output, result), expected[c.reference.forward], TOLERANCE[c.dtype])
                checks[c.label] = "ok" if wrong is None else _WRONG + wrong
            del output, result, returned
        return checks, {c.label: samples[c.label] for c in contenders}

    def _measure(
        self,
        case: str,
        contenders: Sequence[Contender],
        checks: Mapping[str, str],
        ratios: Sequence[Ratio],
        threads: int,
        first_samples: Mapping[str, clocks.Sample],
        few: bool,
    ) -> None:
        saved = {c.label: saved_bytes(c) for c in contenders if c.backward is not None and c.parameters}
        clock = clocks.Clock(self.device, threads)
        dtypes = list(dict.fromkeys(c.dtype for c in contenders))
        limits = clocks.make_limits(self.device, dtypes, self.options.small)
        fewer = self.options.few_rounds
        timed = [
            clocks.Timed(c.label, c.forward, c.backward, c.peer, rounds=fewer if c.few else None) for c in contenders
        ]
        samples = clocks.interleave(
            clock,
            [*timed, *(limit.timed for limit in limits)],
            fewer if few else self.options.num_rounds,
            first_samples,
            patient=self.options.full,
        )
        for limit in limits:
            median = statistics.median(s.total for s in clocks.taken(samples[limit.timed.name]))
            name = f"{limit.timed.name.removeprefix('limit: ')}, {threads} threads"
            self.limits.setdefault(name, []).append(limit.amount / median)
        first = next(iter(first_samples))
        amounts = {limit.timed.name: limit.amount for limit in limits}
        for c in contenders:
            row = _row(case, c, checks[c.label], samples, amounts, saved.get(c.label))
            dense = f"dense [{row.dtype}]"
            to_dense = clocks.ratio(samples, c.label, dense) if dense in samples else None
            to_first = clocks.ratio(samples, c.label, first) if first in samples else None
            self.rows.append(_with(row, to_dense=to_dense, to_first=to_first))
        self.held += _held(case, contenders, samples, ratios)

    def note_load(self, case: str, load: Tensor) -> None:
        """Record the actual imbalance of a load."""
        self.loads[case] = float(load.max() / load.float().mean())


def release_memory() -> None:
    """Release unused memory: contenders and their closures form cycles, and glibc keeps what it freed."""
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class WrongResultError(AssertionError):
    """A contender's result differs from the reference's."""


_WRONG = "WRONG: "


def _outcome(contender: Contender) -> Mapping[str, Tensor]:
    output = contender.forward()
    grads = None if contender.backward is None else contender.backward(output)
    assert contender.outcome is not None
    return contender.outcome(output, grads)


def _keeping(c: Contender, returned: list[Any]) -> tuple[Callable[[], Any], Callable[[Any], Any] | None]:
    """Forward and backward that append their results to the list."""

    def forward() -> Any:
        returned.append(c.forward())
        return returned[0]

    def backward(output: Any) -> None:
        assert c.backward is not None
        returned.append(c.backward(output))

    return forward, None if c.backward is None else backward


def _row_head(case: str, c: Contender, check: str) -> Row:
    return Row(
        case=case,
        name=c.name,
        dtype=c.label.rsplit("[", 1)[1].rstrip("]"),
        backend=c.backend,
        routing=c.routing,
        check=check,
        useful_flops=c.cost.flops,
        executed_flops=c.cost.flops if c.cost.executed_flops is None else c.cost.executed_flops,
        bytes=c.cost.bytes,
        saved_formula=c.cost.saved_formula,
        padded_share=c.cost.padded_share,
    )


def _row(
    case: str,
    c: Contender,
    check: str,
    samples: clocks.Samples,
    amounts: Mapping[str, float],
    saved: int | None,
) -> Row:
    own = clocks.taken(samples[c.label])
    seconds = statistics.median(s.total for s in own)
    gemm, copy = clocks.gemm_name(c.dtype), clocks.COPY
    # the time at the limit's rate over the measured time, from the ratio of the two times in each round
    of_gemm = c.cost.flops / amounts[gemm] / clocks.ratio(samples, c.label, gemm)
    of_copy = c.cost.bytes / amounts[copy] / clocks.ratio(samples, c.label, copy)
    return _with(
        _row_head(case, c, check),
        seconds=seconds,
        spread=clocks.spread(samples[c.label]),
        forward_seconds=statistics.median(s.forward for s in own) if c.backward is not None else None,
        cpu_seconds=statistics.median(s.cpu for s in own),
        wall_seconds=statistics.median(s.wall for s in own),
        rounds=len(own),
        flops_per_second=c.cost.flops / seconds if c.cost.flops else None,
        gemm_share=of_gemm if c.cost.flops else None,
        bandwidth_share=of_copy,
        bound_share=max(of_gemm, of_copy),
        saved_bytes=saved,
    )


def _with(row: Row, **changes: Any) -> Row:
    return Row(**(row.__dict__ | changes))


def _held(case: str, contenders: Sequence[Contender], samples: clocks.Samples, ratios: Sequence[Ratio]) -> list[Held]:
    """The ratios with both sides measured."""
    found = []
    for each in ratios:
        denominators = [each.denominator]
        if each.denominator == FASTEST_PEER:
            dtype = each.numerator.rsplit("[", 1)[1]
            denominators = [c.label for c in contenders if c.peer and c.label.endswith(dtype)]
        present = [label for label in denominators if label in samples]
        if each.numerator not in samples or not present:
            continue
        value = max(clocks.ratio(samples, each.numerator, label) for label in present)  # the fastest has the largest
        found.append(Held(f"{case}: {each.numerator} / {each.denominator}", value, each.limit, each.goal))
    return found


FASTEST_PEER = "fastest peer"
