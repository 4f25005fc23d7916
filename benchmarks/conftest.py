"""`pytest benchmarks/ --flops` measures; without the option every benchmark runs once, to show that it works.

Everything of one table is measured in turns in one process, so that a busy machine slows all of it alike: read the
ratios, not the milliseconds. The bound is max(FLOPs / measured GEMM rate, bytes / measured bandwidth).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

ROUNDS = 9
SECONDS_PER_SAMPLE = 0.02  # a sample repeats the call for at least so long


class Contender(NamedTuple):
    """One implementation of what is compared."""

    name: str
    call: Callable[[], object]
    flops: float  # useful ones of one call
    bytes: float  # that must move at least: inputs, weights in use and outputs, once


class Row(NamedTuple):
    """One line of the table."""

    case: str
    name: str
    seconds: float
    ratio: float  # of the first contender's time to this one's: above 1 is faster than it
    flops: float
    bytes: float


class Limits(NamedTuple):
    """What this machine does at best, measured now."""

    flops_per_second: float
    bytes_per_second: float


Compare = Callable[[str, list[Contender]], None]
_rows: list[Row] = []
_limits: list[Limits] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--flops", action="store_true", help="measure time, FLOP/s and bytes of the benchmarks")


@pytest.fixture(scope="session")
def compare(pytestconfig: pytest.Config) -> Iterator[Compare]:
    """Call as compare(case, contenders); the first contender is what the others are compared with."""
    measuring = pytestconfig.getoption("--flops")
    if measuring and not _limits:
        _limits.append(_measure_limits())

    def run(case: str, contenders: list[Contender]) -> None:
        for contender in contenders:
            contender.call()  # warm-up, and all there is without --flops
        if not measuring:
            return
        repeats = {c.name: max(1, round(SECONDS_PER_SAMPLE / _seconds(c.call, 1))) for c in contenders}
        samples: dict[str, list[float]] = {c.name: [] for c in contenders}
        for _ in range(ROUNDS):
            for contender in contenders:
                samples[contender.name].append(_seconds(contender.call, repeats[contender.name]))
        first = samples[contenders[0].name]
        for c in contenders:
            ratio = statistics.median(a / b for a, b in zip(first, samples[c.name], strict=True))
            _rows.append(Row(case, c.name, statistics.median(samples[c.name]), ratio, c.flops, c.bytes))

    yield run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _rows:
        return
    (limits,) = _limits
    write = terminalreporter.write_line
    terminalreporter.section("benchmarks")
    write(
        f"{torch.get_num_threads()} threads; measured limits: {limits.flops_per_second / 1e9:.1f} GFLOP/s "
        f"(GEMM, fp32), {limits.bytes_per_second / 1e9:.1f} GB/s (copy); medians of {ROUNDS} interleaved rounds"
    )
    head = f"{'case':<34}{'what':<26}{'ms':>9}{'GFLOP/s':>9}{'of GEMM':>9}{'MB':>8}{'of bound':>10}{'speed':>8}"
    write(head)
    for row in _rows:
        rate = row.flops / row.seconds
        bound = max(row.flops / limits.flops_per_second, row.bytes / limits.bytes_per_second)
        write(
            f"{row.case:<34}{row.name:<26}{row.seconds * 1e3:>9.2f}{rate / 1e9:>9.1f}"
            f"{rate / limits.flops_per_second:>9.0%}{row.bytes / 1e6:>8.1f}"
            f"{bound / row.seconds:>10.0%}{row.ratio:>7.2f}x"
        )
    write(
        "of bound: max(FLOPs / GEMM rate, bytes / bandwidth) over the time; speed: the first line's time over this one"
    )


def _seconds(call: Callable[[], object], repeats: int) -> float:
    started_at = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started_at) / repeats


def _measure_limits() -> Limits:
    a, b = torch.randn(2, 1024, 1024).unbind(0)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    gemm = min(_seconds(lambda: torch.mm(a, b, out=out), 3) for _ in range(ROUNDS))
    source = torch.randn(2**25)  # 128 MiB: beyond every cache
    target = torch.empty_like(source)
    target.copy_(source)
    copy = min(_seconds(lambda: target.copy_(source), 1) for _ in range(ROUNDS))
    return Limits(2 * 1024**3 / gemm, 2 * source.numel() * source.element_size() / copy)
