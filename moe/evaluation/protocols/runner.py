"""A task from its rows to its accuracy: prompts, scores and choices in the order of the file, for any batching."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe.distributed.world import World
from moe.evaluation.protocols.items import Item, Row, make_items
from moe.evaluation.protocols.prompts import TextEncoder, draw_demonstrations, encode, shuffled
from moe.evaluation.protocols.results import TaskResult
from moe.evaluation.protocols.runs import Question, Scoring, run_choice, run_last_word
from moe.evaluation.protocols.tasks import PROTOCOLS, Source, Task, find_task
from moe.evaluation.protocols.word_problems import run_number
from moe.evaluation.scorer import BATCH_TOKENS
from moe.model import Transformer

# rows of (Hub id, subset, split) with the Hub's columns
Reader = Callable[[str, str | None, str], list[dict[str, Any]]]

_RUNS = {"choice": run_choice, "last_word": run_last_word, "number": run_number}  # by Task.kind


@dataclass(frozen=True)
class Setting:
    """What a caller may choose. `None` is the protocol's own choice."""

    protocol: str
    task: str
    language: str | None = None  # of the questions; None: the task's only one
    template_language: str = "en"  # a code, or "same": each text in a template of its own language
    demo_language: str | None = None  # of the demonstrations; None: that of the questions
    template_set: str = "corrected"  # or "machine", translations as they came
    num_shots: int = 0
    num_runs: int | None = None  # draws of demonstrations; without any there is one run
    subsets: tuple[str, ...] | None = None  # of a set that has several, such as BLiMP's paradigms
    split: str | None = None
    demo_split: str | None = None
    limit: int | None = None  # of questions of each subset, from the first on

    def __post_init__(self) -> None:
        if self.num_shots < 0:
            raise ValueError(f"num_shots ({self.num_shots}) must not be negative; 0 is zero-shot")
        for name, value in (("num_runs", self.num_runs), ("limit", self.limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1, or null")
        if self.num_shots == 0 and self.num_runs not in (None, 1):
            raise ValueError(f"num_runs ({self.num_runs}) draws demonstrations, and num_shots is 0: there is one run")


def run_task(
    model: Transformer,
    tokenizer: TextEncoder,
    setting: Setting,
    read: Reader,
    *,
    batch_tokens: int = BATCH_TOKENS,
    precision: str = "fp32",
    world: World | None = None,
) -> TaskResult:
    """Evaluate `model` on one task in one language.

    read: gives the rows of a split; it raises for a file that is missing or damaged. The other arguments are those of
    `moe.evaluation.scorer.score`; all ranks of `world` must call, and get the same result. Raises ValueError for a
    protocol, task, language or template that there is not, a row that does not fit its template (naming it), and more
    demonstrations than there are.
    """
    task = find_task(setting.protocol, setting.task)
    language, demo_language = _languages(task, setting)
    source = _source(task, setting, language, shown=False)
    shown = _source(task, setting, demo_language, shown=True) if setting.num_shots else None
    items = _read_items(task, setting, source, language, read, setting.limit)
    questions = [Question.of(item, task.rule, tokenizer) for item in items]
    scoring = Scoring(model, batch_tokens, precision, world)
    num_runs, own_row = 1, shown == source
    pool: list[list[int]] = []
    if shown is not None:
        num_runs = setting.num_runs or PROTOCOLS[setting.protocol].num_runs
        pool = [
            encode(tokenizer, item.demonstration)
            for item in _read_items(task, setting, shown, demo_language, read, None)
        ]
    runs = []
    for trial in range(num_runs):
        drawn = draw_demonstrations(len(pool), setting.num_shots, trial, own_row=own_row) if pool else []
        orders = shuffled(drawn, setting.num_shots, len(questions), own_row=own_row)
        runs.append(
            _RUNS[task.kind](scoring, tokenizer, task, questions, [[pool[i] for i in order] for order in orders])
        )
    choice = task.kind == "choice"
    settings = asdict(setting) | {
        "language": language,
        "demo_language": None if shown is None else demo_language,
        "split": source.split,
        "demo_split": None if shown is None else shown.split,
        "num_runs": num_runs,
        "rule": task.rule if choice else task.kind,
        "prompt_on_record": task.on_record,
    }
    chance = math.fsum(len(item.gold) / len(item.candidates) for item in items) / len(items) if choice else 0.0
    clusters = tuple(item.cluster or f"question {i}" for i, item in enumerate(items))
    return TaskResult(settings, tuple(runs), chance, tuple(item.groups for item in items), clusters)


def _languages(task: Task, setting: Setting) -> tuple[str, str]:
    """Of the questions and of the demonstrations."""
    if setting.language is None and len(task.languages) > 1:
        raise ValueError(f"{setting.task} is in several languages; choose one: {', '.join(task.languages)}")
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
    """Where the questions, or the demonstrations, in a language come from."""
    if not shown:
        source, split = task.source, setting.split
    elif task.demonstrations is None:
        raise ValueError(f"{setting.task} has no examples to show; use num_shots=0")
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
    """The first `limit` items of each subset of `source`, in the template language that the setting asks for."""
    template_language = language if setting.template_language == "same" else setting.template_language
    template = task.template(template_language, setting.template_set)
    items = []
    for subset in source.subsets:
        rows: Sequence[Row] = read(source.hub_id, subset, source.split)
        name = source.hub_id if subset is None else f"{source.hub_id} ({subset})"
        items += make_items(rows[:limit], template, f"{name}, split {source.split}")
    if not items:
        raise ValueError(f"{source.hub_id}, split {source.split}, has no rows")
    return items
