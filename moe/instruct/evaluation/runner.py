"""An evaluation from prompts to results: record scores, values of tasks and groups, samples to read."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from tqdm import tqdm

from moe.data.tokenizer import Tokenizer
from moe.distributed.world import World
from moe.evaluation.results import CONFIDENCE, RESAMPLES, versions
from moe.evaluation.scorer import BATCH_TOKENS, Score
from moe.evaluation.shared_prefixes import score_sharing_prefixes
from moe.instruct.evaluation.aggregation import Group, Leaf, SameTask, Series, aggregate, draw, level_name, verdict
from moe.instruct.evaluation.metrics import (
    Metric,
    constant_answer_baseline,
    exact_match,
    random_answer_baseline,
    rouge_l,
    token_pieces,
)
from moe.instruct.evaluation.presets import Protocol
from moe.instruct.evaluation.prompts import Prompt, Prompts, check_task, make_prompts
from moe.instruct.evaluation.ranking import chance, rank, request, without_question
from moe.instruct.evaluation.tasks import EvaluationTask
from moe.instruct.evaluation.writing import Written, write_answers
from moe.model import Transformer

ROUGE_PIECES = ("words", "tokens")


@dataclass(frozen=True)
class EvaluationSettings:
    """Choices besides the protocol."""

    protocol: Protocol
    seed: int = 0  # for wordings, demonstrations and intervals
    rouge: str = "words"  # or "tokens", the model's own, for languages without spaces or in other scripts
    batch_tokens: int = BATCH_TOKENS
    precision: str = "fp32"
    leading_separator: bool = True  # prompts begin with it, as examples did in tuning
    end_ids: tuple[int, ...] | None = None  # tokens that end an answer; `None`: the tokenizer's eos_id alone

    def __post_init__(self) -> None:
        if self.rouge not in ROUGE_PIECES:
            raise ValueError(f"rouge ({self.rouge!r}) must be one of: {', '.join(ROUGE_PIECES)}")
        if self.seed < 0:
            raise ValueError(f"seed ({self.seed}) must be at least 0")


class Evaluated(NamedTuple):
    """The output of an evaluation: results.json and one entry per record and number of demonstrations."""

    results: dict[str, Any]
    samples: list[dict[str, Any]]


class _Scored(NamedTuple):
    """One record: values by metric, as (sum, count), and its answer."""

    prompt: Prompt
    values: dict[str, tuple[float, float]]
    answer: str
    candidate_scores: list[float]
    is_finished: bool
    is_tied: bool


class _Model(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer
    settings: EvaluationSettings
    world: World | None
    metrics: dict[str, Metric]  # of generated answers


def evaluate_tasks(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[EvaluationTask],
    settings: EvaluationSettings,
    *,
    same_task: SameTask | None = None,
    world: World | None = None,
) -> Evaluated:
    """Score all records of all tasks with each of the protocol's numbers of demonstrations.

    All ranks of `world` must call, and all get the same. All tasks are checked first, so that errors are raised before
    the model runs. Raises ValueError as `make_prompts` does, and if a metric's package is missing.
    """
    protocol, names = settings.protocol, same_task or SameTask()
    pieces = None if settings.rouge == "words" else token_pieces(tokenizer)
    metrics = {"rouge_l": rouge_l(pieces), "exact_match": exact_match(protocol.exact_match)}
    of = _Model(model, tokenizer, settings, world, metrics)
    common = (model.config.max_seq_len, settings.seed)
    asked = [(task, shots) for shots in protocol.num_shots for task in tasks]
    for task, shots in asked:
        check_task(task, protocol, shots, *common)
    leaves, entries, samples = [], {}, []
    quiet = world is not None and world.rank > 0
    for task, shots in tqdm(asked, desc="tasks", unit="task", file=sys.stderr, disable=True if quiet else None):
        leading = settings.leading_separator
        prompts = make_prompts(tokenizer, task, protocol, shots, *common, leading_separator=leading)
        scored, dropped_fraction = _score_task(of, prompts)
        leaf = _leaf(of, task, shots, scored)
        key = task.name if len(protocol.num_shots) == 1 else f"{task.name} {shots}-shot"
        leaves.append(leaf)
        entries[key] = _entry(leaf, scored, prompts.num_too_long, dropped_fraction, names, settings.seed)
        samples += [_sample(of, task, shots, each) for each in scored]
    results = {
        "kind": "instruct",
        "protocol": _plain(protocol),
        "rouge": settings.rouge,
        "tasks": entries,
        "groups": [_group(group) for group in aggregate(leaves, names.of, seed=settings.seed)],
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": settings.seed,
        "precision": settings.precision,
        "max_seq_len": model.config.max_seq_len,
        "leading_separator": settings.leading_separator,
        "versions": versions(),
    }
    return Evaluated(results, samples)


def _group(group: Group) -> dict[str, Any]:
    estimates = {metric: drawn.estimate() for metric, drawn in group.figures.items()}
    return {
        "kind": group.kind,
        "level": group.level,
        "category": group.category,
        "name": group.name,
        "num_fewshot": group.num_shots,
        "metrics": {metric: estimate._asdict() for metric, estimate in estimates.items()},
        "chance": {metric: drawn.chance for metric, drawn in group.figures.items()},
        "constant": {metric: drawn.constant for metric, drawn in group.figures.items()},
        "against_chance": {metric: verdict(drawn) for metric, drawn in group.figures.items()},
    }


def _plain(protocol: Protocol) -> dict[str, Any]:
    layout = None if protocol.layout is None else protocol.layout._asdict()
    return json.loads(json.dumps(asdict(protocol) | {"layout": layout}))


def _score_task(of: _Model, prompts: Prompts) -> tuple[list[_Scored], float]:
    """All records of a task, and the fraction of expert choices dropped."""
    settings = of.settings
    protocol = settings.protocol
    blanks: dict[tuple[str, ...], list[Any]] = {}
    if protocol.normalisation == "unconditional":
        length = of.model.config.max_seq_len
        for prompt in prompts.prompts:
            candidates = prompt.record.candidates
            if prompt.is_ranked and candidates not in blanks:
                blanks[candidates] = without_question(
                    of.tokenizer, candidates, length, leading_separator=settings.leading_separator
                )
    requests = [request(answer) for prompt in prompts.prompts for answer in prompt.answers]
    requests += [request(answer) for answers in blanks.values() for answer in answers]
    report = score_sharing_prefixes(
        of.model, requests, batch_tokens=settings.batch_tokens, precision=settings.precision, world=of.world
    )
    found = iter(report.scores)
    scores = [[next(found) for _ in prompt.answers] for prompt in prompts.prompts]
    blank_scores = {candidates: [next(found) for _ in answers] for candidates, answers in blanks.items()}
    written = iter(
        write_answers(
            of.model,
            of.tokenizer,
            [prompt.written for prompt in prompts.prompts if prompt.written is not None],
            protocol.max_new_tokens,
            batch_tokens=settings.batch_tokens,
            precision=settings.precision,
            end_ids=settings.end_ids,
            world=of.world,
            stop=[protocol.separator] if any(prompt.num_shots for prompt in prompts.prompts) else [],
        )
    )
    scored = []
    for prompt, answers in zip(prompts.prompts, scores, strict=True):
        gold = answers[prompt.gold].log_probs
        loss = {"loss": (-math.fsum(gold), float(len(gold)))}
        if prompt.is_ranked:
            scored.append(_ranked(protocol, prompt, answers, blank_scores.get(prompt.record.candidates, []), loss))
        else:
            scored.append(_marked(of.metrics, prompt, next(written), loss))
    return scored, report.dropped_fraction


def _ranked(
    protocol: Protocol, prompt: Prompt, answers: list[Score], blanks: list[Score], loss: dict[str, tuple[float, float]]
) -> _Scored:
    candidates = prompt.record.candidates
    result = rank(protocol.normalisation, protocol.score_end, candidates, prompt.record.targets, answers, blanks)
    values = loss | {"accuracy": (result.credit, 1.0)}
    return _Scored(prompt, values, candidates[result.chosen[0]], result.scores, True, len(result.chosen) > 1)


def _marked(
    metrics: dict[str, Metric], prompt: Prompt, answer: Written, loss: dict[str, tuple[float, float]]
) -> _Scored:
    marks = {name: (metric(answer.text, prompt.record.targets), 1.0) for name, metric in metrics.items()}
    return _Scored(prompt, loss | marks, answer.text, [], answer.is_finished, False)


def _leaf(of: _Model, task: EvaluationTask, shots: int, scored: list[_Scored]) -> Leaf:
    ranked = [each for each in scored if each.prompt.is_ranked]
    written = [each for each in scored if not each.prompt.is_ranked]
    series: dict[str, Series] = {}
    for name in dict.fromkeys(name for each in scored for name in each.values):
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for each in scored:
            if name in each.values:
                value, count = each.values[name]
                sums[each.prompt.owner] = sums.get(each.prompt.owner, 0.0) + value
                counts[each.prompt.owner] = counts.get(each.prompt.owner, 0.0) + count
        series[name] = Series(list(sums.values()), list(counts.values()), list(sums))
    blind: dict[str, float | None] = {}
    constant: dict[str, float | None] = {}
    if ranked:
        records = [each.prompt.record for each in ranked]
        blind["accuracy"] = math.fsum(chance(record.candidates, record.targets) for record in records) / len(records)
        constant["accuracy"] = constant_answer_baseline(
            lambda answer, references: float(answer in references), [record.targets for record in records]
        )
    for name, metric in of.metrics.items() if written else ():
        references = [each.prompt.record.targets for each in written]
        blind[name] = random_answer_baseline(metric, references, [each.prompt.owner for each in written])
        constant[name] = constant_answer_baseline(metric, references)
    protocol = of.settings.protocol
    primary = "accuracy" if ranked else protocol.primary
    if not ranked and task.category in protocol.exact_match_categories:
        primary = "exact_match"
    return Leaf(task.name, task.benchmark, task.category, task.level, shots, primary, series, blind, constant)


def _entry(
    leaf: Leaf, scored: list[_Scored], num_too_long: int, dropped_fraction: float, names: SameTask, seed: int
) -> dict[str, Any]:
    """One sub-task for results.json, with the sums per raw example from which reports compare models."""
    name = names.of(leaf.task)
    drawn = {metric: draw(leaf, metric, name, seed=seed) for metric in leaf.series}
    identity = json.dumps([[each.prompt.owner, each.prompt.record] for each in scored])
    return {
        "num_fewshot": leaf.num_shots,
        "task": leaf.task,
        "benchmark": leaf.benchmark,
        "category": leaf.category,
        "level": leaf.level,
        "level_name": level_name(leaf.level),
        "same_task": name,
        "primary": leaf.primary,
        "metrics": {metric: figure.estimate()._asdict() for metric, figure in drawn.items()},
        "chance": leaf.chance,
        "constant": leaf.constant,
        "against_chance": {metric: verdict(figure) for metric, figure in drawn.items()},
        "templates": _templates(scored),
        "details": {
            "num_records": len(scored),
            "num_ranked": sum(each.prompt.is_ranked for each in scored),
            "num_too_long": num_too_long,
            "num_cut": sum(each.prompt.is_cut for each in scored),
            "num_ties": sum(each.is_tied for each in scored),
            "num_unfinished": sum(not each.is_finished for each in scored),
            "mean_shots": sum(each.prompt.num_shots for each in scored) / len(scored),
            "dropped_fraction": dropped_fraction,
        },
        "records_sha256": hashlib.sha256(identity.encode()).hexdigest(),
        "series": {metric: series._asdict() for metric, series in leaf.series.items()},
    }


def _templates(scored: list[_Scored]) -> dict[str, dict[str, float]]:
    """The values for each template: how much the wording matters."""
    by_template: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for each in scored:
        for metric, value in each.values.items():
            by_template.setdefault(each.prompt.record.template, {}).setdefault(metric, []).append(value)
    return {
        template: {metric: sum(v for v, _ in values) / sum(n for _, n in values) for metric, values in metrics.items()}
        for template, metrics in sorted(by_template.items())
    }


def _sample(of: _Model, task: EvaluationTask, shots: int, each: _Scored) -> dict[str, Any]:
    prompt, record = each.prompt, each.prompt.record
    answer = prompt.answers[prompt.gold]
    read = prompt.written if prompt.written is not None else answer.tokens[: answer.first_target]
    return {
        "task": task.name,
        "num_fewshot": shots,
        "template": record.template,
        "example": prompt.owner,
        "prompt": of.tokenizer.decode(list(read)),
        "answer": each.answer,
        "references": list(record.targets),
        "candidates": dict(zip(record.candidates, each.candidate_scores, strict=False)) if prompt.is_ranked else {},
        "metrics": {metric: value / count for metric, (value, count) in each.values.items()},
    }
