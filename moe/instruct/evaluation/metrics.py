"""Scores of written answers: ROUGE-L and exact match as Super-NaturalInstructions defines them, and their baselines.

Its public scorer takes the F measure of rouge-score's rougeL with Porter's stemmer, and exact match after lower-casing,
removing punctuation and collapsing spaces; the best of several references counts. Here all values are
fractions; the public tables have percentages.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from moe.data.tokenizer import Tokenizer

EXACT_MATCH_RULES = ("normalised", "strict")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_STRANGERS = 4
_MOST_CONSTANTS = 5  # candidates for the constant answer; rarer ones cannot score more in exact match

Metric = Callable[[str, Sequence[str]], float]  # (answer, references) -> 0 to 1


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, words separated by one space; articles stay."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def exact_match(rule: str = "normalised") -> Metric:
    """1 for an answer that equals a reference, else 0.

    normalised: both after `normalise`, the public definition, under which all punctuation-only texts are equal. strict:
    both stripped of outer white space, for answers such as `] ]` (BIG-Bench Hard). Raises ValueError for another rule.
    """
    if rule not in EXACT_MATCH_RULES:
        raise ValueError(f"exact_match ({rule!r}) must be one of: {', '.join(EXACT_MATCH_RULES)}")
    form = normalise if rule == "normalised" else str.strip
    return lambda answer, references: float(any(form(answer) == form(reference) for reference in references))


def rouge_l(pieces: Callable[[str], list[str]] | None = None) -> Metric:
    """The best ROUGE-L F of an answer over its references (Lin 2004).

    pieces: None means rouge-score's words (ASCII letters and digits, lower case) with Porter's stemmer. Texts in other
    scripts have no such words and score 0: pass a function that cuts a text into a tokenizer's pieces (`token_pieces`),
    as the public cross-lingual track does with GPT-2's; pieces are compared unchanged. Raises ValueError without
    rouge-score.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer  # an extra, needed only for evaluation
    except ImportError as error:
        raise ValueError("ROUGE-L needs rouge-score: pip install 'moe-lm[eval]'") from error
    splitter = None if pieces is None else _Pieces(pieces)
    scorer: Any = RougeScorer(["rougeL"], use_stemmer=pieces is None, tokenizer=splitter)

    def score(answer: str, references: Sequence[str]) -> float:
        return max(float(scorer.score(reference, answer)["rougeL"].fmeasure) for reference in references)

    return score


class _Pieces:
    """The tokenizer interface of rouge-score."""

    def __init__(self, pieces: Callable[[str], list[str]]) -> None:
        self._pieces = pieces

    def tokenize(self, text: str) -> list[str]:
        # whether a word has a space before it depends on its position, so the space is no part of the word
        return [piece.strip() for piece in self._pieces(text.strip()) if piece.strip()]


def token_pieces(tokenizer: Tokenizer) -> Callable[[str], list[str]]:
    """A function that cuts a text into a tokenizer's pieces, for `rouge_l`.

    Pieces are equal if their tokens decode alike. Tokens for parts of a character all decode to U+FFFD, so they are
    compared by id. Text outside the vocabulary, <unk>, equals nothing, since its characters are unknown.
    """
    strangers = count()

    def piece(token: int) -> str:
        text = tokenizer.decode([token])
        if "\ufffd" in text:
            return f"\ufffd{token}"
        is_byte = len(text) == 1 and text.isascii()
        if token in tokenizer.fallback_ids and not is_byte:
            return f"\ufffd?{next(strangers)}"
        return text

    return lambda text: [piece(token) for token in tokenizer.encode(text)]


def random_answer_baseline(metric: Metric, references: Sequence[Sequence[str]], owners: Sequence[str]) -> float | None:
    """Mean score of answering with another example's first reference: right in form, blind to the input.

    owners: each record's raw example; prompted versions of one example count as one. Each record is scored with the
    answers of the `_STRANGERS` raw examples that follow its own. None if there is only one example.
    """
    names = list(dict.fromkeys(owners))
    if len(names) < 2:
        return None
    answers = dict(zip(reversed(owners), (refs[0] for refs in reversed(references)), strict=True))
    place = {name: i for i, name in enumerate(names)}
    values = [
        metric(answers[names[(place[owner] + step) % len(names)]], refs)
        for owner, refs in zip(owners, references, strict=True)
        for step in range(1, min(_STRANGERS, len(names) - 1) + 1)
    ]
    return sum(values) / len(values)


def constant_answer_baseline(metric: Metric, references: Sequence[Sequence[str]]) -> float:
    """Mean score of the best single answer to everything: the majority share if answers are labels.

    Tries the most frequent first references that occur at least twice, or the very first one if none does. It sees the
    evaluated answers, so it is a high bar.
    """
    frequent = Counter(refs[0] for refs in references).most_common(_MOST_CONSTANTS)
    tried = [answer for answer, count in frequent if count > 1] or [frequent[0][0]]
    return max(sum(metric(answer, refs) for refs in references) / len(references) for answer in tried)
