"""Options and reporting of the benchmarks. `pytest benchmarks/` runs each once at small sizes, to show that it works;
`pytest benchmarks/ --flops` measures. docs/performance.md explains the columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe.training.allocator import keep_freed_memory

from . import regression, report
from .loads import Shape
from .peers import PEERS, parse_peers
from .suite import DTYPES, Options, Suite, release_memory

_SUITE = pytest.StashKey[Suite]()
REGRESSION_FILE = Path(__file__).parent / "regression.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--flops", action="store_true", help="measure time, FLOP/s and bytes; compare FLOPs with torch's")
    group.addoption("--quick", action="store_true", help="small sizes and 3 rounds: below a minute")
    group.addoption("--full", action="store_true", help="every row, each in all rounds: eleven minutes by sum of rows")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--dtype", default="fp32,bf16", help="of layers and experts: fp32, bf16, fp16, comma-separated")
    group.addoption("--backend", default="auto", help="of ours: auto, torch, triton, reference, comma-separated")
    group.addoption("--peers", default="all", help=f"all, none or of: {', '.join(PEERS)}")
    group.addoption("--shapes", action="append", help="T=2048,D=256,F=1024,K=2,E=8; may be given several times")
    group.addoption("--threads", type=int, default=1, help="CPU threads; ratios are of wall time with more than one")
    group.addoption("--rounds", type=int, help="interleaved rounds of every row; see the page")
    group.addoption("--json", type=Path, help="write everything to this file, and a plot beside it")
    group.addoption("--markdown", type=Path, help="rewrite the marked section of this page, and a plot beside it")
    group.addoption("--compare", action="store_true", help="fail where a ratio is worse than regression.json's")
    group.addoption("--write-regression", action="store_true", help="write the measured ratios to that file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "default_memory: runs before the trainer's allocator setting is made")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run default_memory first. The sort is stable, so the others keep their order."""
    items.sort(key=lambda item: item.get_closest_marker("default_memory") is None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark with the argument `shape` runs once per shape."""
    if "shape" in metafunc.fixturenames:
        shapes = parse_options(metafunc.config).layer_shapes
        metafunc.parametrize("shape", shapes, ids=[f"E={shape.E}" for shape in shapes])


def parse_options(config: pytest.Config) -> Options:
    """Parse the command line into Options. Raises pytest.UsageError for invalid options."""

    def names(option: str, known: list[str]) -> tuple[str, ...]:
        found = tuple(name.strip() for name in config.getoption(option).split(","))
        for name in found:
            if name not in known:
                raise ValueError(f"{option} ({name!r}) must be among: {', '.join(known)}")
        return found

    try:
        shapes = config.getoption("--shapes")
        options = Options(
            flops=config.getoption("--flops"),
            quick=config.getoption("--quick"),
            full=bool(config.getoption("--full")),
            device=config.getoption("--device"),
            dtypes=names("--dtype", list(DTYPES)),
            backends=names("--backend", ["auto", "torch", "triton", "reference"]),
            peers=tuple(parse_peers(config.getoption("--peers"))),
            shapes=None if shapes is None else tuple(Shape.parse(text) for text in shapes),
            threads=config.getoption("--threads"),
            rounds=config.getoption("--rounds"),
        )
        for option in ("--full", "--json", "--markdown", "--compare", "--write-regression"):
            if config.getoption(option) and not options.flops:
                raise ValueError(f"{option} needs --flops: without it nothing is measured")
        if options.device not in ("cpu", "cuda"):
            raise ValueError(f"--device ({options.device!r}) must be cpu or cuda")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda needs a GPU and torch sees none: run it where one is, or with --device cpu")
        report.require_page(config.getoption("--markdown"))
        if options.threads < 1 or options.num_rounds < 1:
            raise ValueError(f"--threads ({options.threads}) and --rounds ({options.num_rounds}) must be at least 1")
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    return options


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_SUITE] = Suite(parse_options(session.config))


@pytest.fixture(scope="session")
def _suite(pytestconfig: pytest.Config) -> Iterator[Suite]:
    suite = pytestconfig.stash[_SUITE]
    before = torch.get_num_threads()
    torch.set_num_threads(suite.options.threads)
    yield suite
    torch.set_num_threads(before)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # the single-process group that fairscale's layer needed


@pytest.fixture(scope="session")
def _trainer_memory(_suite: Suite) -> Suite:
    keep_freed_memory()
    return _suite


@pytest.fixture
def suite(_trainer_memory: Suite) -> Iterator[Suite]:
    """As the trainer runs: freed memory stays with the process, for both sides of every ratio."""
    yield _trainer_memory
    release_memory()


@pytest.fixture
def default_memory(_suite: Suite) -> Iterator[Suite]:
    """Before any benchmark has applied the trainer's setting: see pytest_collection_modifyitems."""
    yield _suite
    release_memory()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    suite = config.stash.get(_SUITE, None)
    if suite is None or not suite.rows:
        return
    terminalreporter.section("benchmarks")
    for line in report.terminal_lines(suite):
        terminalreporter.write_line(line)
    paths = (config.getoption("--json"), config.getoption("--markdown"))
    for line in report.write_files(suite, *paths, config.invocation_params.args):
        terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    suite = session.config.stash.get(_SUITE, None)
    if suite is None or not suite.options.flops:
        return
    config = session.config
    if config.getoption("--write-regression") and exitstatus == pytest.ExitCode.OK:  # no ratios from a failed run
        regression.write(REGRESSION_FILE, suite)
    if config.getoption("--compare"):
        suite.regressions = regression.compare(REGRESSION_FILE, suite)
        if suite.regressions.failures and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
