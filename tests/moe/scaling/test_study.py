"""The harness: order, resumption, interruption and refusal, with a stand-in for `moe` that trains in no time; then one
study that is really trained."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe.cli import app
from moe.config.study import StudyConfig
from moe.scaling.study import files, harness, processes, slurm
from moe.scaling.study.processes import Job, Processes, Step

# writes what `moe` would, and a line to calls.txt; `wait` makes it save and stop at SIGTERM, as a training does
STAND_IN = r"""
import json, os, signal, sys, time
from pathlib import Path
root, command, *arguments = sys.argv[1:]
with open(f"{root}/calls.txt", "a") as calls:
    calls.write(f"{command} {os.environ['OMP_NUM_THREADS'] if command == 'train' else ''} {' '.join(arguments)}\n")
if command == "prepare":
    (Path(root) / "corpus/train").mkdir(parents=True, exist_ok=True)
    meta = {"num_tokens": 100000, "num_bytes": 300000, "domains": ["docs"], "tokenizer": "abc", "vocab_size": 512}
    (Path(root) / "corpus/train/meta.json").write_text(json.dumps(meta))
    print(f"{root}/corpus")
    sys.exit()
if command == "look":
    Path(arguments[1]).parent.mkdir(exist_ok=True)
    Path(arguments[1]).write_text(json.dumps({"domains": {}}))
    sys.exit()
values = dict(a.lstrip("+").split("=", 1) for a in arguments)
run_dir = Path(values["run_dir"])
if (Path(root) / "wait").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (Path(root) / f"waiting-{run_dir.name}").write_text(str(os.getpid()))
    while (Path(root) / "wait").exists():
        time.sleep(0.05)
if (Path(root) / "fail").exists() and "4e" in run_dir.name:
    print("error: the loss is not finite")
    sys.exit(1)
run_dir.mkdir(parents=True, exist_ok=True)
diverge = Path(root) / "diverge"
if diverge.exists() and diverge.read_text() in f"{run_dir.name} {values.get('optim.lr')}":
    print("error: 11 updates in a row were skipped")
    record = {"step": 11, "seconds": 1.0, "max_skipped_steps": 10, "reason": "11 updates in a row were skipped"}
    (run_dir / "diverged.json").write_text(json.dumps(record))
    sys.exit(3)
assert not list(run_dir.iterdir()), "a run folder with foreign files"
domains = {"docs": {"cross_entropy": 3.0 + float(values.get("optim.lr", 0)), "num_tokens": 10}}
(run_dir / "results.json").write_text(json.dumps({"splits": {"validation": {"domains": domains}}}))
"""
STUDY = """
name: small
design: frontier
tokens: [2048]
overrides: [data=python, train.batch_tokens=1024, data.vocab_size=512]
sizes:
  a: {overrides: [model=ladder_64], experts: [4], seeds: [0, 1]}
sparse_overrides: ["+moe=8e", "model.moe.name={experts}e", "model.moe.num_experts={experts}"]
evaluations:
  ood/results.json: [look, "{run_dir}", "{output}"]
