"""ROUGE-L and exact match on a golden set whose values were worked out by hand from the published definition."""

from __future__ import annotations

import io
import random

import pytest
import sentencepiece

pytest.importorskip("rouge_score", reason="ROUGE-L is rouge-score's (extra `eval`)")

from moe.data.tokenizer import Tokenizer
from moe.data.xglm_tokenizer import XGLMTokenizer
from moe.instruct.evaluation.metrics import (
    constant_answer_baseline,
    exact_match,
    normalise,
    random_answer_baseline,
    rouge_l,
    token_pieces,
)

ROUNDING = 1e-12

# answer, references, ROUGE-L F with the stemmer, exact match; longest common subsequence L of words: F = 2L / (m + n)
GOLDEN = [
    ("the cat sat on the mat", ["the cat is on the mat"], 10 / 12, 0.0),
    ("Running dogs", ["run dog"], 1.0, 0.0),  # Porter: running, dogs -> run, dog
    ("yes", ["no", "Yes, it is"], 2 / 4, 0.0),  # the better of 0 and 1/2
    ("no", ["no", "Yes, it is"], 1.0, 1.0),
    ("Paris.", ["paris"], 1.0, 1.0),
    ("  The  answer: 42! ", ["the answer 42"], 1.0, 1.0),
    ("an apple", ["apple"], 2 / 3, 0.0),  # articles stay
    ("beta alpha", ["alpha beta"], 2 / 4, 0.0),  # order counts
    ("well-known", ["well known"], 1.0, 0.0),  # a hyphen parts words for ROUGE; without it they are one word
    ("", ["x"], 0.0, 0.0),
    ("] ]", ["] }"], 0.0, 1.0),  # nothing but punctuation is all the same
    ("Привет, мир", ["привет мир"], 0.0, 1.0),  # no ASCII word, so ROUGE sees nothing
]


@pytest.mark.parametrize(("answer", "references", "rouge", "exact"), GOLDEN)
def test_the_golden_set(answer: str, references: list[str], rouge: float, exact: float) -> None:
    assert rouge_l()(answer, references) == pytest.approx(rouge, abs=ROUNDING)
    assert exact_match()(answer, references) == exact


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common_subsequence(a[:-1], b[:-1])
    return max(longest_common_subsequence(a[:-1], b), longest_common_subsequence(a, b[:-1]))


def test_rouge_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    rng = random.Random(0)
    metric = rouge_l()
    for _ in range(40):
        a, b = ([rng.choice(["aa", "bb", "cc", "dd"]) for _ in range(rng.randint(1, 6))] for _ in range(2))
        expected = 2 * longest_common_subsequence(a, b) / (len(a) + len(b))
        assert metric(" ".join(a), [" ".join(b)]) == pytest.approx(expected, abs=ROUNDING)


def test_the_strict_rule_and_rouge_over_pieces() -> None:
    assert exact_match("strict")("] ]", ["] }"]) == 0.0
    assert exact_match("strict")(" (D)\n", ["(D)"]) == 1.0
    assert exact_match("strict")("d", ["(D)"]) == 0.0
    assert normalise("A, a-b  C!") == "a ab c"
    pieces = rouge_l(lambda text: [" " + word for word in text.split()])
    assert pieces("Привет мир", ["Привет мой мир"]) == pytest.approx(4 / 5, abs=ROUNDING)
    assert pieces("running", ["run"]) == 0.0  # no stemmer
    with pytest.raises(ValueError, match=r"exact_match \('loose'\) must be one of: normalised, strict"):
        exact_match("loose")


def test_pieces_of_characters_that_the_vocabulary_lacks(tokenizer: Tokenizer) -> None:
    """Their bytes are compared, not the one sign that each byte alone decodes to."""
    metric = rouge_l(token_pieces(tokenizer))
    assert len(tokenizer.encode("東")) >= 3  # E6 9D B1
    assert metric("東", ["京"]) == 0.0  # E4 BA AC
    assert metric("東", ["東"]) == 1.0
    assert metric("東京", ["東"]) == pytest.approx(2 * 3 / (6 + 3), abs=ROUNDING)
    whole = rouge_l(lambda text: [tokenizer.decode([token]) for token in tokenizer.encode(text)])
    for answer, reference in [("the cat sat", "the red cat"), ("a dog", "a dog ran"), ("zq 1", "zq 2")]:
        assert metric(answer, [reference]) == whole(answer, [reference]) > 0


def test_unknown_pieces_equal_nothing() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog ran"] * 20),
        model_writer=model,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    metric = rouge_l(token_pieces(XGLMTokenizer(model.getvalue())))
    assert metric("東", ["京"]) == 0.0
    assert metric("the cat", ["the cat"]) == 1.0


def test_baselines_of_blind_answers() -> None:
    metric = exact_match()
    references = [["a"], ["a"], ["b"], ["b"], ["a"]]
    owners = ["one", "one", "two", "three", "four"]
    # strangers of one: b b a; of two: b a a; of three: a a b; of four: a b b; the first one has two versions
    assert random_answer_baseline(metric, references, owners) == pytest.approx((1 + 1 + 1 + 1 + 1) / 15)
    assert random_answer_baseline(metric, references[:2], owners[:2]) is None
    assert constant_answer_baseline(metric, references) == 3 / 5
