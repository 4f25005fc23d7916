"""`python train.py` and `moe` as a user types them: output, exit status, errors of one line."""

from __future__ import annotations

import csv
import os
import pty
import re
import runpy
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "train.py")
Command = Callable[..., subprocess.CompletedProcess]


def test_train_then_generate(command: Command, overrides: list[str]) -> None:
    result = command(TRAIN, *overrides, "run_dir=run")
    for expected in ("bits per byte", "gzip -9", "xz -9", "parameters, total", "peak memory", "next:"):
        assert expected in result.stdout
    assert "step 10/10" in result.stderr  # plain lines: this is no terminal
    assert re.search(r"^run: [\d,]+ parameters, [\d,]+ active; 10 steps of 256 tokens$", result.stderr, re.MULTILINE)
    assert "\r" not in result.stderr
    generated = command("-c", "from moe.cli import main; main()", "generate", "run", "--prompt", "the", "--tokens", "5")
    assert generated.stdout.startswith("the")
    again = command(TRAIN, *overrides, "run_dir=run")
    assert "is complete" in again.stdout


def test_help_needs_no_torch_and_lists_everything(command: Command) -> None:
    result = command("-X", "importtime", TRAIN, "--help")
    assert "+moe=" in result.stdout
    assert " torch\n" not in result.stderr


DIVERGES = ["optim.lr=1e30", "train.max_skipped_steps=0", "eval.every=null"]


def test_a_diverged_run_has_an_exit_status_of_its_own(command: Command, overrides: list[str], tmp_path: Path) -> None:
    """Also the second time, and through `moe train`; a disk that is full is a failure, not the user's mistake."""
    for program in ((TRAIN,), (TRAIN,), ("-c", "from moe.cli import main; main()", "train")):
        result = command(*program, *overrides, *DIVERGES, "run_dir=run", check=False)
        assert result.returncode == 3 and "Traceback" not in result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    full = "import moe.run\ndef full(*_, **__): raise OSError(28, 'full', 'f')\nmoe.run.open_reporters = full\n"
    result = command("-c", f"{full}from moe.cli import main; main()", "train", *overrides, "run_dir=full", check=False)
    assert result.returncode == 1 and result.stderr.endswith("error: f: full\n")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sweep_goes_on_after_a_run_that_diverged(overrides: list[str], tmp_path: Path, processes: int) -> None:
    given = ["-m", *overrides, *DIVERGES, "optim.lr=1e30,1e-3", "+moe=16e"]
    given.remove("+moe=8e")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [sys.executable, *(torchrun if processes == 2 else []), TRAIN, *given],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == (3 if processes == 1 else 1) and result.stderr.count("error: 1 update was skipped") == 1
    (table,) = (tmp_path / "runs").glob("sweep-*.csv")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["optim.lr"], row["outcome"]) for row in rows] == [("1e+30", "diverged"), ("0.001", "complete")]
    assert rows[0]["validation_loss"] == "" and float(rows[1]["validation_loss"]) > 0
    assert "diverged" in result.stdout.split("outcome")[1]


@pytest.mark.parametrize(("changes", "status"), [(DIVERGES, 3), (["parallel.ep_size=3"], 2)])
def test_every_rank_has_the_status_that_one_process_would_have(
    overrides: list[str], tmp_path: Path, changes: list[str], status: int
) -> None:
    """torchrun itself ends with 1, and says which process ended with what."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*torchrun, TRAIN, *overrides, *changes, f"run_dir={tmp_path / 'run'}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    found = re.findall(r"exitcode *: (-?\d+)", result.stderr)
    assert "Warning" not in result.stderr
    assert found and set(found) <= {str(status), "-15"} and str(status) in found, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+typo=1"], "there is no key 'typo'"),
        (["model=nope"], "there are: 1.3b, 125m"),
        (["+moe=8e", "model.moe.top_k=9"], "at most model.moe.num_experts (8)"),
        (["model.num_heads=3"], "must be divisible by"),
        (["+moe=8e", "model.moe.num_experts=2.5"], "could not be converted to Integer"),
        (["data=text", "data.path=nowhere.txt"], "nowhere.txt does not exist"),
        (["data=text", "data.path=empty.txt"], "has no text: 0 documents, 0 bytes"),
        (["data=text", "data.path=latin.txt"], "latin.txt is not UTF-8: byte 0xe9 at offset 3"),
        (["data=text", "data.path=lines.jsonl"], "lines.jsonl line 2 has no text in the field 'text'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    command: Command, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"content": "b"}\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    result = command(TRAIN, *arguments, f"data.cache_dir={tmp_path}/cache", check=False)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    left = sorted(path.name for path in tmp_path.iterdir() if path.name != "cache")
    assert left == before
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").iterdir())


def test_an_interrupt_before_the_first_step_leaves_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe.compose.compose", interrupted)
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(TRAIN, run_name="__main__")
    assert ended.value.code == 130  # as a shell says it


def test_a_terminal_gets_a_bar(overrides: list[str], tmp_path: Path) -> None:
    primary, secondary = pty.openpty()
    termios.tcsetwinsize(secondary, (40, 120))
    process = subprocess.Popen(
        [sys.executable, TRAIN, *overrides, "run_dir=run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=secondary,
    )
    os.close(secondary)
    shown = b""
    while True:
        try:
            chunk = os.read(primary, 4096)
        except OSError:  # Linux ends a closed terminal this way
            break
        if not chunk:
            break
        shown += chunk
    os.close(primary)
    assert process.wait(timeout=120) == 0
    assert b"10/10" in shown
    assert b"loss " in shown and b"tokens/s" in shown