"""
SWEEP = "sweep: {size: a, tokens: 1024, grid: {optim.lr: [0.25, 0.125]}}\n"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    for module in (processes, harness):
        monkeypatch.setattr(module, "MOE", (sys.executable, str(program), str(tmp_path)))
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.02)
    return tmp_path


def read(tmp_path: Path, *overrides: str, text: str = STUDY) -> StudyConfig:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return files.read_study(str(path), [f"folder={tmp_path / 'study'}", "jobs=2", *overrides])


def calls(tmp_path: Path, command: str = "train") -> list[str]:
    path = tmp_path / "calls.txt"
    return [line for line in path.read_text().splitlines() if line.startswith(command)] if path.exists() else []


def silent(_: str) -> None: ...


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.02)


def test_a_study_from_sweep_to_evaluation(stand_in: Path) -> None:
    study = read(stand_in, text=STUDY + SWEEP)
    said: list[str] = []
    outcome = harness.run_study(study, said.append)
    assert (len(outcome.done), outcome.failed, outcome.stopped) == (4 + 4, {}, [])
    assert len(calls(stand_in, "prepare")) == 1
    trained = calls(stand_in)
    assert all("sweep-" in line for line in trained[:4]) and not any("sweep-" in line for line in trained[4:])
    assert all("optim.lr=0.125" in line for line in trained[4:])  # the lower loss
    assert all(line.startswith("train 1 ") for line in trained)
    assert len(calls(stand_in, "look")) == 4
    assert any("at the edge of the grid" in line for line in said)
    manifest = json.loads((stand_in / "study/study.json").read_text())
    assert [run["stage"] for run in manifest["runs"]] == ["sweep"] * 4 + ["main"] * 4
    assert manifest["statement"].startswith("Same-shape twins")
    assert manifest["sweep"]["dense"]["optim"] == {"optim.lr": 0.125}
    assert manifest["corpus"]["training_tokens"] == 100000

    again = harness.run_study(study, silent)
    assert (len(again.skipped), again.done) == (8, [])
    assert len(calls(stand_in)) == 8  # nothing was trained twice


def test_a_run_alone_waits_for_the_sweep_and_goes_by_the_folder(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a launcher's job does: never with a rate that was not chosen, from any working directory."""
    study = read(stand_in, text=STUDY + SWEEP)
    harness.run_study(study, silent)
    moved = stand_in / "moved"
    (stand_in / "study").rename(moved)
    for name in ("a-4e-t2.048k-s0", "sweep-a-4e-c1-s0"):
        shutil.rmtree(moved / "runs" / name)
    monkeypatch.chdir(stand_in)
    with pytest.raises(ValueError, match="its runs are not all complete"):
        harness.run_alone(moved, "a-4e-t2.048k-s0", silent)
    with pytest.raises(ValueError, match="has no run nothing"):
        harness.run_alone(moved, "nothing", silent)
    assert harness.run_alone(moved, "sweep-a-4e-c1-s0", silent).done == ["sweep-a-4e-c1-s0"]
    assert harness.run_alone(moved, "a-4e-t2.048k-s0", silent).done == ["a-4e-t2.048k-s0"]
    assert f"run_dir={moved}" in calls(stand_in)[-1] and "optim.lr=0.125" in calls(stand_in)[-1]


def test_each_run_says_which_commit_computed_it(stand_in: Path) -> None:
    harness.run_study(read(stand_in), silent)
    entries = json.loads((stand_in / "study/started/a-4e-t2.048k-s1.json").read_text())
    assert [entry["command"][:2] for entry in entries] == [
        ["moe", "train"],
        ["moe", "look"],
    ]
    root = Path(harness.__file__).parents[3]
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        assert entries[0]["commit"] == head.strip()


def test_a_damaged_record_of_starts_is_named_before_anything_starts(stand_in: Path) -> None:
    started = stand_in / "study/started/a-4e-t2.048k-s1.json"
    started.parent.mkdir(parents=True)
    started.write_text('[{"at"')
    with pytest.raises(ValueError, match=r"started/a-4e-t2\.048k-s1\.json is damaged"):
        harness.run_study(read(stand_in), silent)
    assert not calls(stand_in)
    started.unlink()
    assert len(harness.run_study(read(stand_in), silent).done) == 4


def test_a_candidate_that_diverged_loses_and_is_not_trained_again(stand_in: Path) -> None:
    """It is not a failure: the rate was too high, which is what the sweep was to find out."""
    (stand_in / "diverge").write_text("0.125")
    study = read(stand_in, text=STUDY + SWEEP)
    assert "diverged" not in harness.plan_table(study)
    said: list[str] = []
    outcome = harness.run_study(study, said.append)
    assert (len(outcome.done), outcome.failed, outcome.stopped, outcome.diverged) == (4 + 4, {}, [], [])
    assert "sweep-a-4e-c1-s0: diverged" in said
    assert all("optim.lr=0.25" in line for line in calls(stand_in)[4:])
    manifest = json.loads((stand_in / "study/study.json").read_text())
    assert [score["validation_cross_entropy"] for score in manifest["sweep"]["4e"]["scores"]] == [3.25, None]
    again = harness.run_study(study, silent)
    assert (len(again.skipped), again.done) == (8, []) and len(calls(stand_in)) == 8
    states = {line.split()[0]: line.split()[-1] for line in harness.plan_table(study).splitlines()}
    assert states["sweep-a-4e-c1-s0"] == "diverged" and states["a-4e-t2.048k-s0"] == "done"


