"""How log-probabilities become the score of a candidate: the rules of the papers (moe_lm.md 7.2, xglm.md 4).

A rule works on whole sequences, one per candidate, as the text with that candidate in its place is cut into tokens:
where a candidate begins is not decided by the text but by the first token in which the sequences differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RULES = ("mean", "sum", "suffix", "unconditional")


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all `sequences` begin with, less one where a whole sequence is among them.

    So every candidate keeps a token to be scored: the published rule would average over nothing (moe_lm.md 9).
    """
    # halving, because slices are compared in C: a prompt has thousands of tokens before the first that differs
    first, shortest = sequences[0], min(map(len, sequences))
    equal, beyond = 0, shortest + 1
    while beyond - equal > 1:
        middle = (equal + beyond) // 2
        if all(sequence[:middle] == first[:middle] for sequence in sequences):
            equal = middle
        else:
            beyond = middle
    return min(equal, shortest - 1)


def common_suffix(sequences: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all `sequences` end with, the common prefix left out."""
    longest = min(map(len, sequences)) - common_prefix(sequences)
    m = 0
    while m < longest and len({sequence[len(sequence) - 1 - m] for sequence in sequences}) == 1:
        m += 1
    return m


def apply_rule(
    rule: str, sequences: Sequence[Sequence[int]], log_probs: Sequence[Sequence[float]], first: int
) -> list[float]:
    """The score of each candidate; the larger the better.

    sequences: token ids, each behind what begins a text. log_probs: of the tokens of each from index `first` on,
    which is at most their common prefix. Rules:
    mean: over the tokens after the common prefix, which is normalised by length and includes what follows the
    candidate. sum: of the same tokens; the common prefix would add a constant. suffix: sum over the common suffix, what
    follows a candidate in the middle (Trinh & Le 2018); where nothing follows, the candidates' own tokens.
    unconditional: as `sum`; the caller takes off what they get after `Answer:` alone.
    Raises ValueError for another rule.
    """
    if rule not in RULES:
        raise ValueError(f"the scoring rule {rule!r} must be one of: {', '.join(RULES)}")
    k = common_prefix(sequences)
    after = [values[k - first :] for values in log_probs]
    if rule == "mean":
        return [math.fsum(values) / len(values) for values in after]
    m = common_suffix(sequences) if rule == "suffix" else 0
    return [math.fsum(values[len(values) - m :] if m else values) for values in after]


def choose(scores: Sequence[float]) -> list[int]:
    """The candidates with the highest score: one, or all that tie for it. Raises ValueError where one is NaN."""
    if any(math.isnan(score) for score in scores):
        raise ValueError(f"the scores {list(scores)} hold NaN: the model's weights or activations are not finite")
    best = max(scores)
    return [i for i, score in enumerate(scores) if score == best]


def credit(chosen: Sequence[int], gold: Sequence[int]) -> float:
    """The probability that one of `chosen`, drawn evenly, is right: a tie favours no place in the list."""
    return sum(i in gold for i in chosen) / len(chosen)
