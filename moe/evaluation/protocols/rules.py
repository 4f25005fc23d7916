"""From log-probabilities to candidate scores: the papers' rules (Artetxe et al. 2021, Lin et al. 2021).

A rule works on whole sequences, one per candidate, each being the tokenized text with that candidate filled in: a
candidate begins at the first token in which the sequences differ, not at a position in the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RULES = ("mean", "sum", "suffix", "unconditional")


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the common prefix of all `sequences`, less one if it is an entire sequence.

    So every candidate keeps a token to score; the published rule would average over nothing (Artetxe et al. 2021).
    """
    # bisection, because slices are compared in C: a prompt has thousands of tokens before the first difference
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
    """Length of the common suffix of all `sequences`, not overlapping the common prefix."""
    longest = min(map(len, sequences)) - common_prefix(sequences)
    m = 0
    while m < longest and len({sequence[len(sequence) - 1 - m] for sequence in sequences}) == 1:
        m += 1
    return m


def apply_rule(
    rule: str, sequences: Sequence[Sequence[int]], log_probs: Sequence[Sequence[float]], first: int
) -> list[float]:
    """The score of each candidate; higher is better.

    sequences: token ids, each starting with the beginning token. log_probs: of each sequence's tokens from index
    `first` on, which is at most the common prefix length. Rules:
    - mean: mean over the tokens after the common prefix, so length-normalised and including what follows the candidate
    - sum: sum over the same tokens; the common prefix would only add a constant
    - suffix: sum over the common suffix, i.e. what follows a candidate in the middle (Trinh & Le 2018); over the
      candidates' own tokens if nothing follows
    - unconditional: as `sum`; the caller subtracts the candidate's score after `Answer:` alone

    Raises ValueError for any other rule.
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
    """The candidates with the highest score: one, or several on a tie. Raises ValueError if a score is NaN."""
    if any(math.isnan(score) for score in scores):
        raise ValueError(f"the scores {list(scores)} hold NaN: the model has diverged; take an earlier checkpoint")
    best = max(scores)
    return [i for i, score in enumerate(scores) if score == best]


def credit(chosen: Sequence[int], gold: Sequence[int]) -> float:
    """The probability that a uniformly drawn one of `chosen` is correct: ties favour no position."""
    return sum(i in gold for i in chosen) / len(chosen)
