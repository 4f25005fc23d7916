"""All questions with one draw of demonstrations: from prompts to choices or last words."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from moe.distributed.world import World
from moe.evaluation.protocols.items import MASK, Item, fill
from moe.evaluation.protocols.prompts import Prompt, TextEncoder, build_prompt, encode
from moe.evaluation.protocols.results import RunResult
from moe.evaluation.protocols.rules import apply_rule, choose, common_prefix, credit
from moe.evaluation.protocols.tasks import Task
from moe.evaluation.scorer import Request, ScoreReport
from moe.evaluation.shared_prefixes import score_sharing_prefixes
from moe.model import Transformer

_UNCONDITIONAL = f"Answer: {MASK}"  # scores a candidate without question and demonstrations


class Question(NamedTuple):
    """A tokenized item."""

    item: Item
    texts: list[list[int]]  # with each candidate
    blanks: list[list[list[int]]]  # the same for each content-free template, whose score is subtracted

    @classmethod
    def of(cls, item: Item, rule: str, tokenizer: TextEncoder) -> Question:
        templates = (_UNCONDITIONAL,) if rule == "unconditional" else item.calibration
        blanks = [[encode(tokenizer, fill(template, each)) for each in item.candidates] for template in templates]
        return cls(item, [encode(tokenizer, text) for text in item.texts], blanks)


Front = list[list[int]]  # the tokens of each demonstration of a question, in order


class Scoring(NamedTuple):
    """How sequences are scored: the arguments of `score` that no protocol fixes."""

    model: Transformer
    batch_tokens: int
    precision: str
    world: World | None
    end_ids: Collection[int] | None = None  # of written answers; `None`: the separator alone

    def run(self, requests: Sequence[Request], *, greedy: bool = False) -> ScoreReport:
        return score_sharing_prefixes(
            self.model,
            requests,
            greedy=greedy,
            batch_tokens=self.batch_tokens,
            precision=self.precision,
            world=self.world,
        )


def run_choice(
    scoring: Scoring, tokenizer: TextEncoder, task: Task, questions: Sequence[Question], fronts: Sequence[Front]
) -> RunResult:
    """Choose each question's best-scoring candidate, given its demonstrations."""
    max_seq_len = scoring.model.config.max_seq_len
    prompts, groups = [], []  # a group is a set of sequences that are compared with each other
    for question, front in zip(questions, fronts, strict=True):
        prompts.append(build_prompt(tokenizer, question.texts, front, max_seq_len))
        groups.append(prompts[-1].sequences)
        before = [] if task.rule == "unconditional" else front
        groups += [build_prompt(tokenizer, blank, before, max_seq_len).sequences for blank in question.blanks]
    firsts = [common_prefix(group) for group in groups]
    requests = [Request(sequence, first) for group, first in zip(groups, firsts, strict=True) for sequence in group]
    report = scoring.run(requests)
    answers = iter(report.scores)
    by_group = []
    for group, first in zip(groups, firsts, strict=True):
        by_group.append(apply_rule(task.rule, group, [next(answers).log_probs for _ in group], first))
    scores, place = [], 0
    for question in questions:
        own, *blanks = by_group[place : place + 1 + len(question.blanks)]
        place += 1 + len(blanks)
        taken_off = [math.fsum(values) / len(values) for values in zip(*blanks, strict=True)] or [0.0] * len(own)
        scores.append([value - blank for value, blank in zip(own, taken_off, strict=True)])
    best = [choose(values) for values in scores]
    credits = [credit(chosen, question.item.gold) for chosen, question in zip(best, questions, strict=True)]
    return run_result(prompts, report, credits, best)


def run_last_word(
    scoring: Scoring, tokenizer: TextEncoder, task: Task, questions: Sequence[Question], fronts: Sequence[Front]
) -> RunResult:
    """Whether the model predicts every token of the last word, and the word's loss in nats."""
    prompts, requests = [], []
    for question, front in zip(questions, fronts, strict=True):
        (text,) = question.texts
        prompts.append(build_prompt(tokenizer, [text], front, scoring.model.config.max_seq_len))
        (sequence,) = prompts[-1].sequences
        without = encode(tokenizer, question.item.template.removesuffix(MASK).rstrip())
        num_word_tokens = len(text) - common_prefix([text, [*without, -1]])
        requests.append(Request(sequence, max(1, len(sequence) - num_word_tokens)))
    report = scoring.run(requests, greedy=True)
    credits = [float(all(answer.greedy or ())) for answer in report.scores]
    nats = [-math.fsum(answer.log_probs) for answer in report.scores]
    return run_result(prompts, report, credits, [[0]] * len(prompts), nats)


def run_result(
    prompts: Sequence[Prompt],
    report: ScoreReport,
    credits: Sequence[float],
    best: Sequence[Sequence[int]],
    nats: Sequence[float] = (),
) -> RunResult:
    return RunResult(
        credits=tuple(credits),
        chosen=tuple(chosen[0] for chosen in best),
        num_ties=sum(len(chosen) > 1 for chosen in best),
        mean_shots=sum(prompt.num_shots for prompt in prompts) / len(prompts),
        num_cut=sum(prompt.cut for prompt in prompts),
        dropped_fraction=report.dropped_fraction,
        nats=tuple(nats),
    )
