"""Beam search for the likeliest continuation of a prompt. Options mean what they mean in transformers.

A finished continuation of n new tokens, end token included, scores (sum of its log-probabilities) / n **
length_penalty. Each step takes the 2 · num_beams best one-token extensions of a row's beams; with n > 1 end tokens
(n + 1) · num_beams, of which num_beams go on at least. Of the first num_beams of these, those that end are finished,
and the num_beams best finished ones are kept; the best of the others continue. The last allowed token ends every beam.

early_stopping decides when a row with num_beams finished continuations is done:
  False    when the best beam, scored at its current length, is no better than the worst of them
  True     at once
  "never"  when the best beam can no longer overtake them: if length_penalty > 0, scored at the longest length
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe.distributed.world import World
from moe.generation.decode_step import decode_step
from moe.generation.end_tokens import EosId, as_set
from moe.generation.tokens import DIVERGED, NonFiniteLogitsError, check_prompts, left_padded, prefill
from moe.model import KeyValueCache, Transformer


class Beam(NamedTuple):
    """A partial or finished continuation."""

    tokens: list[int]
    score: float  # running: the sum of log-probabilities; finished: over length ** length_penalty


class _Candidate(NamedTuple):
    parent: int  # index of the beam it extends
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
    eos_id: EosId = None,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    ended: Callable[[int, list[int]], bool] | None = None,
    world: World | None = None,
) -> list[list[Beam]]:
    """Return the `num_beams` best continuations of each prompt, best first; fewer if fewer were found.

    Returned tokens exclude the end token. Scores are in nats, from float32 log-probabilities. ended: (row, new tokens)
    -> whether they are finished (stop strings). world: ranks that share the model; all must call, and all follow rank
    0's choices. Raises ValueError if num_beams is below 2 or takes more than the vocabulary in a step, for an unknown
    early_stopping, a length_penalty beyond ±20, and for whatever `stream` refuses; NonFiniteLogitsError as `stream`
    does.
    """
    check_prompts(model, prompts, max_new_tokens)
    assert model.config.vocab_size is not None
    rules = _Rules(num_beams, max_new_tokens, as_set(eos_id), length_penalty, early_stopping)
    rules.check(model.config.vocab_size)
    rows = [_Row(rules) for _ in prompts]
    device = model.embedding.weight.device if world is None else world.device
    was_training = model.training
    model.eval()
    try:
        # all beams of a row start from the same prompt, so it is prefilled num_beams times
        tokens, padding = left_padded([prompt for prompt in prompts for _ in range(num_beams)], device)
        cache = model.new_cache(len(tokens), tokens.shape[1] + max_new_tokens, padding)
        logits = prefill(model, tokens, cache)
        step = decode_step(model, cache, max_new_tokens - 1, world)
        for count in range(1, max_new_tokens + 1):
            parents: list[int] = []
            for row, candidates in enumerate(_candidates(logits, rows, rules.candidates_per_beam * num_beams, world)):
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
    end_ids: frozenset[int]
    length_penalty: float
    early_stopping: bool | str

    @property
    def candidates_per_beam(self) -> int:
        """In a step: even if each beam is likeliest to end, by any of the end tokens, as many others go on."""
        return max(2, 1 + len(self.end_ids))

    def check(self, vocab_size: int) -> None:
        """Raise ValueError for rules that no search can follow."""
        width = self.candidates_per_beam
        if not 2 <= self.num_beams <= vocab_size // width:
            share = "half" if width == 2 else f"1/{width} (one part for each end token and one more) of"
            raise ValueError(
                f"num_beams ({self.num_beams}) must be at least 2 and at most {share} the vocabulary ({vocab_size}); "
                f"a single beam is greedy search"
            )
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping ({self.early_stopping!r}) must be true, false or 'never'")
        if not -_STEEPEST <= self.length_penalty <= _STEEPEST:
            raise ValueError(
                f"length_penalty ({self.length_penalty}) must be from {-_STEEPEST} to {_STEEPEST}; 1 is the mean over "
                f"the tokens"
            )


class _Row:
    """The beams of one prompt."""

    def __init__(self, rules: _Rules) -> None:
        self.rules = rules
        # all beams start as the same prompt: only one may be extended, or every candidate would appear num_beams times
        self.running = [Beam([], 0.0 if i == 0 else _NEVER) for i in range(rules.num_beams)]
        self.finished: list[Beam] = []
        self.done = False

    def advance(
        self, candidates: list[tuple[int, int, float]], count: int, ended: Callable[[list[int]], bool] | None
    ) -> list[int]:
        """Extend the beams by their count-th new token; return the parents. candidates: (beam, token, score), best
        first.
        """
        rules = self.rules
        options = []
        for parent, token, score in candidates:
            tokens = [*self.running[parent].tokens, token]
            ends = token in rules.end_ids or count == rules.max_new_tokens or (ended is not None and ended(tokens))
            options.append(_Candidate(parent, tokens, score, ends))
        if not self.done:
            for option in options[: rules.num_beams]:
                if option.ends and option.score > _NEVER / 2:
                    text = option.tokens[:-1] if option.tokens[-1] in rules.end_ids else option.tokens
                    self.finished.append(Beam(text, option.score / count**rules.length_penalty))
            self.finished.sort(key=lambda beam: -beam.score)  # stable: on a tie the older one stays ahead
            del self.finished[rules.num_beams :]
        # if too few continue (stop strings), ended ones fill the remaining places, with a score that is never chosen
        ordered = sorted(options, key=lambda option: option.ends)[: rules.num_beams]
        self.running = [Beam(o.tokens, _NEVER if o.ends else o.score) for o in ordered]
        self.done = self.done or self._is_done(count)
        return [option.parent for option in ordered]

    def _is_done(self, count: int) -> bool:
        rules = self.rules
        best = self.running[0].score
        if best <= _NEVER / 2:
            return True  # no beam continues
        if len(self.finished) < rules.num_beams:
            return False
        if rules.early_stopping is True:
            return True
        at_longest = rules.early_stopping == "never" and rules.length_penalty > 0
        length = rules.max_new_tokens if at_longest else count
        return best / length**rules.length_penalty <= self.finished[-1].score


_STEEPEST = 20  # count ** 20 stays a finite float
_NEVER = -1e9  # nats: score of a beam that must not be chosen


def _candidates(
    logits: Tensor, rows: list[_Row], count: int, world: World | None
) -> list[list[tuple[int, int, float]]]:
    """The `count` best (beam, token, score) of each row, best first. logits: (B · num_beams, V)"""
    vocab_size = logits.shape[-1]
    running = torch.tensor([[beam.score for beam in row.running] for row in rows], device=logits.device)
    scores = logits.float().log_softmax(dim=-1).view(len(rows), -1, vocab_size) + running[:, :, None]
    best = scores.flatten(1).topk(count)
    values, places = best.values.double(), best.indices
    if world is not None:  # equal rows may round differently on another rank, and all must agree
        values, places = world.same_as_first(values), world.same_as_first(places)
    if values.isnan().any():  # topk sorts NaN first, so none is missed
        raise NonFiniteLogitsError(DIVERGED)
    return [
        [(place // vocab_size, place % vocab_size, value) for place, value in zip(row_places, row_values, strict=True)]
        for row_places, row_values in zip(places.tolist(), values.tolist(), strict=True)
    ]


def _reorder(cache: KeyValueCache, parents: list[int]) -> None:
    """Make row i of the cache a copy of the former row parents[i]."""
    if parents == list(range(len(parents))):
        return
    index = torch.tensor(parents, device=cache.num_padding.device)
    for layer in cache.layers:
        for tensor in layer:
            filled = tensor[:, :, : cache.length]
            filled.copy_(filled.index_select(0, index))
