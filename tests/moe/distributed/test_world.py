"""Who takes part: what is wrong with an environment, and what real processes say to each other, errors included."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe.config import ParallelConfig
from moe.distributed.mesh import make_meshes
from moe.distributed.world import World, check_environment, choose_device, open_world
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[3]
FINE = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
ALONE = World(0, 1, torch.device("cpu"), None, 1.0)
SHORT_SECONDS = 2.0  # a timeout in a test
SLACK_SECONDS = 1.5  # for telling each other, on a loaded machine


# ---------------------------------------------------------------------------------------------- the environment


def test_a_sound_environment() -> None:
    assert check_environment(FINE, "cpu") == 4
    assert check_environment({}, "cpu") == 1
    assert check_environment({"WORLD_SIZE": "1"}, "auto") == 1
    assert check_environment({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, "cpu") == 1  # a batch shell
    assert check_environment(FINE | {"SLURM_STEP_NUM_TASKS": "2"}, "cpu") == 4  # srun torchrun


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE='four', which is not a count"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"RANK": "4"}, r"RANK \(4\) must be below WORLD_SIZE \(4\)"),
        ({"RANK": "x"}, "RANK='x'"),
        ({"RANK": None}, "WORLD_SIZE is 4 but RANK is not set: start the processes with torchrun"),
        ({"LOCAL_RANK": None, "MASTER_ADDR": None}, "LOCAL_RANK, MASTER_ADDR is not set"),
        ({"LOCAL_RANK": "2"}, r"LOCAL_RANK \(2\) must be below the number of processes on this machine \(2,"),
        ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": None}, r"LOCAL_RANK \(4\)"),
        ({"MASTER_PORT": "0"}, r"MASTER_PORT \(0\) must be between 1 and 65535"),
        ({"MASTER_PORT": "70000"}, r"MASTER_PORT \(70000\)"),
        ({"WORLD_SIZE": None}, "RANK is 3 but WORLD_SIZE is not set"),
    ],
)
def test_a_wrong_variable_is_named(changes: dict[str, str | None], message: str) -> None:
    environment = {name: value for name, value in (FINE | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        check_environment(environment, "cpu")


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_copies_that_do_not_know_of_each_other_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 8 but WORLD_SIZE is not set: so many processes were started"):
        check_environment({name: "8"}, "cpu")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for environment in ({}, FINE):
        with pytest.raises(ValueError, match="torch sees no GPU"):
            check_environment(environment, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    for device in ("cuda", "auto"):
        with pytest.raises(ValueError, match="LOCAL_RANK is 1 but this machine has 1 GPUs"):
            check_environment(FINE, device)
    assert check_environment(FINE | {"LOCAL_RANK": "0"}, "cuda") == 4


def test_a_build_without_nccl_or_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    for device in ("cuda", "auto"):
        with pytest.raises(ValueError, match=r"no NCCL.* install a CUDA build or use device=cpu"):
            check_environment(FINE, device)
    with pytest.raises(ValueError, match="no gloo"):
        check_environment(FINE, "cpu")


def test_axes_that_do_not_multiply_to_the_processes() -> None:
    with pytest.raises(ValueError, match=r"\(2 \* 4\) must divide the number of processes \(12\)"):
        make_meshes(ParallelConfig(ep_size=4, dp_replicate=2), 12, "cpu")


# ---------------------------------------------------------------------------------------------------- starting


def set_environment(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in (FINE | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"} | changes).items():
        monkeypatch.setenv(name, value)


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0, which would open it, while another program listens there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        set_environment(monkeypatch, MASTER_PORT=port)
        with pytest.raises(ValueError, match=rf"rank 0 cannot meet .* 127.0.0.1:{port} .*EADDRINUSE.* --rdzv-endpoint"):
            open_world("cpu", timeout_seconds=SHORT_SECONDS)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def test_others_that_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, MASTER_PORT=free_port())
    with pytest.raises(ValueError, match=r"rank 0 cannot meet .*1/2 clients joined.* if ranks are missing"):
        open_world("cpu", timeout_seconds=SHORT_SECONDS)


def test_alone_every_exchange_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in FINE:
        monkeypatch.delenv(name, raising=False)
    world = open_world("auto", timeout_seconds=1.0)
    assert world == ALONE
    tensor = torch.tensor([1.0, 2.0])
    assert world.sum(tensor) is tensor
    assert world.gather(tensor)[0] is tensor
    assert world.same_as_first(tensor) is tensor
    assert world.from_first({"a": 1}) == {"a": 1}
    assert world.on_first(lambda: 5) == world.first_here_first(lambda: 5) == 5
    world.meet()
    world.close()


# ---------------------------------------------------------------------------------------------- real processes


def _exchanges(world: World) -> dict[str, Any]:
    own = torch.tensor([float(world.rank + 1), 0.1])
    total = world.sum(own)
    assert own[0] == world.rank + 1  # left as it was
    other = torch.full((2, 2), float(world.rank))
    column = torch.arange(6.0).view(2, 3).t()[world.rank]  # not contiguous
    calls = []
    return {
        "sum": total,
        "gather": world.gather(torch.tensor([world.rank, 7])),
        "column": world.gather(column),
        "same": world.same_as_first(other),
        "from_first": world.from_first(f"rank {world.rank}"),
        "on_first": world.on_first(lambda: calls.append(world.rank) or len(calls)),
        "calls": calls,
    }


@pytest.fixture(scope="module")
def exchanges() -> list[dict[str, Any]]:
    return run_ranks(_exchanges, 3)


def test_exchanges(exchanges: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(exchanges):
        assert found["sum"].tolist() == pytest.approx([6.0, 0.3])
        assert torch.equal(found["sum"], exchanges[0]["sum"])
        assert [part.tolist() for part in found["gather"]] == [[0, 7], [1, 7], [2, 7]]
        assert [part.tolist() for part in found["column"]] == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
        assert found["same"].tolist() == [[0.0, 0.0], [0.0, 0.0]]
        assert found["from_first"] == "rank 0"
        assert found["on_first"] == 1
        assert found["calls"] == ([0] if rank == 0 else [])


def _caught(function: Any, *arguments: Any) -> tuple[str, str]:
    try:
        function(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def _errors(world: World, folder: str) -> dict[str, Any]:
    """Two machines of two processes; what each rank sees of an error, and when each one's function ran."""
    world = world._replace(local_rank=world.rank % 2)
    log = Path(folder) / "log"

    def refuse() -> None:
        raise ValueError(f"rank {world.rank} refuses")

    def make() -> str:
        if world.local_rank == 0:
            time.sleep(0.3)  # the others must wait for it
        with log.open("a") as file:
            file.write(f"{world.local_rank}\n")

    def fail_on_machine_1() -> str:
        if world.rank == 2:
            raise FileNotFoundError("no corpus here")
        return "made"

    on_first = _caught(world.on_first, refuse)
    assert world.first_here_first(make) is None
    per_machine = _caught(world.first_here_first, fail_on_machine_1)
    world.meet()  # after an error they still understand each other
    return {"on_first": on_first, "per_machine": per_machine, "log": log.read_text().split()}


