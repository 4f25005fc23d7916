"""Run lm-eval tasks on one model: from task names to the content of results.json."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from moe.data.tokenizer import Tokenizer
from moe.distributed.world import World
from moe.evaluation.lm_eval_adapter import LmEvalModel
from moe.evaluation.lm_eval_tasks import data_from_files, load_tasks
from moe.evaluation.results import CONFIDENCE, RESAMPLES, bootstrap, versions
from moe.model import Transformer


class EvaluationSettings(NamedTuple):
    """Everything that determines an evaluation except the model and the files."""

    tasks: tuple[str, ...]
    data_dir: Path | None = None  # None downloads, as lm-eval does
    num_fewshot: int | None = None  # None keeps each task's own
    limit: int | None = None  # items per task, the first ones
    seed: int = 1234  # for demonstrations, sampling and intervals; lm-eval's default for demonstrations
    beginning: str = "auto"
    batch_tokens: int = 8192
    precision: str = "fp32"
    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE


class Evaluation(NamedTuple):
    """The content of results.json, and every item with its answers."""

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]


def run_lm_eval(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: EvaluationSettings,
    *,
    end_ids: Collection[int] | None = None,
    world: World | None = None,
    manager: TaskManager | None = None,
) -> Evaluation:
    """Score the tasks. All ranks must call. end_ids: as in `LmEvalModel`.

    Raises ValueError for an unknown task, for data that is unlisted, missing or malformed, and for settings that the
    model cannot satisfy.
    """
    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"limit ({settings.limit}) must be at least 1, or null for all items")
    if settings.num_fewshot is not None and settings.num_fewshot < 0:
        raise ValueError(f"num_fewshot ({settings.num_fewshot}) must be at least 0, or null for each task's own number")
    if world is not None and world.rank > 0:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # warnings are the same on all ranks
    random.seed(settings.seed)  # task definitions may draw from any of these
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    adapter = LmEvalModel(
        model,
        tokenizer,
        beginning=settings.beginning,
        batch_tokens=settings.batch_tokens,
        precision=settings.precision,
        seed=settings.seed,
        end_ids=end_ids,
        world=world,
    )
    with data_from_files(settings.data_dir) as files:
        loaded = load_tasks(list(settings.tasks), settings.num_fewshot, settings.seed, manager)
        found = _evaluate(adapter, loaded, settings.limit)
    tasks = {
        name: {
            "version": found["versions"].get(name),
            "num_fewshot": found["n-shot"][name],
            "metrics": _metrics(task, found["samples"][name], settings),
        }
        for name, task in loaded["tasks"].items()
    }
    results = {
        "protocol": "lm-eval",
        "tasks": tasks,
        "groups": _groups(found.get("groups", {})),
        "confidence": settings.confidence,
        "resamples": settings.resamples,
        "seed": settings.seed,
        "limit": settings.limit,
        "beginning": settings.beginning,
        "precision": settings.precision,
        "max_seq_len": adapter.max_length,
        "requests": adapter.request_counts(),
        "data": files,
        "versions": versions(),
    }
    return Evaluation(results, found["samples"])


def _evaluate(adapter: LmEvalModel, loaded: Any, limit: int | None) -> Any:
    try:
        return evaluate(adapter, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    except OverflowError as error:
        raise ValueError(
            f"a perplexity is larger than a float can hold: {error}; the model has diverged, or does not know the "
            f"language of the tasks: leave them out, or take another checkpoint"
        ) from error


def _metrics(task: Any, samples: list[dict[str, Any]], settings: EvaluationSettings) -> dict[str, dict[str, float]]:
    """Estimates of every metric under "<metric>", or "<metric>,<filter>" if a task filters its answers.

    One that overflows a float is left out, as JSON has no infinity.
    """
    aggregations = task.aggregation()
    figures: dict[str, dict[str, float]] = {}
    for filter_name in dict.fromkeys(sample["filter"] for sample in samples):
        chosen = sorted((s for s in samples if s["filter"] == filter_name), key=lambda sample: sample["doc_id"])
        for metric in chosen[0]["metrics"]:
            values = [sample[metric] for sample in chosen]
            function = aggregations[metric]
            plain = getattr(function, "__name__", "") == "mean" and not isinstance(values[0], (tuple, list))
            try:
                estimate = bootstrap(
                    values,
                    None if plain else function,
                    resamples=settings.resamples,
                    confidence=settings.confidence,
                    seed=settings.seed,
                )
            except OverflowError:  # in a draw
                continue
            if not all(map(math.isfinite, estimate[:3])):
                continue
            figures[metric if filter_name == "none" else f"{metric},{filter_name}"] = estimate._asdict()
    return figures


def _groups(groups: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the tasks of each group, weighted as in lm-eval."""
    return {
        name: {
            metric.removesuffix(",none"): value
            for metric, value in figures.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
            if "stderr" not in metric and metric != "sample_len"
        }
        for name, figures in groups.items()
    }
