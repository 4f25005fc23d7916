"""Fine-tuning on one task of a paper's protocol (Artetxe et al. 2021): its questions as examples, and its accuracy.

A question's text is the protocol's prompt with the correct candidate filled in; all of it is in the loss. Evaluation
chooses the candidate whose text has the lowest total negative log-likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe.config import SingleTaskConfig
from moe.data.tokenizer import Tokenizer
from moe.distributed.world import World
from moe.evaluation.datasets import read
from moe.evaluation.protocols.items import Item, Row, make_items
from moe.evaluation.protocols.prompts import build_prompt, encode
from moe.evaluation.protocols.rules import choose, common_prefix, credit
from moe.evaluation.protocols.tasks import Source, Task, find_task
from moe.evaluation.scorer import Request
from moe.evaluation.shared_prefixes import score_sharing_prefixes
from moe.instruct.encoding import EncodedExample
from moe.model import Transformer

_HELD_OUT, _EVALUATED = 0x68656C64, 0x6576616C  # keep these uses of the seed apart from others


class Question(NamedTuple):
    """A tokenized item."""

    sequences: tuple[tuple[int, ...], ...]  # the separator and the text with each candidate
    gold: tuple[int, ...]
    target_bytes: int  # UTF-8 length of the correct candidate
    text_bytes: int  # and of the whole text with it

    def counted_bytes(self, loss_on: str) -> int:
        """Bytes of what the loss covers, as in `example`."""
        return self.text_bytes if loss_on == "all" else self.target_bytes

    def example(self, eos_id: int, loss_on: str) -> EncodedExample:
        """The training example: the text with the first correct candidate, ended by the separator.

        loss_on: "all" of it, or "target", from the first token that distinguishes the candidates.
        """
        tokens = [*self.sequences[self.gold[0]], eos_id]
        first_target = common_prefix(self.sequences)
        return EncodedExample(tokens, first_target, 1 if loss_on == "all" else first_target)

    @property
    def positions(self) -> int:
        return max(map(len, self.sequences))


class TaskQuestions(NamedTuple):
    """The questions of a task: two parts of its training split, and the split to report."""

    train: list[Question]
    held_out: list[Question]
    evaluation: list[Question]
    chance: float  # accuracy of guessing on `evaluation`


class Accuracy(NamedTuple):
    """The result on a set of questions."""

    credits: tuple[float, ...]  # 1 for a right choice; tied candidates share it

    @property
    def value(self) -> float:
        return math.fsum(self.credits) / len(self.credits)


def read_task(config: SingleTaskConfig, tokenizer: Tokenizer, *, seq_len: int, seed: int) -> TaskQuestions:
    """Read and encode a task; `held_out_fraction` of the training split, drawn by the seed, is held out.

    A question too long for `seq_len` loses its first tokens (moe.evaluation.protocols.prompts). Raises ValueError for a
    task without candidates or training examples, and whatever reading its files raises.
    """
    assert config.data_dir is not None
    task = find_task(config.protocol, config.name)
    if task.kind != "choice":
        raise ValueError(f"tune.task.name ({config.name}) has no candidates to choose from: choose another task")
    if task.demonstrations is None:
        raise ValueError(
            f"tune.task.name ({config.name}) is for evaluation alone: the protocol names no training split"
        )
    language = config.language or task.languages[0]
    if language not in task.languages or (config.language is None and len(task.languages) > 1):
        raise ValueError(f"tune.task.language ({config.language}) must be one of: {', '.join(task.languages)}")
    folder = Path(config.data_dir)
    shown = _items(task, task.demonstrations, config.train_split, language, folder)
    if config.evaluation_fraction is None:
        evaluated = _items(task, task.source, config.evaluation_split, language, folder)
        _require_apart(task, config)
    else:
        shown, evaluated = _cut(shown, config.evaluation_fraction)
    order = np.random.default_rng([seed, _HELD_OUT]).permutation(len(shown))
    count = round(config.held_out_fraction * len(shown))
    if not 0 < count < len(shown):
        raise ValueError(
            f"tune.task.held_out_fraction ({config.held_out_fraction}) of {len(shown)} examples leaves none to train "
            f"on or none to choose the best checkpoint on"
        )
    questions = [_question(item, tokenizer, seq_len) for item in shown]
    return TaskQuestions(
        train=[questions[i] for i in sorted(order[count:].tolist())],
        held_out=[questions[i] for i in sorted(order[:count].tolist())],
        evaluation=[_question(item, tokenizer, seq_len) for item in evaluated],
        chance=math.fsum(len(item.gold) / len(item.candidates) for item in evaluated) / len(evaluated),
    )


def accuracy(
    model: Transformer,
    questions: Sequence[Question],
    *,
    batch_tokens: int,
    precision: str = "fp32",
    world: World | None = None,
) -> Accuracy:
    """How often the text with the lowest total negative log-likelihood has a correct candidate.

    Tokens before the first difference are common to all candidates and therefore not scored. world: as in
    `moe.evaluation.scorer.score`.
    """
    requests = [
        Request(sequence, common_prefix(question.sequences))
        for question in questions
        for sequence in question.sequences
    ]
    report = score_sharing_prefixes(model, requests, batch_tokens=batch_tokens, precision=precision, world=world)
    totals = iter(math.fsum(score.log_probs) for score in report.scores)
    credits = []
    for question in questions:
        chosen = choose([next(totals) for _ in question.sequences])
        credits.append(credit(chosen, question.gold))
    return Accuracy(tuple(credits))


def _items(task: Task, source: Source, split: str | None, language: str, folder: Path) -> list[Item]:
    items = []
    for subset in source.subsets:
        hub_id = source.hub_id.format(language=language)
        named = None if subset is None else subset.format(language=language)
        rows: Sequence[Row] = read(hub_id, named, split or source.split, folder)
        where = "/".join(filter(None, (hub_id, named, split or source.split)))
        items += make_items(rows, task.template("en", "corrected"), where)
    if not items:
        raise ValueError(f"{source.hub_id}, split {split or source.split}, has no rows")
    return items


def _cut(items: list[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """Split off a fraction of the items, independent of the training seed."""
    order = np.random.default_rng(_EVALUATED).permutation(len(items))
    count = round(fraction * len(items))
    if not 0 < count < len(items):
        raise ValueError(f"tune.task.evaluation_fraction ({fraction}) of {len(items)} examples leaves none on one side")
    parts = (sorted(order[count:].tolist()), sorted(order[:count].tolist()))
    return [items[i] for i in parts[0]], [items[i] for i in parts[1]]


def _require_apart(task: Task, config: SingleTaskConfig) -> None:
    """Refuse to train on the split that is reported."""
    assert task.demonstrations is not None
    train = (task.demonstrations.hub_id, config.train_split or task.demonstrations.split)
    if train == (task.source.hub_id, config.evaluation_split or task.source.split):
        raise ValueError(
            f"tune.task would train on what it is evaluated on, split {train[1]} of {train[0]}: set "
            f"tune.task.train_split or tune.task.evaluation_split, or cut with tune.task.evaluation_fraction"
        )


def _question(item: Item, tokenizer: Tokenizer, seq_len: int) -> Question:
    prompt = build_prompt(tokenizer, [encode(tokenizer, text) for text in item.texts], [], seq_len)
    right, text = item.candidates[item.gold[0]], item.texts[item.gold[0]]
    sizes = (len(right.encode("utf-8", "replace")), len(text.encode("utf-8", "replace")))
    return Question(tuple(map(tuple, prompt.sequences)), item.gold, *sizes)
