"""`moe launch`: job scripts for clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe.cli.overrides import Overrides


def launch(
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="an sbatch script")] = False,
    nodes: Annotated[int, typer.Option(help="machines")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="of each; a process runs on every GPU")] = 8,
    cpus_per_task: Annotated[int | None, typer.Option(help="cores of a node; six for each GPU")] = None,
    time: Annotated[str, typer.Option(help="limit: minutes, hours:minutes:seconds or days-hours")] = "24:00:00",
    mem: Annotated[str, typer.Option(help="of a node, as 900G; 0 is all of it")] = "0",
    job_name: Annotated[str, typer.Option(help="in the queue")] = "moe",
    partition: Annotated[str | None, typer.Option(help="the site's default when not given")] = None,
    account: Annotated[str | None, typer.Option(help="your default when not given")] = None,
    max_restarts: Annotated[int, typer.Option(help="of all processes after one failed")] = 3,
    notice: Annotated[int, typer.Option(help="seconds before the limit at which the run saves and stops")] = 300,
    requeue: Annotated[bool, typer.Option("--requeue", help="queue it again until the run is complete")] = False,
    out: Annotated[Path | None, typer.Option(help="a file for the script, instead of printing it")] = None,
) -> None:
    """Print the job script that trains on a cluster; a run that its processes cannot share is refused here."""
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
