"""A SLURM job for a training run: an sbatch script around `srun torchrun`, printed after checking that the run fits."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import NamedTuple

from moe.compose import compose
from moe.config import RunConfig
from moe.scaling.communication import expert_capacity
from moe.scaling.routing_load import tokens_a_round

LONGEST_NOTICE = 65535  # seconds; sbatch's maximum for --signal
_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")  # SLURM's forms: minutes, h:mm:ss, days-hours and those in between
_WORD = re.compile(r"[\w.,:+/-]+")


@dataclass(frozen=True)
class SlurmJob:
    """A request to SLURM. Raises ValueError for values that SLURM would refuse or misread."""

    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_task: int | None = None  # cores per node, whose one task is torchrun; None: six per GPU
    time: str = "24:00:00"
    mem: str = "0"  # per node; "0" is all of it
    job_name: str = "moe"
    partition: str | None = None  # None: the site's default
    account: str | None = None  # None: the user's default
    max_restarts: int = 3  # of all processes after one has failed, from the last checkpoint
    notice: int = 300  # seconds before the limit at which the run is told to save
    requeue: bool = False  # queue the job again until the run is complete

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} ({value}) must be at least 1")
        if self.max_restarts < 0:
            raise ValueError(f"--max-restarts ({self.max_restarts}) must not be negative; 0 is none")
        if not _TIME.fullmatch(self.time):
            raise ValueError(f"--time ({self.time!r}) must be minutes, hours:minutes:seconds or days-hours")
        for name in ("mem", "job_name", "partition", "account"):
            value = getattr(self, name)
            if value is not None and not _WORD.fullmatch(value):
                raise ValueError(
                    f"--{name.replace('_', '-')} ({value!r}) must be letters, digits and any of . , : + / - _: "
                    f"it becomes a #SBATCH line"
                )
        if not 1 <= self.notice <= min(LONGEST_NOTICE, self.seconds - 1):
            raise ValueError(
                f"--notice ({self.notice} seconds) must be at least 1, below --time ({self.seconds} seconds) and at "
                f"most {LONGEST_NOTICE}: so long before its end the run saves and stops"
            )

    @property
    def num_ranks(self) -> int:
        """One process per GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def cores(self) -> int:
        """CPU cores per node."""
        return 6 * self.gpus_per_node if self.cpus_per_task is None else self.cpus_per_task

    @property
    def seconds(self) -> int:
        """The time limit in seconds."""
        days, _, clock = self.time.rpartition("-")
        fields = [int(field) for field in clock.split(":")]
        if days:  # hours come first
            hours, minutes, seconds = [*fields, 0, 0][:3]
        elif len(fields) == 3:
            hours, minutes, seconds = fields
        else:  # minutes come first
            hours, (minutes, seconds) = 0, [*fields, 0][:2]
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class Layout(NamedTuple):
    """The axes whose product is the number of processes."""

    dp_replicate: int
    dp_shard: int
    ep_size: int


