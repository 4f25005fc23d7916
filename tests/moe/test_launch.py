"""The sbatch script: read as bash and SLURM read it, and run here with stand-ins for `srun`, `scontrol` and `moe`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from moe.cli import app
from moe.compose import compose
from moe.config import ParallelConfig
from moe.data.loader import TrainLoader
from moe.distributed.expert_parallel import require_divisible_experts
from moe.distributed.mesh import make_meshes
from moe.launch import Layout, SlurmJob, check_layout, slurm_script

ROOT = Path(__file__).parents[2]
SPARSE = ["+moe=8e", "parallel.ep_size=4"]

# srun: the command once for each node, each with its number, and its pid in a file. As srun does, wait and fail if one
# fails.
SRUN = r"""#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < FAKE_NODES; node++)); do
    SLURM_NODEID=$node SLURMD_NODENAME=127.0.0.1 "$@" &
    tasks+=($!)
    echo $! >"$FAKE_STATE/task$node"
done
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""
SCONTROL = r"""#!/bin/bash
case $1 in
    show) [[ $2 == hostnames && $3 == "nodes[0-1]" ]] && printf '127.0.0.1\nsecond\n' ;;
    requeue) echo "$2" >"$FAKE_STATE/requeued" ;;
esac
"""
# what torchrun is asked for, once for each node
TORCHRUN = r"""#!{python}
import json, os, sys
with open(os.environ["FAKE_STATE"] + "/torchrun" + os.environ["SLURM_NODEID"], "w") as file:
    json.dump({"arguments": sys.argv[1:], "environment": dict(os.environ)}, file)
"""


class Shims:
    """A folder of programs that come first on PATH, and what they left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder / "bin", folder / "state"
        self.folder.mkdir()
        self.state.mkdir()
        self.add("srun", SRUN)
        self.add("scontrol", SCONTROL)

    def add(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text.replace("{python}", sys.executable))
        (self.folder / name).chmod(0o755)

    def start(self, script: str, *, nodes: int = 1, job_id: int = 0) -> subprocess.Popen:
        path = self.folder.parent / "job.sh"
        path.write_text(script)
        venv = str(Path(sys.executable).parent)
        environment = os.environ | {
            "PATH": f"{self.folder}:{venv}:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(job_id or os.getpid()),  # the port follows from it
            "SLURM_JOB_NODELIST": "nodes[0-1]",
            "FAKE_NODES": str(nodes),
            "FAKE_STATE": str(self.state),
        }
        return subprocess.Popen(
            ["bash", str(path)],
            cwd=self.folder.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *, nodes: int = 1, job_id: int = 0) -> tuple[int, str]:
        process = self.start(script, nodes=nodes, job_id=job_id)
        try:
            output, _ = process.communicate(timeout=90)
        finally:
            end(process)
        return process.returncode, output


def end(process: subprocess.Popen) -> None:
    """Nothing of a job that failed or hung stays behind."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def shims(tmp_path: Path) -> Shims:
    return Shims(tmp_path)


def sbatch_options(script: str) -> dict[str, str | bool]:
    """As sbatch reads them: up to the first line that is neither empty nor a comment."""
    options: dict[str, str | bool] = {}
    for line in script.splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            name, given, value = line.removeprefix("#SBATCH ").partition("=")
            assert " " not in line.removeprefix("#SBATCH "), line
            assert name not in options, line
            options[name] = value if given else True
    return options


def test_bash_reads_it() -> None:
    for job in (SlurmJob(), SlurmJob(nodes=2, requeue=True, partition="gpu", account="a/b")):
        script = slurm_script([*SPARSE, "run_dir='runs/it s'"], job)
        checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")
        assert "@" not in script.replace("TERM@300", "")
        assert max(len(line) for line in script.splitlines()) <= 120