def test_a_run_that_diverged_is_not_evaluated_and_is_named(stand_in: Path) -> None:
    (stand_in / "diverge").write_text("a-4e-t2.048k-s1")
    study = read(stand_in)
    outcome = harness.run_study(study, silent)
    assert (len(outcome.done), outcome.failed, outcome.diverged) == (4, {}, ["a-4e-t2.048k-s1"])
    assert len(calls(stand_in, "look")) == 3
    assert harness.run_study(study, silent).diverged == ["a-4e-t2.048k-s1"] and len(calls(stand_in)) == 4
    (stand_in / "diverge").unlink()
    more = read(stand_in, text=STUDY.replace("data=python,", "data=python, train.max_skipped_steps=20,"))
    line = next(line for line in harness.plan_table(more).splitlines() if line.startswith("a-4e-t2.048k-s1"))
    assert line.endswith("left")  # it may skip more steps now


def test_the_command_says_which_run_diverged_by_its_status_too(stand_in: Path) -> None:
    (stand_in / "diverge").write_text("a-4e-t2.048k-s1")
    folder = read(stand_in).folder
    result = CliRunner().invoke(app, ["scale", "run", str(stand_in / "small.yaml"), f"folder={folder}"])
    assert result.exit_code == 3 and "4 runs done now" in result.output
    assert "diverged, and left out of the report: a-4e-t2.048k-s1" in result.output


def test_one_failed_run_does_not_stop_the_others(stand_in: Path) -> None:
    (stand_in / "fail").touch()
    study = read(stand_in)
    outcome = harness.run_study(study, silent)
    assert sorted(outcome.done) == ["a-dense-t2.048k-s0", "a-dense-t2.048k-s1"]
    assert sorted(outcome.failed) == ["a-4e-t2.048k-s0", "a-4e-t2.048k-s1"]
    assert "`moe train` ended with 1: error: the loss is not finite" in outcome.failed["a-4e-t2.048k-s0"]
    (stand_in / "fail").unlink()
    again = harness.run_study(study, silent)
    assert (len(again.done), len(again.skipped), again.failed) == (2, 2, {})


