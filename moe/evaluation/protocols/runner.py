"""A task from its rows to its accuracy: prompts, scores and choices are in file order, however they are batched."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from moe.distributed.world import World
from moe.evaluation.protocols.items import Item, Row, make_items
from moe.evaluation.protocols.prompts import TextEncoder, draw_demonstrations, encode, shuffled
from moe.evaluation.protocols.results import Contrast, TaskResult
from moe.evaluation.protocols.runs import Question, Scoring, run_choice, run_last_word
from moe.evaluation.protocols.tasks import PROTOCOLS, Source, Task, find_task
from moe.evaluation.protocols.word_problems import run_number
from moe.evaluation.scorer import BATCH_TOKENS
from moe.model import Transformer

# (Hub id, subset, split) -> rows with the Hub's columns
Reader = Callable[[str, str | None, str], list[dict[str, Any]]]

_RUNS = {"choice": run_choice, "last_word": run_last_word, "number": run_number}  # by Task.kind


@dataclass(frozen=True)
class Setting:
    """What a caller may choose. `None` is the protocol's default."""

    protocol: str
    task: str
    language: str | None = None  # of the questions; None: the task's only one
    template_language: str | None = None  # a code, or "same": the language of each text; None: "en"
    demo_language: str | None = None  # of the demonstrations; None: the questions'
    template_set: str | None = None  # "corrected" or "machine" (uncorrected translations); None: corrected
    num_shots: int = 0
    num_runs: int | None = None  # draws of demonstrations; one run if there are none
    subsets: tuple[str, ...] | None = None  # for a set that has several, such as BLiMP's paradigms
    split: str | None = None
    demo_split: str | None = None
    limit: int | None = None  # questions per subset, the first ones

    def __post_init__(self) -> None:
        if self.num_shots < 0:
            raise ValueError(f"num_shots ({self.num_shots}) must not be negative; 0 is zero-shot")
        for name, value in (("num_runs", self.num_runs), ("limit", self.limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1, or null")
        if self.num_shots == 0 and self.num_runs not in (None, 1):
            raise ValueError(f"num_runs ({self.num_runs}) must be 1 or null without demonstrations (num_shots is 0)")
        for name, chosen in (("demo_language", self.demo_language), ("demo_split", self.demo_split)):
            if self.num_shots == 0 and chosen is not None:
                raise ValueError(
                    f"{name} ({chosen!r}) applies to demonstrations, and there are none (num_shots is 0): leave it out"
                )


class PreparedTask(NamedTuple):
    """A task with everything that needs no model, so that errors in settings and files have already been found."""

    task: Task
    items: list[Item]
    pool: list[Item]  # to draw demonstrations from
    num_shots: int
    num_runs: int
    own_row: bool  # whether the pool is the evaluated split
    settings: dict[str, Any]  # the setting with the protocol's defaults filled in


def prepare_task(setting: Setting, read: Reader) -> PreparedTask:
    """Resolve a setting and read its files.

    read: returns the rows of a split; it raises for a missing or damaged file. Raises ValueError for an unknown
    protocol, task, language, template or subset, a row that does not fit its template (naming it), and too few
    demonstrations.
    """
    task = find_task(setting.protocol, setting.task)
    _check_template(task, setting)
    language, demo_language = _languages(task, setting)
    source = _source(task, setting, language, shown=False)
    shown = _source(task, setting, demo_language, shown=True) if setting.num_shots else None
    items = _read_items(task, setting, source, language, read, setting.limit)
    num_runs, own_row, pool = 1, shown == source, []
    if shown is not None:
        num_runs = setting.num_runs or PROTOCOLS[setting.protocol].num_runs
        pool = _read_items(task, setting, shown, demo_language, read, None)
        draw_demonstrations(len(pool), setting.num_shots, 0, own_row=own_row)  # raises if there are too few
    settings = asdict(setting) | {
        "language": language,
        "template_language": setting.template_language or "en",
        "template_set": (setting.template_set or "corrected") if "template_set" in task.template_reads else None,
        "demo_language": None if shown is None else demo_language,
        "split": source.split,
        "demo_split": None if shown is None else shown.split,
        "num_runs": num_runs,
        "rule": task.rule if task.kind == "choice" else task.kind,
        "prompt_on_record": task.on_record,
    }
    return PreparedTask(task, items, pool, setting.num_shots, num_runs, own_row, settings)


def run_task(
    model: Transformer,
    tokenizer: TextEncoder,
    prepared: PreparedTask,
    *,
    batch_tokens: int = BATCH_TOKENS,
    precision: str = "fp32",
    end_ids: Collection[int] | None = None,
    world: World | None = None,
) -> TaskResult:
    """Evaluate `model` on one task in one language.

    prepared: from `prepare_task`. end_ids: the tokens that end a written answer; `None` is the separator alone. The
    other arguments are those of `moe.evaluation.scorer.score`; all ranks of `world` must call, and all get the same
    result.
    """
    task, items = prepared.task, prepared.items
    questions = [Question.of(item, task.rule, tokenizer) for item in items]
    pool = [encode(tokenizer, item.demonstration) for item in prepared.pool]
    scoring = Scoring(model, batch_tokens, precision, world, end_ids)
    num_shots, own_row = prepared.num_shots, prepared.own_row
    runs = []
    for trial in range(prepared.num_runs):
        drawn = draw_demonstrations(len(pool), num_shots, trial, own_row=own_row) if pool else []
        orders = shuffled(drawn, num_shots, len(questions), own_row=own_row)
        runs.append(
            _RUNS[task.kind](scoring, tokenizer, task, questions, [[pool[i] for i in order] for order in orders])
        )
    chance = 0.0
    if task.kind == "choice":
        chance = math.fsum(len(item.gold) / len(item.candidates) for item in items) / len(items)
    clusters = tuple(item.cluster or f"question {i}" for i, item in enumerate(items))
    contrast = None if task.contrast is None else Contrast(task.contrast[0], find_pairs(items, task.contrast[1:]))
    return TaskResult(prepared.settings, tuple(runs), chance, tuple(item.groups for item in items), clusters, contrast)


def find_pairs(items: Sequence[Item], groups: tuple[str, str]) -> tuple[tuple[int, int], ...]:
    """The places of each two twins of which the first is in one group and the second in the other."""
    places = [
        {(item.cluster, item.twin): i for i, item in enumerate(items) if group in item.groups} for group in groups
    ]
    return tuple((i, places[1][twin]) for twin, i in places[0].items() if twin in places[1])


def _check_template(task: Task, setting: Setting) -> None:
    """Refuse settings that the task's prompt ignores but the results would record."""
    language, template_set = setting.template_language, setting.template_set
    if template_set is not None and "template_set" not in task.template_reads:
        raise ValueError(f"template_set ({template_set!r}): {setting.task} has one set of templates; leave it out")
    if language not in (None, "en") and "template_language" not in task.template_reads:
        raise ValueError(
            f"template_language ({language!r}): {setting.task} has one prompt for all languages; leave it out"
        )


def _languages(task: Task, setting: Setting) -> tuple[str, str]:
    """The languages of the questions and of the demonstrations."""
    if setting.language is None and len(task.languages) > 1:
        raise ValueError(
            f"{setting.task} has several languages; choose with --languages from: {', '.join(task.languages)}"
        )
    language = setting.language or task.languages[0]
    if language not in task.languages:
        raise ValueError(f"{setting.task} has no language {language!r}; it has: {', '.join(task.languages)}")
    demo_language = setting.demo_language or language
    if demo_language not in task.demo_languages:
        raise ValueError(
            f"{setting.task} has no demonstrations in {demo_language!r}; it has: {', '.join(task.demo_languages)}"
        )
    return language, demo_language


def _source(task: Task, setting: Setting, language: str, *, shown: bool) -> Source:
    """The source of the questions, or of the demonstrations, in a language."""
    if not shown:
        source, split = task.source, setting.split
    elif task.demonstrations is None:
        raise ValueError(f"{setting.task} has no examples to show; set num_shots to 0")
    else:
        source, split = task.demonstrations, setting.demo_split
        if task.english_demonstrations is not None and language not in task.languages:
            source = task.english_demonstrations
    subsets = source.subsets
    if setting.subsets is not None:
        unknown = [name for name in setting.subsets if name not in subsets]
        if unknown or not setting.subsets:
            known = ", ".join(map(str, subsets))
            raise ValueError(f"{setting.task} has no subset {', '.join(map(repr, unknown))}; it has: {known}")
        subsets = setting.subsets
    named = tuple(None if subset is None else subset.format(language=language) for subset in subsets)
    return Source(source.hub_id.format(language=language), named, split or source.split)


def _read_items(
    task: Task, setting: Setting, source: Source, language: str, read: Reader, limit: int | None
) -> list[Item]:
    """The first `limit` items of each subset of `source`, in the template language of the setting."""
    template_language = language if setting.template_language == "same" else setting.template_language or "en"
    template = task.template(template_language, setting.template_set or "corrected")
    items = []
    for subset in source.subsets:
        rows: Sequence[Row] = read(source.hub_id, subset, source.split)
        name = source.hub_id if subset is None else f"{source.hub_id} ({subset})"
        items += make_items(rows[:limit], template, f"{name}, split {source.split}")
    if not items:
        raise ValueError(f"{source.hub_id}, split {source.split}, has no rows")
    return items
