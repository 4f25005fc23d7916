"""The folder of a run: what it is called and whose it is."""

from __future__ import annotations

import json
from pathlib import Path

from moe.checkpoint import find_checkpoint, list_checkpoints
from moe.compose import config_hash, differences, from_yaml, to_yaml
from moe.config import RunConfig
from moe.pretraining import write_aside

_BEGUN = {"corpus.json", "config.yaml.tmp"}  # what a folder holds before it is a run
_OF_ONE_START = ("mixture.json", "before.json")  # written before the first step, and not by every kind of run


def open_run_folder(config: RunConfig, identity: dict[str, str]) -> Path:
    """The run's folder, made with its config.yaml and corpus.json, or checked to be of this very run.

    A folder whose run failed before its first step holds nothing to lose and becomes this run's.
    identity: hashes of what the run reads, kept in corpus.json.
    """
    run_dir = Path(config.run_dir) if config.run_dir is not None else Path("runs") / run_name(config)
    if (
        run_dir.exists()
        and not (run_dir / "config.yaml").exists()
        and {path.name for path in run_dir.iterdir()} - _BEGUN
    ):
        raise ValueError(f"run_dir {run_dir} holds other files and no config.yaml; choose an empty or a new folder")
    if _is_started(run_dir):
        _require_same(run_dir, config, identity)
        return run_dir
    _require_source(config)
    if (run_dir / "config.yaml").exists():
        from_yaml((run_dir / "config.yaml").read_text())  # raises for a file that is not ours to write over
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in _OF_ONE_START:
        (run_dir / name).unlink(missing_ok=True)
    (run_dir / "corpus.json").write_text(json.dumps(identity, indent=1))
    write_aside(run_dir / "config.yaml", to_yaml(config))  # last: a folder with a config is a run
    return run_dir


def require_source(config: RunConfig) -> None:
    """Raise ValueError where `init_from` names no checkpoint and no run can be continued that would not read it.

    The folder of an unnamed run is known once its text is read, which takes long: until then any with its name may be.
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
    changed = differences(from_yaml((run_dir / "config.yaml").read_text()), config)
    stored = json.loads((run_dir / "corpus.json").read_text())
    changed += [f"{key}: {stored[key]} != {identity[key]}" for key in identity if stored.get(key) != identity[key]]
    if changed:
        raise ValueError(
            f"run_dir {run_dir} holds another run; it differs in {'; '.join(changed)}. "
            f"Choose another run_dir, or give the values of that run to continue it"
        )
    if config.resume == "never" and list_checkpoints(run_dir / "checkpoints"):
        raise ValueError(f"run_dir {run_dir} holds this run and resume=never; use resume=auto or another folder")


def run_name(config: RunConfig) -> str:
    """<model>-<moe>-s<seed>-<hash>: equal configurations share a folder, different ones never do."""
    return f"{short_name(config)}-{config_hash(config)[:8]}"


def short_name(config: RunConfig) -> str:
    """<model>-<moe>-s<seed>: what a person tells runs apart by."""
    moe = "dense" if config.model.moe is None else config.model.moe.name
    return f"{config.model.name}-{moe}-s{config.seed}"
