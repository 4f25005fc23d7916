"""The runs of a study as SLURM jobs, through moe.launch."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from moe.config.study import StudyConfig
from moe.launch import SlurmJob, slurm_script
from moe.scaling.study.design import derive
from moe.scaling.study.files import study_folder
from moe.scaling.study.harness import Say, evaluations, make_job, planned_runs, prepare_corpus, require_same
from moe.scaling.study.manifest import record_start, require_name, write_manifest
from moe.scaling.study.runs import SWEEP, Run, choose


def submit(study: StudyConfig, say: Say) -> list[str]:
    """Write a job script for each unfinished run and submit it with sbatch: the sweep first, then the rest.

    Returns the submitted runs. A run is done when trained and evaluated; one whose job is still queued is left alone.
    Raises ValueError for a run that the job cannot hold, for a folder that holds another study, and, after writing the
    scripts, if sbatch is missing.
    """
    design, folder = derive(study), study_folder(study)
    require_name(folder, study)
    corpus = prepare_corpus(study, design, folder)
    runs, known = planned_runs(study, design)
    chosen = choose(study, design, folder) if known else {}
    ready = runs if known else [run for run in runs if run.stage == SWEEP]
    require_same(folder, ready)
    write_manifest(folder, study, design, ready, chosen, corpus)
    scripts = folder / "slurm"
    scripts.mkdir(exist_ok=True)
    submitted = []
    left = [run for run in ready if make_job(study, folder, run).left]
    if not known and not left:
        choose(study, design, folder)  # raises: it says why there is no choice
    for run in left:
        script = scripts / f"{run.name}.sh"
        script.write_text(job_script(study, folder, run), encoding="utf-8")
    if left and shutil.which("sbatch") is None:
        raise ValueError(f"there is no sbatch on this machine: the {len(left)} scripts are in {scripts}")
    for run in left:
        script = scripts / f"{run.name}.sh"
        if _is_queued(script):
            say(f"{run.name} is queued already")
            continue
        for step in make_job(study, folder, run).left:
            step.output.unlink(missing_ok=True)  # an incomplete evaluation, which the script would take for complete
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(f"sbatch refused {script}: {done.stderr.strip()}")
        script.with_suffix(".job").write_text(done.stdout.strip().split(";")[0], encoding="utf-8")
        record_start(folder, run, ["sbatch", str(script)])
        say(f"{run.name} is job {done.stdout.strip()}")
        submitted.append(run.name)
    if not known:
        say("the sweep comes first: give the same command again when it is done")
    return submitted


def job_script(study: StudyConfig, folder: Path, run: Run) -> str:
    """Training as in `moe launch`'s script, then the evaluations on the first node."""
    unknown = sorted(set(study.slurm) - set(SlurmJob.__dataclass_fields__))
    if unknown:
        raise ValueError(f"slurm.{unknown[0]} is unknown; there are: {', '.join(SlurmJob.__dataclass_fields__)}")
    script = slurm_script(run.overrides, SlurmJob(**{"job_name": run.name, **study.slurm}))
    complete = shlex.quote(str(folder / "runs" / run.name / "results.json"))
    for step in evaluations(study, folder, run):
        output = shlex.quote(str(step.output))
        script += f"\nif [[ -e {complete} && ! -e {output} ]]; then\n    {shlex.join(['moe', *step.arguments])}\nfi\n"
    return script


def _is_queued(script: Path) -> bool:
    """Whether SLURM still has a script's job. A job it no longer knows has ended."""
    job = script.with_suffix(".job")
    if not job.exists() or shutil.which("squeue") is None:
        return False
    number = job.read_text(encoding="utf-8").strip()
    done = subprocess.run(["squeue", "--noheader", "--jobs", number], capture_output=True, text=True)
    return done.returncode == 0 and bool(done.stdout.strip())
