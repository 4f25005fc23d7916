"""`moe scale`: compute-matched studies of dense and sparse models."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Compute-matched studies: run them, report on them.", no_args_is_help=True)
Study = Annotated[str, typer.Argument(help="a study's .yaml file, or a name in configs/study")]
Settings = Annotated[list[str] | None, typer.Argument(help="fields of the study, as folder=studies/mine jobs=4")]


@app.command()
def run(
    study: Study,
    overrides: Settings = None,
    list_runs: Annotated[bool, typer.Option("--list", help="print the runs and their cost; start nothing")] = False,
    background: Annotated[bool, typer.Option("--background", help="go on after this terminal is closed")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="hand the runs to SLURM instead of running them")] = False,
    launcher: Annotated[
        list[str] | None,
        typer.Option(
            help="start the runs by a launcher plugin of Hydra, as hydra/launcher=joblib; again for its settings"
        ),
    ] = None,
) -> None:
    """Train and evaluate all runs of a study. What is done is skipped; the same command continues what is not."""
    from moe.scaling.study import files, harness

    if sum((list_runs, background, submit)) > 1:
        raise ValueError("--list, --background and --submit exclude each other: give one")
    if launcher and (list_runs or submit):
        raise ValueError("--launcher starts the runs: leave out --list or --submit")
    config = files.read_study(study, overrides or [])
    if list_runs:
        typer.echo(harness.plan_table(config))
        return
    if submit:
        from moe.scaling.study.slurm import submit as submit_runs

        submit_runs(config, typer.echo)
        return
    folder = files.study_folder(config)
    if background:
        harness.derive(config)  # a study that cannot be should say so here, not in a log
        number, log = harness.start_in_background([study, *(overrides or []), *_options(launcher)], folder)
        typer.echo(f"process {number} works on {folder} and writes {log}; `kill {number}` lets the runs save and stops")
        return
    outcome = harness.run_study(config, typer.echo, launcher or [])
    typer.echo(f"{len(outcome.done)} runs done now, {len(outcome.skipped)} before: {folder}")
    if outcome.failed:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in outcome.failed.items())
        raise ValueError(f"{len(outcome.failed)} runs failed; the same command tries them again:\n{reasons}")
    if outcome.stopped:
        raise ValueError(f"stopped with {len(outcome.stopped)} runs not done; the same command continues them")
    typer.echo(f"next: {shlex.join(['moe', 'scale', 'report', study, *(overrides or [])])}")


def _options(launcher: list[str] | None) -> list[str]:
    return [word for override in launcher or [] for word in ("--launcher", override)]


@app.command()
def report(
    study: Annotated[str, typer.Argument(help="a study, the folder it ran in, or `published`: the paper's own points")],
    overrides: Settings = None,
    out: Annotated[Path | None, typer.Option(help="a folder; <study folder>/report when not given")] = None,
    resamples: Annotated[int, typer.Option(help="draws of every bootstrap", min=100)] = 1000,
) -> None:
    """Write report.html, report.json, CSV tables and plots from the files that the runs left."""
    from moe.scaling.report.build import write
    from moe.scaling.report.read import published
    from moe.scaling.report.read import study as read_study_folder

    if study == "published":
        found, folder = published(), Path("studies/published")
    else:
        folder = Path(study)
        if not (folder / "study.json").is_file():
            from moe.scaling.study import files

            folder = files.study_folder(files.read_study(study, overrides or []))
        found = read_study_folder(folder)
    destination = folder / "report" if out is None else out
    typer.echo(write(found, destination, resamples=resamples))