def test_sbatch_lines() -> None:
    job = SlurmJob(
        nodes=2, gpus_per_node=4, cpus_per_task=32, time="1-12", mem="900G", job_name="x", partition="gpu", notice=120
    )
    expected = {"--job-name": "x", "--nodes": "2", "--gpus-per-node": "4", "--ntasks-per-node": "1"}
    expected |= {"--cpus-per-task": "32", "--mem": "900G", "--time": "1-12", "--signal": "TERM@120"}
    expected |= {"--output": "slurm-%j.out", "--partition": "gpu"}
    assert sbatch_options(slurm_script(SPARSE, job)) == expected
    plain = sbatch_options(slurm_script(SPARSE, SlurmJob()))
    assert {"--partition", "--account", "--requeue"}.isdisjoint(plain)
    assert plain["--cpus-per-task"] == "48"
    again = sbatch_options(slurm_script([*SPARSE, "run_dir=a"], SlurmJob(requeue=True, account="me")))
    assert (again["--requeue"], again["--open-mode"], again["--account"]) == (True, "append", "me")


def test_torchrun_is_asked_for_the_right_processes(shims: Shims) -> None:
    """On every node of two, read by torchrun's own parser; a path with a space and a dollar stays one word."""
    shims.add("torchrun", TORCHRUN)
    overrides = [*SPARSE, "run_dir=runs/it s $HOME"]
    job = SlurmJob(nodes=2, gpus_per_node=4, cpus_per_task=9, max_restarts=5)
    status, output = shims.run(slurm_script(overrides, job), nodes=2, job_id=123456)
    assert status == 0, output
    for node in range(2):
        told = json.loads((shims.state / f"torchrun{node}").read_text())
        arguments = get_args_parser().parse_args(told["arguments"])
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.max_restarts) == ("2", "4", 5)
        assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("c10d", "127.0.0.1:23456")
        assert arguments.rdzv_conf == f"is_host={int(node == 0)}"
        assert (arguments.rdzv_id, arguments.local_addr) == ("123456", "127.0.0.1")
        assert "SIGTERM" not in arguments.signals_to_handle
        assert arguments.no_python
        assert [arguments.training_script, *arguments.training_script_args] == ["moe", "train", *overrides]
        environment = told["environment"]
        assert environment["OMP_NUM_THREADS"] == "2"  # 9 cores, 4 processes
        assert environment["TORCH_FR_DUMP_TEMP_FILE"] == f"{shims.folder.parent}/slurm-123456-trace-rank-"


