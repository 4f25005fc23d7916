"""`moe launch`: job scripts for clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe.cli.overrides import Overrides


def launch(
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Write an sbatch script (the only kind).")] = False,
    nodes: Annotated[int, typer.Option(help="Number of machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs per machine; one process runs on each.")] = 8,
    cpus_per_task: Annotated[int | None, typer.Option(help="CPU cores per machine. Default: six per GPU.")] = None,
    time: Annotated[str, typer.Option(help="Time limit: minutes, hours:minutes:seconds or days-hours.")] = "24:00:00",
    mem: Annotated[str, typer.Option(help="Memory per machine, such as 900G; 0 is all of it.")] = "0",
    job_name: Annotated[str, typer.Option(help="Name in the queue.")] = "moe",
    partition: Annotated[str | None, typer.Option(help="Default: the site's.")] = None,
    account: Annotated[str | None, typer.Option(help="Default: yours.")] = None,
    max_restarts: Annotated[int, typer.Option(help="How often all processes are restarted after one has failed.")] = 3,
    notice: Annotated[int, typer.Option(help="Seconds before the limit at which the run saves and stops.")] = 300,
    requeue: Annotated[bool, typer.Option("--requeue", help="Requeue the job until the run is complete.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the script to this file instead of printing it.")] = None,
) -> None:
    """Print the job script of a training run on a cluster, after checking that the run fits the processes.

    `moe launch --slurm --nodes 2 +moe=16e parallel.ep_size=16 train.precision=bf16`"""
    if not slurm:
        raise ValueError(
            "moe launch writes scripts for SLURM: add --slurm. On machines without it start the processes yourself, "
            "`torchrun --nproc-per-node=N train.py ...` (docs/distributed.md)"
        )
    from moe.launch import SlurmJob, slurm_script

    job = SlurmJob(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time=time,
        mem=mem,
        job_name=job_name,
        partition=partition,
        account=account,
        max_restarts=max_restarts,
        notice=notice,
        requeue=requeue,
    )
    script = slurm_script(overrides or [], job)
    if out is None:
        typer.echo(script, nl=False)
    else:
        out.write_text(script, encoding="utf-8")
        typer.echo(f"wrote {out}: submit it with sbatch {out}", err=True)
