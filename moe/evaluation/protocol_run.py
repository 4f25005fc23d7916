"""Run a paper's protocol on one model; results.json has the same form as for lm-eval tasks."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe.data.tokenizer import Tokenizer
from moe.distributed.world import World
from moe.evaluation.datasets import find, read
from moe.evaluation.file_record import describe
from moe.evaluation.perplexity import perplexity_of
from moe.evaluation.protocols import Setting, TaskResult, prepare_task, run_task
from moe.evaluation.results import CONFIDENCE, RESAMPLES, bootstrap, bootstrap_crossed, versions
from moe.model import Transformer

_SEED = 0  # for the intervals; the protocols draw demonstrations from seeds of their own


def run_protocol(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: list[Setting],
    data_dir: Path,
    *,
    batch_tokens: int,
    precision: str = "fp32",
    end_ids: Collection[int] | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Evaluate each setting. All ranks must call.

    All settings are resolved and their files read before the model runs, so an error in the last setting is found
    before the first one is scored. end_ids: as in `run_task`. Errors are those of `prepare_task` and `read`.
    """
    files: dict[str, dict[str, Any]] = {}

    def reader(hub_id: str, subset: str | None, split: str) -> list[dict[str, Any]]:
        rows = read(hub_id, subset, split, data_dir)
        name = "/".join(filter(None, [hub_id, subset, split]))
        files[name] = describe(find(hub_id, subset, split, data_dir), len(rows))
        return rows

    prepared = [prepare_task(setting, reader) for setting in settings]
    tasks = {}
    for setting, each in zip(settings, prepared, strict=True):
        result = run_task(
            model, tokenizer, each, batch_tokens=batch_tokens, precision=precision, end_ids=end_ids, world=world
        )
        name = setting.task if setting.language is None else f"{setting.task}_{setting.language}"
        tasks[name] = _task(result)
    return {
        "protocol": settings[0].protocol,
        "tasks": tasks,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": _SEED,
        "precision": precision,
        "max_seq_len": model.config.max_seq_len,
        "data": files,
        "versions": versions(),
    }


def _perplexity(nats: Sequence[float]) -> float:
    return perplexity_of(math.fsum(nats) / len(nats))


def _task(result: TaskResult) -> dict[str, Any]:
    """Accuracy with an interval over questions and demonstration draws, plus the papers' interval over draws alone.

    A contrast is the mean difference of its pairs, with the same interval over the clusters that hold them.
    A perplexity that overflows a float is left out.
    """
    accuracy = bootstrap_crossed([run.credits for run in result.runs], result.clusters, seed=_SEED)
    metrics = {"accuracy": accuracy._asdict()}
    if result.contrast is not None and result.contrast.pairs:
        pairs = result.contrast.pairs
        differences = [[run.credits[i] - run.credits[j] for i, j in pairs] for run in result.runs]
        paired = bootstrap_crossed(differences, [result.clusters[i] for i, _ in pairs], least=-1.0, seed=_SEED)
        metrics[f"accuracy_{result.contrast.name}"] = paired._asdict()
    if result.perplexity is not None:
        nats = [sum(values) / len(values) for values in zip(*(run.nats for run in result.runs), strict=True)]
        with np.errstate(invalid="ignore"):  # from two infinite draws
            perplexity = bootstrap(nats, _perplexity, seed=_SEED)
        if all(map(math.isfinite, perplexity[:3])):  # JSON has no infinity, and it is of no use in a table
            metrics["perplexity"] = perplexity._asdict()
    return {
        "num_fewshot": result.settings["num_shots"],
        "mean_shots": math.fsum(run.mean_shots for run in result.runs) / len(result.runs),
        "num_cut": max(run.num_cut for run in result.runs),
        "metrics": metrics,
        "interval_over_demonstrations": result.interval_over_demonstrations,
        "details": result.as_dict(),
    }
