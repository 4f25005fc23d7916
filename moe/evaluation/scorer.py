"""Log-probabilities of given tokens: the scorer behind the papers' protocols and the lm-eval adapter.

    report = score(model, [Request([eos, *context, *continuation], start=1 + len(context))], greedy=True)
    sum(report.scores[0].log_probs)  # the continuation's log-likelihood in nats

Requests are token ids, so the caller decides how text is tokenized. Each distinct sequence is run once, longest first,
whatever the order of the requests. Ranks take turns with the batches; all of them get all scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe.distributed.world import World
from moe.model import Transformer, autocast

BATCH_TOKENS = 8192  # positions per forward pass, padding included; affects scores only by rounding


class Request(NamedTuple):
    """A sequence, of which the tokens from index `start` (at least 1) on are scored."""

    tokens: Sequence[int]
    start: int


class Score(NamedTuple):
    """The answer to a request, with one entry per token from `start` on."""

    log_probs: tuple[float, ...]  # nats
    greedy: tuple[bool, ...] | None  # whether the token is the likeliest; None if not requested


class ScoreReport(NamedTuple):
    """The answers, in the order of the requests, and statistics of the run."""

    scores: list[Score]
    num_truncated: int  # requests longer than the model's length, cut on the left
    dropped_fraction: float  # of the (token, expert) choices; above 0 only with an evaluation capacity
    num_forward_tokens: int  # tokens run through the model, without padding and repetitions


class _Row(NamedTuple):
    """A distinct sequence that fits the model, and the place of its numbers."""

    tokens: tuple[int, ...]
    first: int  # its first scored token, the smallest `start` of the requests that share it
    offset: int  # index of that token's number among those of all rows


@torch.no_grad()
def score(
    model: Transformer,
    requests: Sequence[Request],
    *,
    greedy: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    precision: str = "fp32",
    world: World | None = None,
) -> ScoreReport:
    """Return the log-probabilities of each request's tokens from `start` on, each given all tokens before it.

    greedy: also report which of them are the likeliest token; this materialises the logits (B, S, V). A sequence of
    more than max_seq_len + 1 tokens loses its first ones, and is counted; scored tokens are never cut. precision: of
    autocast. world: ranks that share the model or have a copy each; all must call with the same requests. Batches are
    the same for any number of ranks and any order of requests. If the model drops tokens in evaluation, sequences of a
    batch would compete for expert capacity, so each is run alone. Raises ValueError for a request that scores no token,
    holds an unknown token or scores more than max_seq_len tokens.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens ({batch_tokens}) must be at least 1; a sequence longer than it is run alone")
    fitted, num_truncated = fit(model, requests)
    rows = _rows(fitted)
    total = rows[-1].offset + len(rows[-1].tokens) - rows[-1].first if rows else 0
    device = next(model.parameters()).device if world is None else world.device
    # log-probability and greedy flag of each scored token; ranks fill in their part and sum, and 0 + x is exactly x
    numbers = torch.zeros(2, total, dtype=torch.float64, device=device)
    choices = torch.zeros(2, dtype=torch.float64, device=device)  # chosen, dropped
    was_training = model.training
    model.eval()
    try:
        for batch in _own_batches(rows, 1 if _drops(model) else batch_tokens, world):
            _score_batch(model, batch, numbers, choices, greedy, precision)
    finally:
        model.train(was_training)
    if world is not None:
        numbers, choices = world.sum(numbers), world.sum(choices)
    places = {row.tokens: row for row in rows}
    values, flags = numbers[0].tolist(), numbers[1].bool().tolist()
    scores = []
    for tokens, start in fitted:
        row = places[tokens]
        wanted = slice(row.offset + start - row.first, row.offset + len(tokens) - row.first)
        scores.append(Score(tuple(values[wanted]), tuple(flags[wanted]) if greedy else None))
    chosen, dropped = choices.tolist()
    num_forward_tokens = sum(len(row.tokens) - 1 for row in rows)
    return ScoreReport(scores, num_truncated, dropped / chosen if chosen else 0.0, num_forward_tokens)


