"""Problems whose answer is the last number in a text the model writes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import torch

from moe.evaluation.protocols.items import MASK
from moe.evaluation.protocols.prompts import TextEncoder, build_prompt, encode
from moe.evaluation.protocols.results import RunResult
from moe.evaluation.protocols.runs import Front, Question, Scoring
from moe.evaluation.protocols.tasks import Task
from moe.evaluation.shared_prefixes import drops_tokens, is_shared
from moe.generation import generate

MAX_NEW_TOKENS = 256  # per answer, and at most half of max_seq_len
_NUMBER = re.compile(r"[-−]?\d+(?:[.,]\d+)*")
# groups of three digits, all after the same sign, and decimals after the other one
_GROUPED = re.compile(r"(-?[1-9]\d{0,2}(?:([.,])\d{3})(?:\2\d{3})*)(?:(?!\2)[.,](\d+))?$")


def last_number(passage: str) -> float | None:
    """The last number of a text, in the digits of any script; None if there is none.

    Points or commas that separate groups of three digits are dropped, unless the first group is 0; what follows another
    sign are decimals, so 1,234.5 and 1.234,5 are the same number.
    """
    found = _NUMBER.findall(passage)
    if not found:
        return None
    number = "".join(str(unicodedata.digit(c)) if c.isdigit() else c for c in found[-1]).replace("−", "-")
    if grouped := _GROUPED.match(number):
        return float(f"{re.sub('[.,]', '', grouped[1])}.{grouped[3] or 0}")
    whole, *rest = re.split("[.,]", number)
    return float(f"{whole}.{''.join(rest)}") if rest else float(whole)


def run_number(
    scoring: Scoring, tokenizer: TextEncoder, task: Task, questions: Sequence[Question], fronts: Sequence[Front]
) -> RunResult:
    """Generate greedy answers up to the separator; one is right if its last number equals that of the gold text.

    Ranks that hold whole models divide the questions; ranks that share a model generate all answers together.
    """
    model, batch_tokens, precision, world, end_ids = scoring
    ends = {tokenizer.eos_id} if end_ids is None else end_ids
    if precision != "fp32":
        raise ValueError(f"precision ({precision}) must be fp32 in a task whose answers are written")
    room = min(MAX_NEW_TOKENS, model.config.max_seq_len // 2)
    prompts = []
    for question, front in zip(questions, fronts, strict=True):
        asked = encode(tokenizer, question.item.template.removesuffix(MASK).rstrip())
        prompts.append(build_prompt(tokenizer, [asked], front, model.config.max_seq_len - room))
    sequences = [prompt.sequences[0] for prompt in prompts]
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), sequences[i]))
    # batch mates would compete for an evaluation capacity
    per_batch = 1 if drops_tokens(model) else max(1, batch_tokens // (len(sequences[order[0]]) + room))
    batches = [order[start : start + per_batch] for start in range(0, len(order), per_batch)]
    credits = torch.zeros(len(questions), dtype=torch.float64, device=None if world is None else world.device)
    together = world is not None and is_shared(model)
    for number, batch in enumerate(batches):
        if world is not None and not together and number % world.size != world.rank:
            continue
        asked_now = [sequences[i] for i in batch]
        answers = generate(model, asked_now, room, eos_id=ends, world=world if together else None)
        for i, answer in zip(batch, answers, strict=True):
            item = questions[i].item
            gold = last_number(item.candidates[item.gold[0]])
            credits[i] = gold is not None and last_number(tokenizer.decode(answer)) == gold
    if world is not None and not together:
        credits = world.sum(credits)
    return RunResult(
        credits=tuple(credits.tolist()),
        chosen=(0,) * len(questions),
        num_ties=0,
        mean_shots=sum(prompt.num_shots for prompt in prompts) / len(prompts),
        num_cut=sum(prompt.cut for prompt in prompts),
        dropped_fraction=0.0,
        nats=(),
    )
