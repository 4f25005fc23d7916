"""Chooses the candidate a model finds likeliest, with named normalisations of the likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from moe.data.tokenizer import Tokenizer
from moe.evaluation.protocols.rules import choose, credit
from moe.evaluation.scorer import Request, Score
from moe.instruct.encoding import EncodedExample, encode_formatted, fit
from moe.instruct.formatting import Formatted

NORMALISATIONS = ("sum", "token_mean", "byte_mean", "unconditional")
_UNCONDITIONAL = "Answer:"  # precedes a candidate whose likelihood without the question is subtracted


class Ranked(NamedTuple):
    """The outcome for one record."""

    scores: list[float]
    chosen: list[int]  # the best candidates: one, or all that tie
    credit: float  # 1 right, 0 wrong, the share of right ones in a tie


def encode_candidates(
    tokenizer: Tokenizer,
    formatted: Formatted,
    candidates: Sequence[str],
    max_seq_len: int,
    *,
    leading_separator: bool = True,
) -> tuple[list[EncodedExample], bool]:
    """`formatted` with each candidate as its target, in at most max_seq_len positions, and whether anything was cut.

    All are cut by the same number of tokens, at the start of the source, so that they share one context. Their first
    target is the first token at which any of them departs from the source. Raises TargetTooLongError if a candidate
    alone is too long.
    """
    examples = [
        encode_formatted(tokenizer, formatted._replace(target=candidate), leading_separator=leading_separator)
        for candidate in candidates
    ]
    first = min(example.first_target for example in examples)
    examples = [example._replace(first_target=first) for example in examples]
    excess = max(example.positions for example in examples) - max_seq_len
    if excess <= 0:
        return examples, False
    return [fit(example, example.positions - excess, leading_separator=leading_separator) for example in examples], True


def without_question(
    tokenizer: Tokenizer, candidates: Sequence[str], max_seq_len: int, *, leading_separator: bool = True
) -> list[EncodedExample]:
    """The same candidates after `Answer:` alone."""
    alone = Formatted(_UNCONDITIONAL, "", len(_UNCONDITIONAL))
    return encode_candidates(tokenizer, alone, candidates, max_seq_len, leading_separator=leading_separator)[0]


def request(example: EncodedExample) -> Request:
    """Score an example's target, including the separator at its end."""
    return Request(example.tokens, max(1, example.first_target))


def rank(
    normalisation: str,
    score_end: bool,
    candidates: Sequence[str],
    references: Sequence[str],
    answers: Sequence[Score],
    blanks: Sequence[Score] = (),
) -> Ranked:
    """Choose among candidates by the log-probabilities of their tokens.

    answers: each candidate after the question. blanks: each after `Answer:`, for "unconditional". normalisation: sum of
    the log-probabilities; token_mean, per token; byte_mean, per UTF-8 byte of the candidate, independent of the
    tokenizer; unconditional, the sum minus that without the question, i.e. the log of how much likelier the question
    makes the candidate (Brown et al. 2020). score_end=False leaves out the separator that ends an answer. Raises
    ValueError for another normalisation, and for NaN scores.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation ({normalisation!r}) must be one of: {', '.join(NORMALISATIONS)}")
    scores = []
    for number, (candidate, answer) in enumerate(zip(candidates, answers, strict=True)):
        values = _counted(answer, score_end)
        total = math.fsum(values)
        if normalisation == "token_mean":
            total /= len(values)
        elif normalisation == "byte_mean":
            total /= len(candidate.strip().encode())
        elif normalisation == "unconditional":
            total -= math.fsum(_counted(blanks[number], score_end))
        scores.append(total)
    chosen = choose(scores)
    right = [i for i, candidate in enumerate(candidates) if candidate in references]
    return Ranked(scores, chosen, credit(chosen, right))


def chance(candidates: Sequence[str], references: Sequence[str]) -> float:
    """The probability that a uniformly drawn candidate is right."""
    return sum(candidate in references for candidate in candidates) / len(candidates)


def _counted(score: Score, score_end: bool) -> Sequence[float]:
    # an answer whose only token is merged with the source's last one keeps it: `first_target` precedes both
    return score.log_probs if score_end else score.log_probs[:-1]