def fit(model: Transformer, requests: Sequence[Request]) -> tuple[list[tuple[tuple[int, ...], int]], int]:
    """(tokens, start) of each request as the model can read it, and the number of requests cut.

    Raises ValueError, naming the request, for a start without tokens and for a token outside the vocabulary.
    """
    longest = model.config.max_seq_len + 1  # the last token is only a target
    vocab_size = model.config.vocab_size
    assert vocab_size is not None
    fitted, num_truncated = [], 0
    for i, (given, start) in enumerate(requests):
        tokens = tuple(given)
        if not 1 <= start < len(tokens):
            raise ValueError(
                f"request {i} asks for the tokens from {start} on of {len(tokens)}; start must be at least 1, for "
                f"nothing stands before token 0 (begin with the separator), and below the number of tokens"
            )
        if not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise ValueError(
                f"request {i} holds the token {max(tokens) if min(tokens) >= 0 else min(tokens)}, which is outside the "
                f"model's vocabulary of {vocab_size}: encode it with the model's own tokenizer"
            )
        cut = max(0, len(tokens) - longest)
        if cut >= start:
            raise ValueError(
                f"request {i} asks for {len(tokens) - start} tokens, more than model.max_seq_len "
                f"({model.config.max_seq_len}) can predict at once; split it into parts"
            )
        num_truncated += cut > 0
        fitted.append((tokens[cut:], start - cut))
    return fitted, num_truncated


def _rows(fitted: list[tuple[tuple[int, ...], int]]) -> list[_Row]:
    """Each distinct sequence once, longest first: the largest batch runs first, and there is little padding."""
    first: dict[tuple[int, ...], int] = {}
    for tokens, start in fitted:
        first[tokens] = min(start, first.get(tokens, start))
    rows, offset = [], 0
    for tokens in sorted(first, key=lambda tokens: (-len(tokens), tokens)):
        rows.append(_Row(tokens, first[tokens], offset))
        offset += len(tokens) - first[tokens]
    return rows


def _drops(model: Transformer) -> bool:
    """Whether the model has an expert capacity in evaluation."""
    return model.config.moe is not None and model.config.moe.eval_capacity_factor is not None


def _own_batches(rows: list[_Row], batch_tokens: int, world: World | None) -> Iterator[list[_Row]]:
    """Every world.size-th batch. Ranks run equally many, as all must meet in every layer; an idle turn is empty."""
    batches: list[list[_Row]] = []
    room = 0
    for row in rows:
        if room < 1:
            batches.append([])
            room = max(1, batch_tokens // (len(row.tokens) - 1))  # rows at the length of this one, the batch's longest
        batches[-1].append(row)
        room -= 1
    if world is None:
        yield from batches
        return
    for turn in range(0, len(batches), world.size):
        mine = turn + world.rank
        yield batches[mine] if mine < len(batches) else []


def _score_batch(
    model: Transformer, batch: list[_Row], numbers: Tensor, choices: Tensor, greedy: bool, precision: str
) -> None:
    """Write the numbers of `batch` into `numbers` (2, N) and add its choices to `choices` (2,)."""
    device = numbers.device
    width = max((len(row.tokens) - 1 for row in batch), default=1)
    # right padding: real tokens do not see it and it takes no expert capacity, so any id will do
    padded = [[*row.tokens, *[0] * (width + 1 - len(row.tokens))] for row in batch] or [[0, 0]]
    tokens = torch.tensor(padded, device=device)  # (B, S + 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    lengths = torch.tensor([len(row.tokens) - 1 for row in batch] or [0], device=device)
    token_mask = torch.arange(width, device=device) < lengths[:, None]  # (B, S)
    mask = None if bool(token_mask.all()) else token_mask
    with autocast(device, precision):
        output = model(inputs, None if greedy else targets.contiguous(), token_mask=mask)
    if greedy:
        logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))  # (B, S, V)
        log_probs = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)  # (B, S)
        likeliest = logits.argmax(-1) == targets
    else:
        log_probs, likeliest = -output.token_losses, None
    for i, row in enumerate(batch):
        wanted = slice(row.first - 1, len(row.tokens) - 1)  # position p predicts token p + 1
        place = slice(row.offset, row.offset + len(row.tokens) - row.first)
        numbers[0, place] = log_probs[i, wanted]
        if likeliest is not None:
            numbers[1, place] = likeliest[i, wanted].double()
    for routing in output.routings:
        choices += torch.stack([routing.chosen.sum(), (routing.chosen & ~routing.kept).sum()])
