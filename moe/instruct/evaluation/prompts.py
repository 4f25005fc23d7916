"""From a record to the sequences to score and the prompt to continue, preceded by demonstrations.

The wording is that of training: moe.instruct.formatting and moe.instruct.encoding make every prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe.data.tokenizer import Tokenizer
from moe.instruct.encoding import EncodedExample, TargetTooLongError
from moe.instruct.evaluation.presets import Protocol
from moe.instruct.evaluation.ranking import encode_candidates
from moe.instruct.evaluation.tasks import EvaluationTask, owner
from moe.instruct.formatting import Layout, draw_layout, format_record
from moe.instruct.records import Record


class Prompt(NamedTuple):
    """One record as the model sees it."""

    record: Record
    owner: str  # the raw example it is a version of
    answers: list[EncodedExample]  # the source with each scored answer; the first target is at `gold`
    gold: int
    written: list[int] | None  # tokens to continue; None if the candidates are ranked
    num_shots: int  # demonstrations that fit
    is_cut: bool  # whether the record itself was cut on the left

    @property
    def is_ranked(self) -> bool:
        return self.written is None


class _Asking(NamedTuple):
    """What all prompts of an evaluation share."""

    tokenizer: Tokenizer
    protocol: Protocol
    max_seq_len: int
    seed: int
    leading_separator: bool


class Prompts(NamedTuple):
    """For one task and one number of demonstrations."""

    prompts: list[Prompt]
    num_too_long: int  # records left out because their answer alone exceeds the context


def check_task(task: EvaluationTask, protocol: Protocol, num_shots: int, max_seq_len: int, seed: int) -> None:
    """Raise what `make_prompts` would, except for answers that are too long, without tokenizing anything."""
    if protocol.max_new_tokens > max_seq_len - 2 and any(
        not _is_ranked(task, record, protocol) for record in task.records
    ):
        raise ValueError(
            f"max_new_tokens ({protocol.max_new_tokens}) leaves no room for a prompt of {task.name} in "
            f"model.max_seq_len ({max_seq_len}); lower it"
        )
    pool = Demonstrations(task, seed)
    for number, record in enumerate(task.records):
        name = owner(record, number)
        if num_shots:
            pool.of(record, name, num_shots)
        if _is_ranked(task, record, protocol) and not all(candidate.strip() for candidate in record.candidates):
            raise ValueError(
                f"task {task.name}, example {name!r}: a candidate is empty, so there is nothing to score: "
                f"{list(record.candidates)!r}; leave the task out"
            )
        if not format_record(record, protocol.layout or Layout()).source.strip(" "):
            raise ValueError(
                f"task {task.name}, example {name!r}: its prompt is empty, so there is nothing to answer: leave the "
                f"task out"
            )


def make_prompts(
    tokenizer: Tokenizer,
    task: EvaluationTask,
    protocol: Protocol,
    num_shots: int,
    max_seq_len: int,
    seed: int,
    *,
    leading_separator: bool = True,
) -> Prompts:
    """Make the prompts of all records of a task, in order.

    A record's delimiter, lead-ins and demonstrations depend only on the seed and the record. Demonstrations are
    dropped, first ones first, until the rest fits beside the longest answer or the tokens to generate; a record that
    does not fit alone is cut on the left. leading_separator: as in tuning. Raises ValueError naming the task if there
    are too few demonstrations, a candidate or a prompt is empty, no room is left to generate, or every answer is longer
    than the context.
    """
    check_task(task, protocol, num_shots, max_seq_len, seed)
    asking = _Asking(tokenizer, protocol, max_seq_len, seed, leading_separator)
    pool = Demonstrations(task, seed)
    prompts, num_too_long = [], 0
    for number, record in enumerate(task.records):
        name = owner(record, number)
        shown = pool.of(record, name, num_shots) if num_shots else []
        try:
            prompts.append(_prompt(asking, task, record, name, shown))
        except TargetTooLongError:
            num_too_long += 1
    if not prompts:
        raise ValueError(
            f"no answer of task {task.name} fits into model.max_seq_len ({max_seq_len}): leave the task out"
        )
    return Prompts(prompts, num_too_long)


class Demonstrations:
    """The demonstrations available to the records of one task: other raw examples with the same template."""

    def __init__(self, task: EvaluationTask, seed: int) -> None:
        self._task, self._seed = task, seed
        self._pools: dict[str, dict[str, Record]] = {}  # by template, each raw example once
        for number, record in enumerate(task.pool):
            self._pools.setdefault(_wording(record), {}).setdefault(owner(record, number), record)

    def of(self, record: Record, name: str, num_shots: int) -> list[Record]:
        """Choose `num_shots` demonstrations; a larger number starts with the same ones. name: the record's raw example.

        Raises ValueError naming task and template if there are too few.
        """
        if self._task.in_order:
            found = self._task.pool[:num_shots]
        else:
            pool = list(self._pools.get(_wording(record), {}).items())
            family = name.partition("/")[0]  # turns of one dialogue belong together
            found = []
            for place in _generator(self._seed, "demonstrations", record).permutation(len(pool)):
                shown, other = pool[place]
                if len(found) == num_shots:
                    break
                if shown.partition("/")[0] != family:
                    found.append(other)
        if len(found) < num_shots:
            template = f" under template {record.template!r}" if record.template else ""
            raise ValueError(
                f"num_shots ({num_shots}) is more than the {len(found)} other examples of task {self._task.name}"
                f"{template} that can be shown: ask for fewer, or leave the task out"
            )
        return found


def _wording(record: Record) -> str:
    """What examples shown together must share: a template is part of its examples, a definition is not."""
    return record.template if record.style == "instance" else ""


def _is_ranked(task: EvaluationTask, record: Record, protocol: Protocol) -> bool:
    return protocol.rank and bool(record.candidates) and task.benchmark not in protocol.always_written


def _prompt(asking: _Asking, task: EvaluationTask, record: Record, name: str, shown: Sequence[Record]) -> Prompt:
    tokenizer, protocol, max_seq_len, seed, leading_separator = asking
    ranked = _is_ranked(task, record, protocol)
    candidates = record.candidates if ranked else record.targets[:1]
    layout = protocol.layout or draw_layout(_generator(seed, "layout", record))
    layout = layout._replace(separator=protocol.separator)
    front = [tokenizer.begin_id] if leading_separator else []
    room = max_seq_len - (0 if ranked else protocol.max_new_tokens)
    for dropped in range(len(shown) + 1):
        formatted = format_record(record, layout, shown[dropped:])
        source = formatted.source.rstrip(" ")
        answers, is_cut = encode_candidates(
            tokenizer, formatted, candidates, max_seq_len, leading_separator=leading_separator
        )
        written = None if ranked else [*front, *tokenizer.encode(source)]
        too_long = written is not None and len(written) > room
        if not is_cut and not too_long:
            break
    if written is not None and too_long:
        written = [*front, *written[len(written) - room + len(front) :]]
    gold = candidates.index(record.targets[0])
    return Prompt(record, name, answers, gold, written, len(shown) - dropped, is_cut or too_long)


def _generator(seed: int, purpose: str, record: Record) -> np.random.Generator:
    text = "\0".join([purpose, record.task, record.template, record.example, record.body])
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "big")])
