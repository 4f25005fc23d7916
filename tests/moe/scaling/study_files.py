"""A study's folder as `moe scale run` leaves it, with losses that follow a law."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = 1_000_000
SPEEDUP = 4.0  # of the sparse models, everywhere
SIZES = {"a": 1e6, "b": 4e6, "c": 1.6e7, "d": 6.4e7}  # FLOPs per token; a step of 4 is a speedup of 4
DOMAINS = {"books": 0.0, "speeches": 0.3}
OUTSIDE = {"code": 0.9, "poetry": 0.5}


def loss(flops: float, shift: float = 0.0, noise: float = 0.0) -> float:
    """Nats per token of a dense model."""
    return 4.0 * (flops / 1e13) ** -0.08 + shift + noise


def write(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def make_study(
    folder: Path, *, seeds: Iterable[int] = (0, 1), documents: bool = True, spread: float = 0.0
) -> list[str]:
    """Four dense sizes and sparse twins of the first three, with a fixed share of 8 experts. Returns the runs."""
    runs = []
    for size, per_token in SIZES.items():
        for arm, experts in (("dense", None), ("8e", 8)):
            if size == "d" and experts is not None:
                continue
            for seed in seeds:
                runs.append(_run(size, arm, experts, per_token, seed))
    manifest = {
        "format": 1,
        "name": "made up <study>",
        "design": "frontier",
        "statement": "Same-shape twins.",
        "learning_rate_rule": "No sweep.",
        "tolerance": None,
        "sweep": {},
        "corpus": {"training_tokens": 2 * TOKENS, "epochs_of_the_longest_run": 0.5},
        "pairs": [
            {
                "size": size,
                "dense": "dense",
                "sparse": "8e",
                "dense_flops_per_token": SIZES[size],
                "sparse_flops_per_token": SIZES[size],
                "difference": 0.0,
            }
            for size in "abc"
        ],
        "runs": runs,
        "evaluations": ["ood/results.json", "tasks/results.json"],
    }
    write(folder / "study.json", manifest)
    for run in runs:
        _leave(folder, run, documents, spread)
    return [run["name"] for run in runs]


def _run(size: str, arm: str, experts: int | None, per_token: float, seed: int) -> dict[str, Any]:
    name = f"{size}-{arm}-t1M-s{seed}"
    return {
        "name": name,
        "stage": "main",
        "size": size,
        "arm": arm,
        "num_experts": experts,
        "d_model": 64,
        "num_layers": 4,
        "d_ff": 256,
        "expert_d_ff": None if experts is None else 256,
        "tokens": TOKENS,
        "num_steps": 100,
        "seed": seed,
        "optim": {"optim.lr": 0.005},
        "flops_per_token": per_token,
        "run_dir": f"runs/{name}",
    }


def _leave(folder: Path, run: dict[str, Any], documents: bool, spread: float) -> None:
    run_dir = folder / run["run_dir"]
    sparse = run["num_experts"] is not None
    flops = run["flops_per_token"] * TOKENS * (SPEEDUP if sparse else 1.0)
    noise = spread * (run["seed"] - 0.5)
    rng = np.random.default_rng(7)  # the documents are the same ones for every run
    lengths = {name: rng.integers(50, 150, 20) for name in (*DOMAINS, *OUTSIDE)}
    hard = {name: rng.normal(0, 0.2, 20) for name in lengths}
    tables = {}
    for name, shift in {**DOMAINS, **OUTSIDE}.items():
        tokens = lengths[name]
        nats = (loss(flops, shift, noise) + hard[name]) * tokens
        nats += (loss(flops, shift, noise) * tokens.sum() - nats.sum()) / 20
        tables[name] = {"nats": nats.tolist(), "num_tokens": tokens.tolist()}
    figures = {
        name: {"cross_entropy": loss(flops, shift, noise), "num_tokens": int(lengths[name].sum())}
        for name, shift in {**DOMAINS, **OUTSIDE}.items()
    }
    test = {"domains": {name: figures[name] for name in DOMAINS}, "tokens_per_expert": []}
    if sparse:
        test["tokens_per_expert"] = [[10] * 8, [40, 40, 0, 0, 0, 0, 0, 0]]
    results = {
        "splits": {"test": test, "validation": {"domains": {"books": {"cross_entropy": 9.0, "num_tokens": 1}}}},
        "tokens": TOKENS,
        "seconds": run["flops_per_token"] / 1e6 * (8.0 if sparse else 1.0),
        "peak_memory_bytes": 1e9 * (run["flops_per_token"] / 1e6) ** 0.5,
        "total_params": int(run["flops_per_token"] / 6) * (5 if sparse else 1),
        "active_params": int(run["flops_per_token"] / 6),
        "tokens_per_second": 1e4,
        "num_threads": 1,
    }
    write(run_dir / "results.json", results)
    write(run_dir / "corpus.json", {"tokenizer": "abc", "train": "1", "validation": "2", "test": "3"})
    if documents:
        write(run_dir / "documents.json", {"test": {name: tables[name] for name in DOMAINS}})
    outside = {
        name: {**figures[name], "in_domain": False, **({"documents": tables[name]} if documents else {})}
        for name in OUTSIDE
    }
    write(run_dir / "ood/results.json", {"protocol": {"window": None}, "tokenizer": "abc", "domains": outside})
    accuracy = {"value": 0.9 - loss(flops) / 10, "low": 0.0, "high": 1.0, "num_samples": 10}
    tasks = {"blimp": {"metrics": {"acc": accuracy, "odd_metric": accuracy}}}
    write(run_dir / "tasks/results.json", {"protocol": "lm-eval", "tasks": tasks})
    write(folder / f"started/{run['name']}.json", [{"commit": "c0ffee", "changed": False, "command": ["moe", "train"]}])
