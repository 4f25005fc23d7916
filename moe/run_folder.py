"""The folder of a run: its name, which run owns it, and the lock that lets one process at a time train in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moe.checkpoint import DivergedError, TrainState, find_checkpoint, list_checkpoints
from moe.compose import config_hash, differences, from_yaml, to_yaml
from moe.config import RunConfig
from moe.console import say
from moe.pretraining import write_aside
from moe.training import divergence

_LOCK = ".lock"
_BEGUN = {"corpus.json", "config.yaml.tmp", _LOCK}  # what a folder may hold before it is a run
_OF_ONE_START = ("mixture.json", "before.json", divergence.FILE)  # written before the first step, by some kinds of run


@contextlib.contextmanager
def open_run_folder(config: RunConfig, identity: dict[str, str]) -> Iterator[Path]:
    """The run's folder, created with config.yaml and corpus.json, or checked to belong to this very run.

    Only one process at a time can enter it, unless the run is complete. A folder whose run failed before its first step
    holds nothing to lose and is taken over.
    identity: hashes of what the run reads, kept in corpus.json.
    Raises ValueError if the folder belongs to another run, holds other files, or is in use, and DivergedError if its
    run diverged and would do so again.
    """
    run_dir = Path(config.run_dir) if config.run_dir is not None else Path("runs") / run_name(config)
    if run_dir.is_symlink() and not run_dir.exists():
        raise ValueError(
            f"run_dir {run_dir} is a link to {os.readlink(run_dir)}, which does not exist: create that folder, or "
            f"delete the link"
        )
    if (
        run_dir.exists()
        and not (run_dir / "config.yaml").exists()
        and {path.name for path in run_dir.iterdir()} - _BEGUN
    ):
        raise ValueError(f"run_dir {run_dir} holds other files and no config.yaml; choose an empty or a new folder")
    if (run_dir / "results.json").exists():  # nothing will be written, so a read-only folder will do
        _require_same(run_dir, config, identity)
        yield run_dir
        return
    if not _is_started(run_dir):
        _require_source(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    with _lock(run_dir):
        if _is_started(run_dir):
            _require_same(run_dir, config, identity)
            _refuse_diverged(run_dir, config)
        else:
            _take_over(run_dir, config, identity)
        yield run_dir


def _take_over(run_dir: Path, config: RunConfig, identity: dict[str, str]) -> None:
    if (run_dir / "config.yaml").exists():
        _stored_config(run_dir)  # raises for a file that is not ours to overwrite
    for name in _OF_ONE_START:
        (run_dir / name).unlink(missing_ok=True)
    (run_dir / "corpus.json").write_text(json.dumps(identity, indent=1))
    write_aside(run_dir / "config.yaml", to_yaml(config))  # last: a folder with a config is a run


def record_divergence(run_dir: Path, config: RunConfig, state: TrainState, error: DivergedError) -> None:
    """Write diverged.json: when and why a run gave up, so that the same command does not train it again."""
    record = {
        "step": state.step,
        "seconds": state.seconds,
        "skipped_steps": state.skipped_steps,
        "max_skipped_steps": config.train.max_skipped_steps,
        "reason": str(error),
    }
    write_aside(run_dir / divergence.FILE, json.dumps(record, indent=1))
    error.run_dir = run_dir


def _refuse_diverged(run_dir: Path, config: RunConfig) -> None:
    record = divergence.read_divergence(run_dir, config.train.max_skipped_steps)
    path = run_dir / divergence.FILE
    if record is None:
        path.unlink(missing_ok=True)  # of a run that may skip more steps now
        return
    error = DivergedError(
        f"{run_dir} diverged at step {record['step']}: {record['reason']}. The same command would only repeat it; to "
        f"continue it all the same, raise train.max_skipped_steps above {record['max_skipped_steps']} or delete {path}"
    )
    error.run_dir = run_dir
    raise error


@contextlib.contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir`/.lock, which the system releases when this process ends, however it ends."""
    path = run_dir / _LOCK
    file = _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release, so that no later holder's file is unlinked
        file.close()


def _acquire(path: Path) -> IO[str]:
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "which has just begun"
            file.close()
            raise ValueError(
                f"another process ({holder}) trains run_dir {path.parent}: "
                f"wait for it, stop it, or choose another run_dir"
            ) from None
        except OSError as error:  # some network file systems support no locks
            say(f"{path} cannot be locked ({error}): see to it that no other process trains this run")
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()  # its holder deleted it in the meantime


def require_source(config: RunConfig) -> None:
    """Raise ValueError if `init_from` names no checkpoint and there is no run to continue, which would not need it.

    An unnamed run's full folder name depends on its text, which is slow to read: any folder with its short name counts.
    """
    named = [Path(config.run_dir)] if config.run_dir is not None else Path("runs").glob(f"{short_name(config)}-*")
    if not any(_is_started(folder) for folder in named):
        _require_source(config)


def _require_source(config: RunConfig) -> None:
    if config.init_from is not None:
        try:
            find_checkpoint(Path(config.init_from))
        except ValueError as error:
            raise ValueError(f"init_from: {error}") from error


def _is_started(run_dir: Path) -> bool:
    """Whether the folder holds anything that a run has learnt or logged."""
    metrics = run_dir / "metrics.jsonl"
    return (
        (run_dir / "results.json").exists()
        or (metrics.exists() and metrics.stat().st_size > 0)
        or any(list_checkpoints(run_dir / name) for name in ("checkpoints", "best"))
    )


def _require_same(run_dir: Path, config: RunConfig, identity: dict[str, str]) -> None:
    changed = differences(_stored_config(run_dir), config)
    stored = _stored_identity(run_dir, identity)
    changed += [f"{key}: {stored[key]} != {identity[key]}" for key in identity if stored[key] != identity[key]]
    if changed:
        raise ValueError(
            f"run_dir {run_dir} holds another run; it differs in {'; '.join(changed)}. "
            f"Choose another run_dir, or give the values of that run to continue it"
        )
    if config.resume == "never" and list_checkpoints(run_dir / "checkpoints"):
        raise ValueError(f"run_dir {run_dir} holds this run and resume=never; use resume=auto or another folder")


def _stored_config(run_dir: Path) -> RunConfig:
    """The folder's config.yaml. Raises ValueError naming the file if it is not valid."""
    path = run_dir / "config.yaml"
    try:
        return from_yaml(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _stored_identity(run_dir: Path, needed: dict[str, str]) -> dict[str, str]:
    """The folder's corpus.json. Raises ValueError if it lacks one of the `needed` hashes."""
    path = run_dir / "corpus.json"
    try:
        stored = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        stored = None
    if not isinstance(stored, dict) or not stored.keys() >= needed.keys():
        raise ValueError(
            f"{path} is missing or damaged (it should have the hashes {', '.join(needed)}), and without it nobody "
            f"knows whether the text is still that of the run: restore it, or start another run in another run_dir, "
            f"with init_from={run_dir} from the weights of this one"
        )
    return stored


def run_name(config: RunConfig) -> str:
    """<model>-<moe>-s<seed>-<hash>: equal configurations share a folder, different ones never do."""
    return f"{short_name(config)}-{config_hash(config)[:8]}"


def short_name(config: RunConfig) -> str:
    """<model>-<moe>-s<seed>: the readable part of a run's name."""
    moe = "dense" if config.model.moe is None else config.model.moe.name
    return f"{config.model.name}-{moe}-s{config.seed}"
