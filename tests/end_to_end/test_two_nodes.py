"""Two machines, played by two network namespaces that a virtual cable joins, each with its own torchrun.

Where this user may not make namespaces, two torchruns on one machine must do (tests/moe/test_launch.py).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Run as root of a user namespace of its own, in a network namespace of its own: nothing outside is touched, and all of
# it is gone with the last process. The second machine is the namespace of a process that sleeps.
TWO_MACHINES = r"""
set -eu
unshare --net sleep 600 &
second=$!
trap 'kill $second' EXIT
until [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add cable0 type veth peer name cable1
ip link set cable1 netns $second
ip link set lo up
ip address add 10.9.0.1/24 dev cable0
ip link set cable0 up
on_second() { nsenter --net --target $second "$@"; }
on_second ip link set lo up
on_second ip address add 10.9.0.2/24 dev cable1
on_second ip link set cable1 up
"""
BOTH = r"""
torchrun() { # address, cable, whether it keeps the list of who takes part
    GLOO_SOCKET_IFNAME=$2 $enter "$PYTHON" -m torch.distributed.run --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d \
        --rdzv-endpoint=10.9.0.1:29500 --rdzv-conf=is_host=$3 --rdzv-id=two --local-addr=$1 \
        "$PROGRAM"
}
enter="" torchrun 10.9.0.1 cable0 1 &
first=$!
enter=on_second torchrun 10.9.0.2 cable1 0
wait $first
"""

# the sum of the ranks, where each process is, and what it can reach
PROGRAM = """
import os
from pathlib import Path

import torch

from moe.distributed.world import end_process, open_world

world = open_world("cpu", timeout_seconds=60.0)
total = world.sum(torch.tensor(float(world.rank + 1)))
made = world.first_here_first(lambda: f"by {world.rank}")
addresses = os.popen("ip -4 -o address show scope global").read().split()
# a file for each rank: four processes that share a pipe write into each other's lines
said = [world.rank, world.local_rank, world.size, int(total), made, addresses[3]]
Path(os.environ["SAID"], str(world.rank)).write_text("\t".join(map(str, said)))
world.meet()
world.close()
end_process()
"""


def in_namespaces(script: str, **variables: str) -> subprocess.CompletedProcess:
    process = subprocess.Popen(
        ["unshare", "--map-root-user", "--net", "bash", "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def why_not() -> str | None:
    """Why two machines cannot be played here, or None."""
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    made = in_namespaces(TWO_MACHINES)
    return None if made.returncode == 0 else f"no network namespaces for this user: {made.stderr.strip()}"


def test_two_machines_train_as_one(tmp_path: Path) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    (folder := tmp_path / "said").mkdir()
    result = in_namespaces(TWO_MACHINES + BOTH, PYTHON=sys.executable, PROGRAM=str(program), SAID=str(folder))
    assert result.returncode == 0, result.stderr
    said = [path.read_text().split("\t") for path in sorted(folder.iterdir())]
    assert [line[0] for line in said] == ["0", "1", "2", "3"], result.stdout
    assert [line[1] for line in said] == ["0", "1", "0", "1"]
    assert all(line[2:4] == ["4", "10"] for line in said)
    assert [line[4] for line in said] == ["by 0", "by 1", "by 2", "by 3"]
    # which machine is the first depends on who arrives first; each has two neighbouring ranks, and an address
    machines = [line[-1] for line in said]
    assert machines[0] == machines[1] != machines[2] == machines[3]
    assert set(machines) == {"10.9.0.1/24", "10.9.0.2/24"}


def test_the_machines_are_apart(tmp_path: Path) -> None:
    """The cable is all that joins them: cut, the second one cannot reach the first, loopback included."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    listen = "import socket; s = socket.create_server(('', 7000)); s.accept()"
    reach = "import socket, sys; socket.create_connection((sys.argv[1], 7000), timeout=1)"
    script = TWO_MACHINES + (
        f'"$PYTHON" -c "{listen}" & listener=$!\n'
        "sleep 1\n"
        f'on_second "$PYTHON" -c "{reach}" 127.0.0.1 2>/dev/null && echo loopback\n'
        "ip link set cable0 down\n"
        f'on_second "$PYTHON" -c "{reach}" 10.9.0.1 2>/dev/null && echo cut\n'
        "ip link set cable0 up\n"
        # a link that comes up takes its time on a busy machine
        "for attempt in 1 2 3 4 5 6 7 8 9 10; do\n"
        f'on_second "$PYTHON" -c "{reach}" 10.9.0.1 2>/dev/null && echo joined && break\n'
        "done\n"
        "kill $listener 2>/dev/null || true\n"
    )
    result = in_namespaces(script, PYTHON=sys.executable)
    assert result.stdout.split() == ["joined"], result.stdout + result.stderr