def slurm_script(overrides: Sequence[str], job: SlurmJob) -> str:
    """The sbatch script for the run that `overrides` describe.

    Raises ValueError if the overrides compose to no run, or to one that does not fit the job.
    """
    config = compose(overrides)
    layout = check_layout(config, job.num_ranks)
    if config.parallel.dry_run:
        raise ValueError("parallel.dry_run=true simulates processes in one: run it here, without a job")
    if config.run_dir is None and job.requeue:
        raise ValueError("--requeue must know where results.json will be, which ends the queueing: set run_dir=")
    optional = [
        f"#SBATCH --{name}={value}"
        for name, value in (("partition", job.partition), ("account", job.account))
        if value is not None
    ]
    if job.requeue:
        optional += ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
    fields = {
        "layout": " * ".join(f"{axis} {size}" for axis, size in layout._asdict().items()),
        "ranks": job.num_ranks,
        "job_name": job.job_name,
        "nodes": job.nodes,
        "gpus_per_node": job.gpus_per_node,
        "cores": job.cores,
        "threads": max(1, job.cores // job.gpus_per_node),
        "mem": job.mem,
        "time": job.time,
        "notice": job.notice,
        "optional": "".join(f"{line}\n" for line in optional),
        "max_restarts": job.max_restarts,
        "train": shlex.join(["moe", "train", *overrides]),
        "after": _REQUEUE.substitute(run_dir=shlex.quote(config.run_dir or "")) if job.requeue else "",
    }
    return _SCRIPT.substitute(fields)


def check_layout(config: RunConfig, num_ranks: int) -> Layout:
    """How `num_ranks` processes would share the model and the batch.

    Applies the rules of `make_meshes`, `parallelize` and `TrainLoader` to plain numbers, without torch and before a job
    waits in a queue. Raises ValueError for the first rule that is broken.
    """
    parallel = config.parallel
    dp_shard, remainder = divmod(num_ranks, parallel.dp_replicate * parallel.ep_size)
    if remainder:
        raise ValueError(
            f"parallel.dp_replicate * parallel.ep_size ({parallel.dp_replicate} * {parallel.ep_size}) must divide "
            f"the number of processes ({num_ranks}, nodes * GPUs of a node); change an axis or the job"
        )
    if parallel.ep_size > 1:
        _check_experts(config)
    if config.model.moe is not None:
        _check_widths(config, dp_shard)
    share, remainder = divmod(config.batch_size, num_ranks)
    if remainder:
        raise ValueError(
            f"train.batch_tokens ({config.train.batch_tokens}) is {config.batch_size} sequences of {config.seq_len} "
            f"tokens, which cannot be divided among {num_ranks} processes; change train.batch_tokens or the job"
        )
    if config.train.micro_batch_size is not None and share % config.train.micro_batch_size:
        raise ValueError(
            f"a process has {share} sequences of each batch ({config.batch_size} / {num_ranks}), which cannot be "
            f"divided into micro-batches of train.micro_batch_size ({config.train.micro_batch_size})"
        )
    return Layout(parallel.dp_replicate, dp_shard, parallel.ep_size)


def _check_experts(config: RunConfig) -> None:
    parallel, moe = config.parallel, config.model.moe
    if moe is None:
        raise ValueError(f"parallel.ep_size ({parallel.ep_size}) spreads experts, and this model is dense; add +moe=")
    if moe.num_experts % parallel.ep_size:
        raise ValueError(
            f"parallel.ep_size ({parallel.ep_size}) must divide model.moe.num_experts ({moe.num_experts}): each of "
            f"these ranks holds equally many"
        )
    if parallel.rows_limit is not None:
        tokens_a_round(parallel.rows_limit, parallel.ep_size, moe.top_k, moe.num_experts // parallel.ep_size)
    if parallel.fixed_capacity and expert_capacity(moe, 1) is None:
        raise ValueError(
            "parallel.fixed_capacity=true sends a router's capacity, and this one drops nothing: set "
            "model.moe.capacity_factor, or fixed_capacity=false"
        )
    node = parallel.ranks_per_node
    if node is not None and node < parallel.ep_size and parallel.ep_size % node:
        raise ValueError(
            f"parallel.ranks_per_node ({node}) must divide parallel.ep_size ({parallel.ep_size}); it is the number of "
            f"GPUs of a node, and null sends all rows at once"
        )


def _check_widths(config: RunConfig, dp_shard: int) -> None:
    """An expert's weights are sharded by rows: d_ff of them in w_in and w_gate, d_model in w_out."""
    for name, width in (("the width of an expert", config.model.expert_width), ("model.d_model", config.model.d_model)):
        if width % dp_shard:
            raise ValueError(
                f"{name} ({width}) must be divisible by the {dp_shard} ranks that share an expert (processes / "
                f"dp_replicate / ep_size); raise parallel.ep_size or parallel.dp_replicate"
            )


class _Bash(Template):
    """A template with fields @{name}, because bash uses the dollar; @@ is a literal @."""

    delimiter = "@"


_SCRIPT = _Bash(r"""#!/bin/bash
# A training run as a SLURM job. @{ranks} processes, one per GPU: @{layout}
# Submit it with `sbatch FILE` from a folder that all nodes see: relative paths of the run start there, and `moe` and
# `torchrun` are those on your PATH. The same script again continues the run, or says that it is complete.
# Run `moe prepare` with the same overrides first: GPUs should not wait for a tokenizer.
#
#SBATCH --job-name=@{job_name}
#SBATCH --nodes=@{nodes}
#SBATCH --gpus-per-node=@{gpus_per_node}
# One task on a node: torchrun, which starts a process for each GPU and restarts them.
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=@{cores}
#SBATCH --mem=@{mem}
#SBATCH --time=@{time}
# SIGTERM goes to the task on each node so many seconds before the limit (SLURM may send it a minute earlier).
#SBATCH --signal=TERM@@@{notice}
#SBATCH --output=slurm-%j.out
@{optional}
set -euo pipefail

# All nodes meet at the first one. The port follows from the job's number, so that two jobs can share a node.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export RDZV_ENDPOINT="${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))"

# CPU threads of one process: its share of the node.
export OMP_NUM_THREADS=@{threads}

# The flight recorder remembers so many collectives of each rank, and writes them to files when one times out. Then
# `torchfrtrace --prefix slurm-JOB-trace-rank- .` says which rank was missing in which collective. (Older versions of
# torch call the first variable TORCH_NCCL_TRACE_BUFFER_SIZE.)
export TORCH_FR_BUFFER_SIZE=2000
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_DUMP_TEMP_FILE="$PWD/slurm-$SLURM_JOB_ID-trace-rank-"

# WARN names the call that failed; INFO also says which network was chosen. If it is the wrong one, name the right one.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# export NCCL_SOCKET_IFNAME=ib0

# The task of a node. SIGTERM must reach the training processes, each once: they finish the step, save and exit with 0.
# torchrun would pass it on too, but kill them after 30 seconds and fail; so it is told to leave SIGTERM alone, and this
# shell sends it to torchrun's children. SIGTERM being ignored is inherited: a second one, from a site whose SLURM
# signals every process itself, does not cut the saving short.
train_on_this_node() {
    (
        trap '' TERM
        exec torchrun \
            --nnodes=@{nodes} \
            --nproc-per-node=@{gpus_per_node} \
            --max-restarts=@{max_restarts} \
            --rdzv-backend=c10d \
            --rdzv-endpoint="$RDZV_ENDPOINT" \
            --rdzv-conf="is_host=$((SLURM_NODEID == 0))" \
            --rdzv-id="$SLURM_JOB_ID" \
            --local-addr="$SLURMD_NODENAME" \
            --signals-to-handle=SIGINT,SIGHUP,SIGQUIT \
            --no-python \
            @{train}
    ) &
    torchrun_pid=$!
    trap 'pkill -TERM -P "$torchrun_pid"' TERM
    # a signal interrupts `wait`, so wait again until torchrun has ended; the last `wait` returns its exit status
    while kill -0 "$torchrun_pid" 2>/dev/null; do wait "$torchrun_pid"; done
    wait "$torchrun_pid"
}

# srun does not take over --cpus-per-task by itself. A node that gives up ends the job, instead of leaving it waiting.
srun --ntasks-per-node=1 --cpus-per-task=@{cores} --kill-on-bad-exit=1 \
    bash -c "$(declare -f train_on_this_node); train_on_this_node"
@{after}""")

_REQUEUE = _Bash(r"""
# All went well so far. results.json is the last file that a run writes: without it, the time was up.
if [[ ! -e @{run_dir}/results.json ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
""")