PRINTS_ITS_WORLD = r"""#!{python}
import os, sys
names = ("RANK", "WORLD_SIZE", "GROUP_RANK", "LOCAL_WORLD_SIZE")
words = ["here", *(os.environ[name] for name in names), *sys.argv[1:]]
os.write(1, (" ".join(words) + chr(10)).encode())  # whole: two processes write to one pipe
"""


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 2), (2, 1)])
def test_the_body_starts_every_process(shims: Shims, nodes: int, gpus: int) -> None:
    """With the real torchrun and its rendezvous."""
    shims.add("moe", PRINTS_ITS_WORLD)
    job = SlurmJob(nodes=nodes, gpus_per_node=gpus)
    status, output = shims.run(slurm_script(["+moe=8e", "parallel.ep_size=2"], job), nodes=nodes)
    assert status == 0, output
    found = sorted(re.findall(r"here (\d+) (\d+) (\d+) (\d+) train \+moe=8e parallel.ep_size=2", output))
    assert found == [(str(rank), "2", str(rank // gpus), str(gpus)) for rank in range(2)]


STOPS_WHEN_TOLD = r"""#!{python}
import os, sys, time
sys.path.insert(0, os.environ["FAKE_ROOT"])
from moe.training.signals import StopRequest
with StopRequest() as stop:
    state, rank = os.environ["FAKE_STATE"], os.environ["RANK"]
    open(f"{state}/training{rank}", "w").close()
    while stop.signal_name is None:
        time.sleep(0.02)
    time.sleep(0.5)  # saving
    with open(f"{state}/saved{rank}", "w") as file:
        file.write(stop.signal_name)
"""


@pytest.mark.parametrize("everyone", [False, True], ids=["the task", "every process"])
def test_sigterm_reaches_the_training_processes_and_the_job_succeeds(
    shims: Shims, monkeypatch: pytest.MonkeyPatch, everyone: bool
) -> None:
    """Sites differ in whom SLURM signals: the task of the node alone, or all that descends from it."""
    monkeypatch.setenv("FAKE_ROOT", str(ROOT))
    shims.add("moe", STOPS_WHEN_TOLD)
    script = slurm_script([*SPARSE, "run_dir=run", "parallel.ep_size=2"], SlurmJob(gpus_per_node=2, requeue=True))
    process = shims.start(script)
    try:
        wait_for(shims.state / "training0", shims.state / "training1")
        task = int((shims.state / "task0").read_text())
        for pid in descendants(task) if everyone else [task]:
            os.kill(pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 0, output
    assert [(shims.state / f"saved{rank}").read_text() for rank in range(2)] == ["SIGTERM", "SIGTERM"]
    assert (shims.state / "requeued").read_text().strip() == str(os.getpid())


FINISHES = r"""#!/bin/bash
mkdir -p "the run" && touch "the run/results.json"
"""


@pytest.mark.parametrize(("program", "succeeds"), [(FINISHES, True), ("#!/bin/bash\nexit 3\n", False)])
def test_a_complete_run_and_a_failed_one_are_not_queued_again(shims: Shims, program: str, succeeds: bool) -> None:
    shims.add("torchrun", program)
    status, output = shims.run(slurm_script([*SPARSE, "run_dir='the run'"], SlurmJob(requeue=True)))
    assert (status == 0) == succeeds, output
    assert not (shims.state / "requeued").exists()


def wait_for(*paths: Path, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until, f"{paths} did not come"
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    """`pid` and all that it started, in /proc."""
    found, parents = [pid], {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def test_layout_of_the_paper() -> None:
    overrides = ["model=6.7b", "+moe=512e", "parallel.ep_size=256", "train.batch_tokens=2097152"]
    assert check_layout(compose(overrides), 256) == Layout(dp_replicate=1, dp_shard=1, ep_size=256)
    overrides = ["model=125m", "+moe=512e", "parallel.ep_size=4", "train.batch_tokens=524288"]
    assert check_layout(compose(overrides), 16) == Layout(dp_replicate=1, dp_shard=4, ep_size=4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.ep_sise=2"], "there is no key 'parallel.ep_sise'; did you mean parallel.ep_size"),
        ([*SPARSE, "parallel.dp_replicate=3"], r"\(3 \* 4\) must divide the number of processes \(8"),
        (["+moe=8e", "model.moe.num_experts=6", "parallel.ep_size=4"], r"must divide model.moe.num_experts \(6\)"),
        (["parallel.ep_size=2"], "this model is dense; add"),
        (["+moe=8e", "parallel.ep_size=8", "parallel.ranks_per_node=3"], r"ranks_per_node \(3\) must divide"),
        (["+moe=8e", "parallel.ep_size=8", "parallel.rows_limit=7"], r"rows_limit \(7\) must be at least .*8 \* 1"),
        (["+moe=8e", "parallel.ep_size=8", "parallel.fixed_capacity=true"], "this one drops nothing"),
        (["+moe=8e", "model.expert_d_ff=12"], r"width of an expert \(12\) must be divisible by the 8 ranks"),
        (["+moe=8e", "model.d_model=12", "model.num_heads=2"], r"model.d_model \(12\) must be divisible by the 8"),
        (["train.batch_tokens=1024", "model.max_seq_len=256"], "4 sequences of 256 tokens, which cannot be divided"),
        (["train.batch_tokens=4096", "model.max_seq_len=256", "train.micro_batch_size=4"], "a process has 2 sequences"),
        (["parallel.dry_run=true", "parallel.ranks=8"], "run it here"),
        (["seed=0,1"], "names several values"),
    ],
)
def test_a_run_that_cannot_start_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slurm_script(overrides, SlurmJob())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, r"--nodes \(0\) must be at least 1"),
        ({"gpus_per_node": 0}, r"--gpus-per-node \(0\)"),
        ({"cpus_per_task": 0}, r"--cpus-per-task \(0\)"),
        ({"max_restarts": -1}, r"--max-restarts \(-1\)"),
        ({"time": "a day"}, r"--time \('a day'\)"),
        ({"job_name": "two words"}, r"--job-name \('two words'\)"),
        ({"partition": "gpu\n#SBATCH --x"}, "--partition"),
        ({"account": "$me"}, "--account"),
        ({"mem": ""}, "--mem"),
        ({"time": "5"}, r"--notice \(300 seconds\) .* below --time \(300 seconds\)"),
        ({"notice": 0}, "--notice"),
        ({"notice": 70000}, "at most 65535"),
    ],
)
def test_a_job_that_slurm_would_not_take_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlurmJob(**changes)


def test_requeue_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="set run_dir="):
        slurm_script(SPARSE, SlurmJob(requeue=True))


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("90:30", 5430), ("2:00:01", 7201), ("1-0", 86400), ("1-2:30", 95400), ("2-00:00:05", 172805)],
)
def test_time_is_read_as_slurm_reads_it(limit: str, seconds: int) -> None:
    assert SlurmJob(time=limit).seconds == seconds


