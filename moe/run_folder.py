"""The folder of a run: what it is called and whose it is."""

from __future__ import annotations

import json
from pathlib import Path

from moe.checkpoint import list_checkpoints
from moe.compose import config_hash, differences, from_yaml, to_yaml
from moe.config import RunConfig
from moe.pretraining import write_aside


def open_run_folder(config: RunConfig, identity: dict[str, str]) -> Path:
    """The run's folder, made with its config.yaml and corpus.json, or checked to be of this very run.

    identity: hashes of what the run reads, kept in corpus.json.
    """
    run_dir = Path(config.run_dir) if config.run_dir is not None else Path("runs") / run_name(config)
    config_file, corpus_file = run_dir / "config.yaml", run_dir / "corpus.json"
    if not run_dir.exists() or not any(run_dir.iterdir()):
        run_dir.mkdir(parents=True, exist_ok=True)
        corpus_file.write_text(json.dumps(identity, indent=1))
        write_aside(config_file, to_yaml(config))  # last: a folder with a config is a run
        return run_dir
    if not config_file.exists():
        raise ValueError(f"run_dir {run_dir} holds other files and no config.yaml; choose an empty or a new folder")
    changed = differences(from_yaml(config_file.read_text()), config)
    stored = json.loads(corpus_file.read_text())
    changed += [f"{key}: {stored[key]} != {identity[key]}" for key in identity if stored.get(key) != identity[key]]
    if changed:
        raise ValueError(
            f"run_dir {run_dir} holds another run; it differs in {'; '.join(changed)}. "
            f"Choose another run_dir, or give the values of that run to continue it"
        )
    if config.resume == "never" and list_checkpoints(run_dir / "checkpoints"):
        raise ValueError(f"run_dir {run_dir} holds this run and resume=never; use resume=auto or another folder")
    return run_dir


def run_name(config: RunConfig) -> str:
    """<model>-<moe>-s<seed>-<hash>: equal configurations share a folder, different ones never do."""
    return f"{short_name(config)}-{config_hash(config)[:8]}"


def short_name(config: RunConfig) -> str:
    """<model>-<moe>-s<seed>: what a person tells runs apart by."""
    moe = "dense" if config.model.moe is None else config.model.moe.name
    return f"{config.model.name}-{moe}-s{config.seed}"
