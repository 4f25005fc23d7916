"""What clusters do to a run of several processes, really done: kill, stop, freeze, restart at another size."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SECONDS = 240  # for a run to end; it takes ten on a quiet machine
ABORT_AT_EXIT = "import atexit, os\nif os.environ.get('WORLD_SIZE', '1') != '1': atexit.register(os.abort)\n"
ROUNDING = 2e-5  # of a float32 loss near 5, after ten updates, when the same numbers are added in another order


@pytest.fixture(scope="module")
def shared(overrides: list[str]) -> list[str]:
    """The same numbers at any number of processes: no dropout, one micro-step, balance over the whole batch."""
    return [
        *overrides,
        "model.dropout=0.0",
        "train.micro_batch_size=null",
        "train.checkpoint_every=2",
        "model.moe.load_balance_scope=global",
        "eval.every=null",
    ]


def start(overrides: list[str], run_dir: Path, num_processes: int = 2, max_restarts: int = 0) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{run_dir.parent}", "OMP_NUM_THREADS": "1"}
    # a rank whose interpreter ends the usual way may be aborted by a gloo thread; here it always is
    (run_dir.parent / "sitecustomize.py").write_text(ABORT_AT_EXIT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval=0.2"]
    return subprocess.Popen(
        [
            *torchrun,
            f"--nproc-per-node={num_processes}",
            f"--max-restarts={max_restarts}",
            str(ROOT / "train.py"),
            *overrides,
            f"run_dir={run_dir}",
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    try:
        return process.communicate(timeout=SECONDS)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def process_of_rank(launcher: subprocess.Popen, rank: int) -> int:
    for task in Path(f"/proc/{launcher.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"LOCAL_RANK={rank}".encode() in variables:
                return int(child)
    raise AssertionError(f"torchrun has no process of rank {rank}")


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    """Return once metrics.jsonl has a line of `step`."""
    deadline = time.monotonic() + SECONDS
    while not any(record["step"] >= step for record in metrics(run_dir)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def metrics(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [record for record in read_metrics(path) if "loss" in record] if path.exists() else []


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in metrics(run_dir)]


@pytest.fixture(scope="module")
def undisturbed(shared: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start([*shared, "parallel.ep_size=2"], run_dir)
    output = finish(process)
    assert process.returncode == 0, output
    yield run_dir


def test_a_killed_process_is_restarted_and_the_losses_are_the_same(
    shared: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start([*shared, "parallel.ep_size=2"], run_dir, max_restarts=1)
    wait_for_step(process, run_dir, 5)
    os.kill(process_of_rank(process, 1), signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 0, output
    assert "continuing" in output
    assert losses(run_dir) == losses(undisturbed)


def test_sigterm_to_one_rank_saves_on_all_and_other_sizes_continue(
    shared: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """2 processes stop at a signal to one of them; 4 go on, and 1 from there: the losses of the undisturbed run."""
    run_dir = tmp_path / "run"
    process = start([*shared, "parallel.ep_size=2", "train.checkpoint_every=1000"], run_dir)
    wait_for_step(process, run_dir, 2)
    os.kill(process_of_rank(process, 1), signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 0, output
    assert "SIGTERM on rank 1: saved step" in output
    process = start([*shared, "parallel.ep_size=2"], run_dir, num_processes=4)
    wait_for_step(process, run_dir, losses(run_dir)[-1][0] + 2)
    os.kill(process_of_rank(process, 0), signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 0, output
    process = start(shared, run_dir, num_processes=1)
    output = finish(process)
    assert process.returncode == 0, output
    found, expected = losses(run_dir), losses(undisturbed)
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (step, loss), (_, reference) in zip(found, expected, strict=True):
        assert loss == pytest.approx(reference, rel=ROUNDING), step


def test_a_frozen_rank_is_named(shared: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [*shared, "parallel.ep_size=2", "parallel.timeout_seconds=5", "train.num_steps=100000"]
    process = start([*overrides, "train.checkpoint_every=null"], run_dir)
    wait_for_step(process, run_dir, 3)
    os.kill(process_of_rank(process, 1), signal.SIGSTOP)
    output = finish(process)
    assert process.returncode != 0
    assert re.search(r"rank 1,? (which did not come within|does not answer)", output), output


def test_metrics_say_how_evenly_the_ranks_worked(undisturbed: Path) -> None:
    for record in metrics(undisturbed):
        ranks = record["ranks"]
        assert 1.0 <= ranks["rows_max_over_mean"] <= 2.0
        assert ranks["slowest_rank"] in (0, 1)
        assert ranks["peak_rows"] > 0
        assert ranks["all_to_all_bytes"] > 0
        assert ranks["all_to_all_seconds_max"] >= ranks["all_to_all_seconds_mean"] > 0
