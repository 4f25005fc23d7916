"""Beam search: the likeliest continuation that `num_beams` partial ones lead to, with transformers' meaning of options.

A finished continuation of n new tokens, its end token among them, scores (sum of its log-probabilities) /
n ** length_penalty. Each step takes the 2 · num_beams best one-token continuations of a row's beams. Those among the
first num_beams that end become finished, of which the num_beams best are kept; the best others go on. The last allowed
token ends whatever it stands in.

early_stopping says when a row with num_beams finished ones is done:
  False    when the best beam, scored at its present length, is no better than the worst of them
  True     at once
  "never"  when the best beam could no longer become better: with length_penalty > 0 scored at the longest length
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe.distributed.world import World
from moe.generation.decode_step import decode_step
from moe.generation.tokens import DIVERGED, NonFiniteLogitsError, check_prompts, left_padded, prefill
from moe.model import KeyValueCache, Transformer


class Beam(NamedTuple):
    """A partial or finished continuation."""

    tokens: list[int]
    score: float  # running: the sum of log-probabilities; finished: over length ** length_penalty


class _Candidate(NamedTuple):
    parent: int  # index of the beam that it continues
    tokens: list[int]
    score: float
    ends: bool


@torch.no_grad()
def beam_search(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    num_beams: int,
    eos_id: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    ended: Callable[[int, list[int]], bool] | None = None,
    world: World | None = None,
) -> list[list[Beam]]:
    """For each prompt its `num_beams` best continuations, best first; fewer where fewer were found.

    Tokens hold no `eos_id`. Scores are in nats, of float32 log-probabilities. ended: (row, new tokens) -> whether they
    are finished (stop strings). world: ranks that share the model; all must call, and follow rank 0's choices. Raises
    ValueError for num_beams below 2, or as many as would need more candidates than there are tokens, an unknown
    early_stopping, a length_penalty beyond 20, and for what `stream` refuses; NonFiniteLogitsError as it does.
    """
    check_prompts(model, prompts, max_new_tokens)
    vocab_size = model.config.vocab_size
    assert vocab_size is not None
    if not 2 <= num_beams <= vocab_size // 2:
        raise ValueError(
            f"num_beams ({num_beams}) must be at least 2 and at most half the vocabulary ({vocab_size}); "
            f"a single beam is greedy search"
        )
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping ({early_stopping!r}) must be true, false or 'never'")
    if not -_STEEPEST <= length_penalty <= _STEEPEST:
        raise ValueError(
            f"length_penalty ({length_penalty}) must be from {-_STEEPEST} to {_STEEPEST}; 1 is the mean over the tokens"
        )
    rules = _Rules(num_beams, max_new_tokens, eos_id, length_penalty, early_stopping)
    rows = [_Row(rules) for _ in prompts]
    device = model.embedding.weight.device if world is None else world.device
    was_training = model.training
    model.eval()
    try:
        # every beam of a row begins with the same prompt: it is read num_beams times, as any batch
        tokens, padding = left_padded([prompt for prompt in prompts for _ in range(num_beams)], device)
        cache = model.new_cache(len(tokens), tokens.shape[1] + max_new_tokens, padding)
        logits = prefill(model, tokens, cache)
        step = decode_step(model, cache, max_new_tokens - 1, world)
        for count in range(1, max_new_tokens + 1):
            parents: list[int] = []
            for row, candidates in enumerate(_candidates(logits, rows, num_beams, world)):
                judge = None if ended is None else lambda tokens, row=row: ended(row, tokens)
                chosen = rows[row].advance(candidates, count, judge)
                parents += [row * num_beams + parent for parent in chosen]
            if all(row.done for row in rows) or count == max_new_tokens:
                break
            _reorder(cache, parents)
            logits = step(torch.tensor([beam.tokens[-1] for row in rows for beam in row.running], device=device))
    finally:
        model.train(was_training)
    return [row.finished for row in rows]


class _Rules(NamedTuple):
    num_beams: int
    max_new_tokens: int
    eos_id: int | None
    length_penalty: float
    early_stopping: bool | str


class _Row:
    """The beams of one prompt."""

    def __init__(self, rules: _Rules) -> None:
        self.rules = rules
        # all beams are the same prompt at first: only one may be continued, or every candidate would come in copies
        self.running = [Beam([], 0.0 if i == 0 else _NEVER) for i in range(rules.num_beams)]
        self.finished: list[Beam] = []
        self.done = False

    def advance(
        self, candidates: list[tuple[int, int, float]], count: int, ended: Callable[[list[int]], bool] | None
    ) -> list[int]:
        """Take the candidates (beam, token, score), best first, of the count-th new token; the beams that go on."""
        rules = self.rules
        options = []
        for parent, token, score in candidates:
            tokens = [*self.running[parent].tokens, token]
            ends = token == rules.eos_id or count == rules.max_new_tokens or (ended is not None and ended(tokens))
            options.append(_Candidate(parent, tokens, score, ends))
        if not self.done:
            for option in options[: rules.num_beams]:
                if option.ends and option.score > _NEVER / 2:
                    text = option.tokens[:-1] if option.tokens[-1] == rules.eos_id else option.tokens
                    self.finished.append(Beam(text, option.score / count**rules.length_penalty))
            self.finished.sort(key=lambda beam: -beam.score)  # stable: of equal ones the older stays before
            del self.finished[rules.num_beams :]
        # where too few go on (stop strings), the others fill up the places and lead nowhere
        ordered = sorted(options, key=lambda option: option.ends)[: rules.num_beams]
        self.running = [Beam(o.tokens, _NEVER if o.ends else o.score) for o in ordered]
        self.done = self.done or self._is_done(count)
        return [option.parent for option in ordered]

    def _is_done(self, count: int) -> bool:
        rules = self.rules
        best = self.running[0].score
        if best <= _NEVER / 2:
            return True  # nothing goes on
        if len(self.finished) < rules.num_beams:
            return False
        if rules.early_stopping is True:
            return True
        at_longest = rules.early_stopping == "never" and rules.length_penalty > 0
        length = rules.max_new_tokens if at_longest else count
        return best / length**rules.length_penalty <= self.finished[-1].score


_STEEPEST = 20  # a power of any number of tokens is a number then
_NEVER = -1e9  # nats: the score of what must not be chosen


def _candidates(
    logits: Tensor, rows: list[_Row], num_beams: int, world: World | None
) -> list[list[tuple[int, int, float]]]:
    """The 2 · num_beams best (beam, token, score) of each row, best first. logits: (B · num_beams, V)"""
    vocab_size = logits.shape[-1]
    running = torch.tensor([[beam.score for beam in row.running] for row in rows], device=logits.device)
    scores = logits.float().log_softmax(dim=-1).view(len(rows), num_beams, vocab_size) + running[:, :, None]
    best = scores.flatten(1).topk(2 * num_beams)
    values, places = best.values.double(), best.indices
    if world is not None:  # equal rows may round differently on another rank, and all must go on together
        values, places = world.same_as_first(values), world.same_as_first(places)
    if values.isnan().any():  # topk puts them first, so none is missed
        raise NonFiniteLogitsError(DIVERGED)
    return [
        [(place // vocab_size, place % vocab_size, value) for place, value in zip(row_places, row_values, strict=True)]
        for row_places, row_values in zip(places.tolist(), values.tolist(), strict=True)
    ]


def _reorder(cache: KeyValueCache, parents: list[int]) -> None:
    """Row i of the cache becomes what row parents[i] was."""
    if parents == list(range(len(parents))):
        return
    index = torch.tensor(parents, device=cache.num_padding.device)
    for layer in cache.layers:
        for tensor in layer:
            filled = tensor[:, :, : cache.length]
            filled.copy_(filled.index_select(0, index))
