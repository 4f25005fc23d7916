"""Timing, and the two rates that bound it. Compared calls alternate, so a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

SAMPLE_SECONDS = 0.02  # short calls are repeated so that a sample takes at least this long
LONG_SECONDS = 0.1  # above this, the first call predicts the duration of the next ones well enough
SLOW_SECONDS = 3.0  # a slower peer is called only once: the call that checks it is its sample


class Timed(NamedTuple):
    """A call to time: `backward` receives what `forward` returned; None if there is no backward."""

    name: str
    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None
    peer: bool = False  # peers may be slow: see SLOW_SECONDS
    rounds: int | None = None  # number of rounds it takes part in, from the first; None is all


class Sample(NamedTuple):
    """Seconds per call, averaged over a sample's repeats. CPU seconds are summed over all threads."""

    forward: float  # on the ratio clock
    total: float  # on the ratio clock
    cpu: float
    wall: float


class Clock:
    """Measures calls on one device.

    Ratios use CPU time on one CPU thread, which other processes taking turns on the machine do not lengthen, wall time
    with several threads, and CUDA events on a GPU.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device = device
        self.threads = threads

    @property
    def ratio_clock(self) -> str:
        """The kind of time used for ratios."""
        if self.device.type == "cuda":
            return "CUDA events"
        return "CPU time" if self.threads == 1 else "wall time"

    def sample(self, timed: Timed, repeats: int = 1) -> Sample:
        """Time `repeats` calls in a row, dropping each result before the next call."""
        if self.device.type == "cuda":
            return self._sample_events(timed, repeats)
        by_cpu = self.threads == 1
        forward = 0.0
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            if timed.backward is None:
                timed.forward()
                continue
            start = time.process_time() if by_cpu else time.perf_counter()
            output = timed.forward()
            forward += (time.process_time() if by_cpu else time.perf_counter()) - start
            timed.backward(output)
            del output
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        total = cpu if by_cpu else wall
        forward = total if timed.backward is None else forward
        return Sample(*(seconds / repeats for seconds in (forward, total, cpu, wall)))

    def _sample_events(self, timed: Timed, repeats: int) -> Sample:
        marks = []
        torch.cuda.synchronize(self.device)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            start.record()
            output = timed.forward()
            middle.record()
            if timed.backward is not None:
                timed.backward(output)
            end.record()
            del output
            marks.append((start, middle, end))
        torch.cuda.synchronize(self.device)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        forward = sum(start.elapsed_time(middle) for start, middle, _ in marks) / 1e3  # elapsed_time is in ms
        total = sum(start.elapsed_time(end) for start, _, end in marks) / 1e3
        return Sample(*(seconds / repeats for seconds in (forward, total, cpu, wall)))


Samples = dict[str, list[Sample | None]]  # by name, one per round; None if it did not take part


def interleave(
    clock: Clock,
    everything: Sequence[Timed],
    rounds: int,
    first: Mapping[str, Sample] | None = None,
    *,
    patient: bool = False,
) -> Samples:
    """Call everything in turn for `rounds` rounds. Names must be unique, and each call must have run once before.

    first: samples of those first calls; long ones need no further probe of the number of repeats, and one of a peer
    above SLOW_SECONDS serves as its only round. patient: slow peers take part in every round too.
    """
    names = [timed.name for timed in everything]
    if len(set(names)) != len(names):
        raise ValueError(f"names ({names}) must differ: ratios are told apart by them")
    known = first or {}
    slow = {
        timed.name
        for timed in everything
        if timed.peer and not patient and timed.name in known and known[timed.name].total > SLOW_SECONDS
    }
    repeats = {}
    for timed in everything:
        seconds = known[timed.name].wall if timed.name in known else 0.0
        seconds = seconds if seconds > LONG_SECONDS else clock.sample(timed).wall
        repeats[timed.name] = max(1, round(SAMPLE_SECONDS / max(seconds, 1e-7)))
    samples: Samples = {name: [] for name in names}
    for index in range(rounds):
        for timed in everything:
            takes_part = timed.rounds is None or index < timed.rounds
            if timed.name in slow:
                sample = known[timed.name] if index == 0 else None
            else:
                sample = clock.sample(timed, repeats[timed.name]) if takes_part else None
            samples[timed.name].append(sample)
    return samples


def taken(samples: Sequence[Sample | None]) -> list[Sample]:
    """The samples of the rounds that were run."""
    return [sample for sample in samples if sample is not None]


def ratio(samples: Samples, numerator: str, denominator: str) -> float:
    """The median ratio of two times, over the rounds in which both ran."""
    return statistics.median(_ratios(samples, numerator, denominator))


def _ratios(samples: Samples, numerator: str, denominator: str) -> Iterator[float]:
    for above, below in zip(samples[numerator], samples[denominator], strict=True):
        if above is not None and below is not None:
            yield above.total / below.total


def spread(samples: Sequence[Sample | None]) -> float:
    """Half the range from fastest to slowest round, relative to the median."""
    seconds = [sample.total for sample in taken(samples)]
    return (max(seconds) - min(seconds)) / 2 / statistics.median(seconds)


class Limit(NamedTuple):
    """A call that does nothing but the bounding work, and the amount of it."""

    timed: Timed
    amount: float  # FLOPs or bytes per call


COPY = "limit: copy"


def gemm_name(dtype: torch.dtype) -> str:
    """The name of a dtype's GEMM limit."""
    return f"limit: GEMM {str(dtype).removeprefix('torch.')}"


def make_limits(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool) -> list[Limit]:
    """A square GEMM for every dtype and a copy larger than any cache, to be measured in turn with the rest."""
    n = (1024 if not quick else 512) if device.type == "cpu" else 8192
    limits = []
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        limits.append(Limit(Timed(gemm_name(dtype), _product(a, b, out)), 2.0 * n**3))
    source = torch.zeros(2**24 if device.type == "cpu" else 2**28, device=device)  # 64 MiB, 1 GiB
    target = torch.zeros_like(source)
    return [*limits, Limit(Timed(COPY, lambda: target.copy_(source)), 2.0 * source.nbytes)]


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
    return lambda: torch.mm(a, b, out=out)
