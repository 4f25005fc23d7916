"""study.json, which the report reads along with the runs' results, and how each run was started."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe import __version__
from moe.config.study import StudyConfig
from moe.scaling.report.read import read_starts
from moe.scaling.study.design import STATEMENTS, Design
from moe.scaling.study.runs import Run
from moe.scaling.study.sweep import transfer_rule, winners

FORMAT = 1


def write_manifest(
    folder: Path,
    study: StudyConfig,
    design: Design,
    runs: Sequence[Run],
    chosen: dict[str, Any],
    corpus: dict[str, Any],
) -> None:
    """Write everything the report needs to know about the study; run paths are relative to `folder`."""
    tree = {
        "format": FORMAT,
        "name": study.name,
        "design": study.design,
        "statement": STATEMENTS[study.design],
        "learning_rate_rule": transfer_rule(study, design, winners(chosen)),
        "tolerance": study.tolerance if study.design == "matched" else None,
        "sweep": chosen,
        "corpus": corpus,
        "study": dataclasses.asdict(study),
        "pairs": [
            {
                "size": pair.size,
                "dense": pair.dense.name,
                "sparse": pair.sparse.name,
                "dense_flops_per_token": pair.dense.flops_per_token,
                "sparse_flops_per_token": pair.sparse.flops_per_token,
                "difference": pair.difference,
            }
            for pair in design.pairs
        ],
        "runs": [_of_run(run) for run in runs],
        "evaluations": list(study.evaluations),
    }
    write_json(folder / "study.json", tree)


def require_name(folder: Path, study: StudyConfig) -> None:
    """Refuse a folder that holds a study of another name: its report would no longer show its runs."""
    path = folder / "study.json"
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["name"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return  # none yet, or a damaged one, which is written anew
    if name != study.name:
        raise ValueError(f"{folder} holds the study {name}, not {study.name}: give {study.name} a folder of its own")


def record_start(folder: Path, run: Run, command: Sequence[str]) -> None:
    """Append to started/<run>.json: which commit computes the run, how and where. A resumed run has several entries.

    Raises ValueError if the file is damaged.
    """
    path = folder / "started" / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    started = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **source(), "command": list(command)}
    write_json(path, [*read_starts(folder, run.name), started])


def source() -> dict[str, Any]:
    """The commit of this checkout and whether it was modified; for an installed package only its version is known."""
    root = Path(__file__).resolve().parents[3]
    facts: dict[str, Any] = {"commit": None, "changed": None}
    facts |= {"python": platform.python_version(), "version": __version__}
    if (root / ".git").exists():
        facts["commit"] = _git(root, "rev-parse", "HEAD")
        status = _git(root, "status", "--porcelain", "--untracked-files=no")
        facts["changed"] = None if status is None else bool(status)
    return facts


def write_json(path: Path, tree: Any) -> None:
    """Write atomically."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_text(json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _of_run(run: Run) -> dict[str, Any]:
    model = run.arm.config.model
    return {
        "name": run.name,
        "stage": run.stage,
        "size": run.arm.size,
        "arm": run.arm.name,
        "num_experts": run.arm.num_experts,
        "d_model": model.d_model,
        "num_layers": model.num_layers,
        "d_ff": model.d_ff,
        "expert_d_ff": model.expert_width if model.moe is not None else None,
        "tokens": run.tokens,
        "num_steps": run.num_steps,
        "seed": run.seed,
        "optim": run.optim,
        "flops_per_token": run.arm.flops_per_token,
        "flops": run.flops,
        "total_params": run.arm.total_params,
        "active_params": run.arm.active_params,
        "run_dir": f"runs/{run.name}",
        "overrides": list(run.overrides),
    }