def test_a_signal_lets_runs_save_and_the_same_call_goes_on(stand_in: Path) -> None:
    (stand_in / "wait").touch()
    study = read(stand_in)

    def interrupt() -> None:
        wait_for(lambda: len(list(stand_in.glob("waiting-*"))) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    outcome = harness.run_study(study, silent)
    thread.join()
    assert len(outcome.stopped) == 4 and not outcome.done and not outcome.failed
    assert len(calls(stand_in)) == 2  # two at a time, and none after the signal
    for path in stand_in.glob("waiting-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    (stand_in / "wait").unlink()
    assert len(harness.run_study(study, silent).done) == 4


def test_a_killed_harness_leaves_runs_that_the_next_one_waits_for(stand_in: Path) -> None:
    """The orphan holds the lock: its folder has one writer, whoever starts what."""
    (stand_in / "wait").touch()
    study = read(stand_in, "sizes.a.seeds=[0]", "sizes.a.experts=[]")
    program = (
        "import sys\nfrom moe.scaling.study import files, harness, processes\n"
        f"harness.MOE = processes.MOE = (sys.executable, {str(stand_in / 'stand_in.py')!r}, {str(stand_in)!r})\n"
        f"harness.run_study(files.read_study({str(stand_in / 'small.yaml')!r}, sys.argv[1:]), print)\n"
    )
    overrides = [f"folder={study.folder}", "sizes.a.seeds=[0]", "sizes.a.experts=[]"]
    first = subprocess.Popen([sys.executable, "-c", program, *overrides], stdout=subprocess.DEVNULL)
    wait_for(lambda: list(stand_in.glob("waiting-*")))
    first.kill()
    first.wait()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        (stand_in / "wait").unlink(missing_ok=True)  # the orphan may end now

    outcome = harness.run_study(study, say)
    assert said[0] == "a-dense-t2.048k-s0 is being computed by another process" or "note:" in said[0]
    assert any("is being computed by another process" in line for line in said)
    assert len(calls(stand_in)) == 1
    assert outcome.done == ["a-dense-t2.048k-s0"] and len(calls(stand_in, "look")) == 1


def test_what_an_interruption_leaves_before_the_configuration_is_cleared(stand_in: Path) -> None:
    run_dir = stand_in / "study/runs/a-dense-t2.048k-s0"
    run_dir.mkdir(parents=True)
    (run_dir / "corpus.json").write_text("{}")
    (run_dir / "config.yaml.tmp").write_text("half")
    outcome = harness.run_study(read(stand_in), silent)
    assert len(outcome.done) == 4
    other = stand_in / "study/runs/a-dense-t2.048k-s1"
    (other / "results.json").unlink()
    (other / "mine.txt").write_text("not the harness's to delete")
    assert list(harness.run_study(read(stand_in), silent).failed) == ["a-dense-t2.048k-s1"]
    assert (other / "mine.txt").exists()


def test_half_an_evaluation_is_made_again_and_half_a_result_is_an_error(stand_in: Path) -> None:
    study = read(stand_in)
    harness.run_study(study, silent)
    run_dir = stand_in / "study/runs/a-dense-t2.048k-s0"
    (run_dir / "ood/results.json").write_text('{"domains"')
    outcome = harness.run_study(study, silent)
    assert (outcome.done, len(calls(stand_in)), len(calls(stand_in, "look"))) == ([run_dir.name], 4, 5)
    (run_dir / "results.json").write_text('{"splits"')
    with pytest.raises(ValueError, match=r"results\.json is damaged .*to train it again"):
        harness.run_study(study, silent)


def test_a_changed_study_does_not_mix_with_the_old_one(stand_in: Path) -> None:
    from moe.compose import to_yaml

    study = read(stand_in)
    design = harness.derive(study)
    run = harness.main_runs(study, design, stand_in / "study", {})[0]
    run_dir = stand_in / "study/runs" / run.name
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(run.config))
    changed = read(stand_in, text=STUDY.replace("data=python,", "data=python, optim.lr=0.5,"))
    with pytest.raises(ValueError, match=r"holds another run: optim\.lr: 0\.0025 != 0\.5.*another folder"):
        harness.run_study(changed, silent)
    assert calls(stand_in) == []


def test_two_studies_do_not_share_a_folder(stand_in: Path) -> None:
    """The second one's study.json would hide the runs of the first from its report."""
    harness.run_study(read(stand_in), silent)
    before = (stand_in / "study/study.json").read_text()
    other = read(stand_in, text=STUDY.replace("name: small", "name: other").replace("  a: {", "  b: {"))
    for start in (harness.run_study, slurm.submit):
        with pytest.raises(ValueError, match=r"study holds the study small, not other: give other a folder of its own"):
            start(other, silent)
    assert (stand_in / "study/study.json").read_text() == before and len(calls(stand_in)) == 4
    larger = read(stand_in, text=STUDY.replace("sizes:\n", "sizes:\n  b: {overrides: [model=ladder_96]}\n"))
    assert len(harness.run_study(larger, silent).done) == 1  # a study may grow


def test_slurm_says_that_a_whole_sweep_diverged(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would else ask for the same command again, for ever."""
    (stand_in / "diverge").write_text("sweep-a-4e")
    study = read(stand_in, "slurm={gpus_per_node: 2}", text=STUDY + SWEEP)
    for start in (harness.run_study, slurm.submit):
        with pytest.raises(ValueError, match="every candidate of the sweep of 4e diverged"):
            start(study, silent)


def test_more_than_an_epoch_is_refused(stand_in: Path) -> None:
    with pytest.raises(ValueError, match=r"250,000 tokens reads the 100,000 training tokens 2\.50 times"):
        harness.run_study(read(stand_in, "tokens=[250000]"), silent)
    with pytest.raises(ValueError, match=r"250,000 tokens reads the 100,000 training tokens 2\.50 times"):
        harness.run_study(read(stand_in, text=STUDY + SWEEP.replace("tokens: 1024", "tokens: 250000")), silent)


def test_sizes_that_read_other_text_are_refused(stand_in: Path) -> None:
    text = STUDY.replace("[model=ladder_64]", "[model=ladder_64]").replace(
        "sparse_overrides", "  b: {overrides: [model=ladder_96, data.vocab_size=300]}\nsparse_overrides"
    )
    with pytest.raises(ValueError, match="b-dense and a-dense read different data"):
        harness.run_study(read(stand_in, text=text), silent)


def test_the_plan_lists_runs_and_minutes(stand_in: Path) -> None:
    study = read(stand_in, "tokens_per_second={a-dense: 1024.0}", "threads=2", text=STUDY + SWEEP)
    table = harness.plan_table(study)
    # 2 main runs of 2048 and 2 of the sweep of 1024 tokens, at 1024 a second on two cores
    assert "8 runs, 0 core-minutes" in table and "tokens_per_second does not have: a-4e" in table
    assert "the sweep is not complete" in table
    line = next(line for line in table.splitlines() if line.startswith("a-dense-t2.048k-s0"))
    assert line.split()[-2:] == ["0.1", "left"]
    minutes, unknown = harness.core_minutes(study, harness.planned_runs(study, harness.derive(study))[0])
    assert minutes == pytest.approx((2 * 2048 + 2 * 1024) / 1024 * 2 / 60) and unknown == ["a-4e"]


def test_jobs_run_at_once_and_no_more(stand_in: Path) -> None:
    (stand_in / "wait").touch()
    jobs = []
    for number in range(5):
        output = stand_in / f"runs/{number}/results.json"
        jobs.append(Job(f"job{number}", [Step(("train", f"run_dir={output.parent}"), output)], lambda _: None))
    work = Processes(stand_in / "study", jobs=3, threads=1, say=silent)
    (stand_in / "study").mkdir()
    seen: list[int] = []

    def watch() -> None:
        wait_for(lambda: len(list(stand_in.glob("waiting-*"))) == 3)
        time.sleep(0.3)
        seen.append(len(list(stand_in.glob("waiting-*"))))
        (stand_in / "wait").unlink()

    thread = threading.Thread(target=watch)
    thread.start()
    outcome = work.work(jobs)
    thread.join()
    assert seen == [3] and sorted(outcome.done) == [f"job{number}" for number in range(5)]


def test_scripts_for_slurm(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = read(stand_in, "slurm={nodes: 1, gpus_per_node: 2, time: '2:00:00'}")
    monkeypatch.setenv("PATH", str(stand_in))
    with pytest.raises(ValueError, match="no sbatch on this machine: the 4 scripts are in"):
        slurm.submit(study, silent)
    script = (stand_in / "study/slurm/a-4e-t2.048k-s1.sh").read_text()
    assert "#SBATCH --job-name=a-4e-t2.048k-s1\n" in script and "--nproc-per-node=2" in script
    assert "moe look" in script and script.index("srun --ntasks") < script.index("moe look")
    assert subprocess.run(["/bin/bash", "-n"], input=script, text=True).returncode == 0

    for name, body in (("sbatch", f'echo "sbatch $*" >> {stand_in}/slurm.txt; echo 4711'), ("squeue", "echo running")):
        (stand_in / name).write_text(f"#!/bin/bash\n{body}\n")
        (stand_in / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in}:{os.defpath}")
    assert len(slurm.submit(study, silent)) == 4
    assert slurm.submit(study, silent) == []  # they are queued
    (stand_in / "squeue").write_text("#!/bin/bash\n")
    (stand_in / "study/runs/a-4e-t2.048k-s1").mkdir(parents=True)
    (stand_in / "study/runs/a-4e-t2.048k-s1/results.json").write_text('{"splits": {}}')
    assert len(slurm.submit(study, silent)) == 4  # trained and not evaluated is not done
    evaluated = stand_in / "study/runs/a-4e-t2.048k-s1/ood/results.json"
    evaluated.parent.mkdir()
    evaluated.write_text('{"domains"')
    assert len(slurm.submit(study, silent)) == 4 and not evaluated.exists()  # the script makes what is not there
    evaluated.write_text('{"domains": {}}')
    assert len(slurm.submit(study, silent)) == 3
    assert len((stand_in / "slurm.txt").read_text().splitlines()) == 4 + 4 + 4 + 3


def test_slurm_takes_no_other_study_into_the_folder(stand_in: Path) -> None:
    from moe.compose import to_yaml

    study = read(stand_in, "slurm={gpus_per_node: 2}")
    run = harness.main_runs(study, harness.derive(study), stand_in / "study", {})[0]
    (stand_in / "study/runs" / run.name).mkdir(parents=True)
    (stand_in / "study/runs" / run.name / "config.yaml").write_text(to_yaml(run.config))
    changed = read(
        stand_in, "slurm={gpus_per_node: 2}", text=STUDY.replace("data=python,", "data=python, optim.lr=0.5,")
    )
    with pytest.raises(ValueError, match=r"holds another run: optim\.lr: 0\.0025 != 0\.5.*another folder"):
        slurm.submit(changed, silent)
    assert not (stand_in / "study/study.json").exists()


def test_a_job_that_slurm_cannot_hold(stand_in: Path) -> None:
    with pytest.raises(ValueError, match=r"slurm\.gpus is unknown; there are: nodes"):
        slurm.submit(read(stand_in, "slurm={gpus: 2}"), silent)
    with pytest.raises(ValueError, match="cannot be divided among 3 processes"):
        slurm.submit(read(stand_in, "slurm={gpus_per_node: 3}"), silent)