def test_errors_reach_every_rank_and_the_first_of_a_machine_goes_first(tmp_path: Path) -> None:
    for found in run_ranks(_errors, 4, str(tmp_path)):
        assert found["on_first"] == ("ValueError", "rank 0 refuses")
        assert found["per_machine"] == ("FileNotFoundError", "no corpus here")
        assert found["log"] == ["0", "0", "1", "1"]  # each process once


MISSES_A_MEETING = """
import os, sys, time
from moe.distributed.world import open_world
world = open_world("cpu", timeout_seconds=60.0)
world.meet()
world = world._replace(timeout_seconds=float(sys.argv[2]))
if os.environ["RANK"] in sys.argv[1].split(","):
    if sys.argv[3] == "hangs":
        time.sleep(30.0)
    os._exit(0)
started = time.monotonic()
try:
    world.meet()
except OSError as error:  # what train.py prints as one line
    print(f"{type(error).__name__} after {time.monotonic() - started:.2f}: {error}", flush=True)
    os._exit(1)
"""


def meet_without(absent: list[int], num_ranks: int, how: str) -> dict[int, str]:
    """What each rank that came says. Every process is ended here."""
    port = free_port()
    arguments = [",".join(map(str, absent)), str(SHORT_SECONDS), how]
    processes = {
        rank: subprocess.Popen(
            [sys.executable, "-c", MISSES_A_MEETING, *arguments],
            env=os.environ
            | {"WORLD_SIZE": str(num_ranks), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
            | {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(num_ranks)
    }
    try:
        return {rank: process.communicate(timeout=60)[0] for rank, process in processes.items() if rank not in absent}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("absent", "num_ranks", "how"),
    [([1], 2, "hangs"), ([2], 3, "hangs"), ([1, 2], 4, "ends")],
)
def test_the_ranks_that_do_not_come_are_named_to_all(absent: list[int], num_ranks: int, how: str) -> None:
    said = meet_without(absent, num_ranks, how)
    assert len(said) == num_ranks - len(absent)
    for rank, text in said.items():
        assert f"rank {rank} waited for rank {', '.join(map(str, absent))}, which did not come within 2 seconds" in text
        assert "raise parallel.timeout_seconds" in text
        assert text.startswith("TimeoutError after ")
        assert float(text.split()[2].rstrip(":")) < SHORT_SECONDS + SLACK_SECONDS


def test_rank_0_is_named_where_it_is_the_one_that_does_not_come() -> None:
    said = meet_without([0], 3, "ends")
    for rank in (1, 2):
        assert f"rank {rank} waited for rank 0" in said[rank], said[rank]


def test_a_collective_cut_off_with_the_store_is_explained_too() -> None:
    """Without torchrun, whose agent keeps the store, it goes with rank 0."""

    def gone(*_: Any) -> None:
        raise dist.DistNetworkError("Broken pipe")

    group: Any = SimpleNamespace(get_group_store=lambda: SimpleNamespace(set=gone))
    world = World(2, 3, torch.device("cpu"), group, SHORT_SECONDS)
    cut_off = RuntimeError("[.../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer.")
    explained = world.explain(cut_off)
    assert isinstance(explained, TimeoutError)
    assert "rank 2 was cut off in a collective" in str(explained)
    assert "rank 0 does not answer" in str(explained)
    other = RuntimeError("no such op")
    assert world.explain(other) is other


def test_a_device_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"device \('foo'\) must be one of: auto, cpu, cuda"):
        open_world("foo", timeout_seconds=1.0)
    assert choose_device("cpu") == "cpu"
