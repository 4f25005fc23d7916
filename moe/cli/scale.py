"""`moe scale`: compute-matched studies of dense and sparse models."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from moe.training.exit_status import DIVERGED, FAILED

app = typer.Typer(help="Compute-matched studies: run them and report on them.", no_args_is_help=True)
Study = Annotated[str, typer.Argument(help="A study's .yaml file, or a name in configs/study.")]
Settings = Annotated[list[str] | None, typer.Argument(help="Fields of the study, such as folder=studies/mine jobs=4.")]


@app.command()
def run(
    study: Study,
    overrides: Settings = None,
    list_runs: Annotated[bool, typer.Option("--list", help="Print the runs and their cost; start nothing.")] = False,
    background: Annotated[
        bool, typer.Option("--background", help="Run in the background, beyond the end of this terminal.")
    ] = False,
    submit: Annotated[
        bool, typer.Option("--submit", help="Submit the runs to SLURM instead of running them here.")
    ] = False,
    launcher: Annotated[
        list[str] | None,
        typer.Option(
            help="Start the runs with a Hydra launcher plugin, such as hydra/launcher=joblib; repeat for its settings."
        ),
    ] = None,
) -> None:
    """Train and evaluate all runs of a study.

    Finished runs are skipped: repeat the command to continue a study that was stopped.
    """
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
        harness.derive(config)  # an impossible study should fail here, not in a log
        number, log = harness.start_in_background([study, *(overrides or []), *_options(launcher)], folder)
        typer.echo(f"process {number} works on {folder} and writes {log}; `kill {number}` lets the runs save and stops")
        return
    outcome = harness.run_study(config, typer.echo, launcher or [])
    typer.echo(f"{len(outcome.done)} runs done now, {len(outcome.skipped)} before: {folder}")
    if outcome.diverged:
        typer.echo(f"diverged, and left out of the report: {', '.join(outcome.diverged)}", err=True)
    if outcome.failed:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in outcome.failed.items())
        _end(f"{len(outcome.failed)} runs failed; the same command tries them again:\n{reasons}")
    if outcome.stopped:
        _end(f"stopped with {len(outcome.stopped)} runs not done; the same command continues them")
    typer.echo(f"next: {shlex.join(['moe', 'scale', 'report', study, *(overrides or [])])}")
    if outcome.diverged:
        raise typer.Exit(DIVERGED)


def _end(text: str) -> NoReturn:
    """End with the status of work that failed and may succeed another time, unlike a user's mistake."""
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(FAILED)


def _options(launcher: list[str] | None) -> list[str]:
    return [word for override in launcher or [] for word in ("--launcher", override)]


@app.command()
def report(
    study: Annotated[
        str, typer.Argument(help="A study, the folder it ran in, or `published`: the paper's own points.")
    ],
    overrides: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: <study folder>/report.")] = None,
    resamples: Annotated[int, typer.Option(help="Resamples of every bootstrap.", min=100)] = 1000,
) -> None:
    """Write report.html, report.json, CSV tables and plots from the files of the runs."""
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