def refused(function: Callable, *arguments: object, **named: object) -> bool:
    try:
        function(*arguments, **named)
    except ValueError:
        return True
    except NoProcessesError:  # the rules held
        return False
    return False


class NoProcessesError(Exception):
    """Raised where a mesh would be made of processes, which are not here."""


def no_processes(*_: object, **__: object) -> None:
    raise NoProcessesError


def test_the_rules_are_those_of_the_run_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the constructors that would refuse on the cluster, over a grid in which either answer is common."""
    monkeypatch.setattr("moe.distributed.mesh.init_device_mesh", no_processes)
    shard = SimpleNamespace(num_tokens=10_000)
    base = compose(
        [
            *("+moe=8e", "model.moe.num_experts=12", "model.max_seq_len=16", "model.expert_d_ff=24"),
            *("model.d_model=24", "model.num_heads=2", "train.batch_tokens=768"),
        ]
    )
    answers = []
    for ranks, ep_size, dp_replicate, batch in product((1, 2, 3, 4, 6, 8), (1, 2, 3, 5), (1, 2), (4, 6, 12)):
        parallel = ParallelConfig(ep_size=ep_size, dp_replicate=dp_replicate)
        config = replace(
            base, parallel=parallel, train=replace(base.train, batch_tokens=batch * 16, micro_batch_size=2)
        )
        by_run = (
            refused(make_meshes, parallel, ranks, "cpu")
            or refused(require_divisible_experts, 12, ep_size, where="")
            or refused(TrainLoader, shard, seq_len=16, batch_size=batch, seed=0, micro_batch_size=2, world_size=ranks)
        )
        assert refused(check_layout, config, ranks) == by_run, (ranks, ep_size, dp_replicate, batch)
        answers.append(by_run)
    assert 10 < sum(answers) < len(answers) - 10


def test_the_command_prints_or_writes_it(tmp_path: Path) -> None:
    arguments = ["launch", "--slurm", "--nodes", "2", "--gpus-per-node", "4", *SPARSE]
    printed = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert printed.exit_code == 0
    assert printed.stdout == slurm_script(SPARSE, SlurmJob(nodes=2, gpus_per_node=4))
    path = tmp_path / "job.sh"
    written = CliRunner().invoke(app, [*arguments, "--out", str(path)], catch_exceptions=False)
    assert (written.exit_code, written.stdout) == (0, "")
    assert path.read_text() == printed.stdout
    assert CliRunner().invoke(app, ["launch", "--slurm", "--node", "2"]).exit_code == 2  # no such option
    with pytest.raises(ValueError, match="add --slurm"):
        CliRunner().invoke(app, ["launch"], catch_exceptions=False)


def test_every_option_of_the_command_reaches_the_job() -> None:
    given = {"nodes": 2, "gpus_per_node": 4, "cpus_per_task": 16, "time": "3:00:00", "mem": "64G", "job_name": "n"}
    given |= {"partition": "p", "account": "a", "max_restarts": 1, "notice": 60, "requeue": True}
    assert set(given) == {field.name for field in fields(SlurmJob)}
    assert all(value != getattr(SlurmJob(), name) for name, value in given.items())
    options: list[str] = []
    for name, value in given.items():
        options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    printed = CliRunner().invoke(app, ["launch", "--slurm", *options, "run_dir=r"], catch_exceptions=False)
    assert printed.stdout == slurm_script(["run_dir=r"], SlurmJob(**given))
