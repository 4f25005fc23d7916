"""Greedy answers, up to the end of the document or a separator, with the prompts divided among the ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch

from moe.data.tokenizer import Tokenizer
from moe.distributed.world import World
from moe.evaluation.scorer import BATCH_TOKENS
from moe.evaluation.shared_prefixes import drops_tokens, is_shared
from moe.generation import StoppedText, generate
from moe.model import Transformer, autocast


class Written(NamedTuple):
    """One answer."""

    text: str  # stripped of outer white space
    is_finished: bool  # ended by the model; False if cut off by max_new_tokens


def write_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    batch_tokens: int = BATCH_TOKENS,
    precision: str = "fp32",
    end_ids: Collection[int] | None = None,
    world: World | None = None,
) -> list[Written]:
    """Return the greedy continuation of each prompt, in order.

    stop: strings before which an answer ends. end_ids: tokens before which it ends; `None` is the tokenizer's `eos_id`
    alone. batch_tokens: positions per batch, padding and answers included. world: ranks that have a copy each and take
    turns with the batches, or that share the model and run all of them; every rank must call with the same prompts, and
    gets all answers.
    """
    device = next(model.parameters()).device if world is None else world.device
    # token + 1 at each position of each answer, 0 meaning none; ranks fill in their rows and sum
    found = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64, device=device)
    together = world is not None and is_shared(model)
    ends = {tokenizer.eos_id} if end_ids is None else end_ids
    batch_tokens = 1 if drops_tokens(model) else batch_tokens  # one by one: others would compete for the capacity
    for turn, batch in enumerate(_batches(prompts, max_new_tokens, batch_tokens)):
        if world is not None and not together and turn % world.size != world.rank:
            continue
        with autocast(device, precision):
            asked = [list(prompts[i]) for i in batch]
            rows = _write(model, tokenizer, asked, max_new_tokens, stop, ends, world if together else None)
        if not together or (world is not None and world.rank == 0):
            for i, row in zip(batch, rows, strict=True):
                found[i, : len(row)] = torch.tensor(row, dtype=torch.int64, device=device) + 1
    if world is not None:
        found = world.sum(found)
    answers = []
    for row in found.tolist():
        tokens = [number - 1 for number in row if number]
        text = StoppedText(tokenizer, stop)
        pieces = [text.add(token) for token in tokens]
        words = "".join([*pieces, text.finish()]).strip()
        answers.append(Written(words, text.stopped or len(tokens) < max_new_tokens))
    return answers


def _batches(prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts of similar length, longest first, the same on every rank."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    while order:
        count = max(1, batch_tokens // (len(prompts[order[0]]) + max_new_tokens))
        yield order[:count]
        order = order[count:]


def _write(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    end_ids: Collection[int],
    world: World | None,
) -> list[list[int]]:
    """The new tokens of each prompt, including those of a stop string."""
    texts = [StoppedText(tokenizer, stop) for _ in prompts]

    def ended(row: int, token: int) -> bool:
        texts[row].add(token)
        return texts[row].stopped

    return generate(model, prompts, max_new_tokens, eos_id=end_ids, ended=ended if stop else None, world=world)
