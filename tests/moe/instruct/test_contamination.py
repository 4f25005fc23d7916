from __future__ import annotations

import random

import pytest

from moe.instruct.contamination import NGRAM, OverlapFilter
from moe.instruct.records import Record
from tests.moe.instruct.conftest import record

WORDS = [f"w{i}" for i in range(4000)]


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length))


def brute(train: list[Record], evaluation: list[Record]) -> float:
    """Sets of tuples of words: the definition, word for word."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}

    known = {gram for item in train for text in (item.instruction, item.input, *item.targets) for gram in grams(text)}
    hit = {item.example for item in evaluation if any(grams(text) & known for text in (item.body, *item.targets))}
    return len(hit) / len({item.example for item in evaluation})


@pytest.mark.parametrize("seed", range(3))
def test_shares_are_those_of_sets_of_tuples(seed: int) -> None:
    rng = random.Random(seed)
    train = [record(sentence(rng, rng.randint(5, 60)), sentence(rng, 15)) for _ in range(700)]
    evaluation = []
    for number in range(200):
        text = sentence(rng, rng.randint(5, 40))
        if number % 4 == 0:  # a piece of a training text, around the 13 words at which it begins to count
            words = rng.choice(train).input.split()
            start, length = rng.randint(0, 20), rng.randint(NGRAM - 2, NGRAM + 2)
            text += " " + " ".join(words[start : start + length])
        evaluation.append(record(text, example=str(number)))
    pairs = OverlapFilter([("test/e", evaluation)]).overlaps("t", train)
    assert 0.02 < pairs[0].share < 0.25
    assert pairs[0].share == brute(train, evaluation)
    assert pairs[0].words in " ".join(item.input for item in train)


def test_twelve_words_are_none_and_thirteen_are_one() -> None:
    text = " ".join(WORDS[:30])
    filter_ = OverlapFilter([("test/e", [record(text, example="0")])])
    assert filter_.overlaps("t", [record("before " + " ".join(WORDS[4:16]) + " after")]) == []
    assert filter_.overlaps("t", [record("before " + " ".join(WORDS[4:17]).upper() + ", after")])[0].share == 1.0


def test_rows_do_not_reach_from_one_text_into_the_next() -> None:
    half = " ".join(WORDS[:7]), " ".join(WORDS[7:14])
    filter_ = OverlapFilter([("test/e", [record(" ".join(WORDS[:14]), example="0")])])
    assert filter_.overlaps("t", [record(half[0], half[1])]) == []
    assert filter_.overlaps("t", [record(half[0], "x"), record(half[1], "x")]) == []


def test_every_pair_is_seen_apart() -> None:
    rng = random.Random(1)
    texts = {name: [sentence(rng, 30) for _ in range(20)] for name in "abc"}
    evaluation = {name: [record(text, example=str(i)) for i, text in enumerate(lines)] for name, lines in texts.items()}
    filter_ = OverlapFilter((f"test/{name}", records) for name, records in evaluation.items())
    mixed = [record(text) for text in (*texts["a"][:10], *texts["c"][:5])]
    found = [(pair.evaluation, pair.examples, pair.of) for pair in filter_.overlaps("t", mixed)]
    assert found == [("test/a", 10, 20), ("test/c", 5, 20)]
    assert filter_.overlaps("none", [record(sentence(rng, 30))]) == []


def test_words_of_a_template_are_not_data() -> None:
    rng = random.Random(2)
    template = "Pick the one option that answers the question below in the best way there is : {} Options :"
    make = lambda text, i: record(  # noqa: E731
        style="instance", instruction=template.format(text), text="", template="t", example=str(i)
    )
    evaluation = [make(sentence(rng, 20), i) for i in range(40)]
    filter_ = OverlapFilter([("test/e", evaluation)])
    assert filter_.overlaps("t", [make(sentence(rng, 20), i) for i in range(40)]) == []
    leak = filter_.overlaps("t", [make(sentence(rng, 20), 0), evaluation[3]._replace(task="bench/other")])
    assert [pair.examples for pair in leak] == [1]
    assert filter_.coverage["test/e"].wording > 10


def test_examples_that_cannot_overlap_are_counted() -> None:
    records = [record(" ".join(WORDS[:n]), example=str(n)) for n in (5, 12, 13, 20)]
    coverage = OverlapFilter([("test/e", records)]).coverage["test/e"]
    assert (coverage.examples, coverage.too_short) == (4, 2)


def test_prompted_versions_of_one_example_count_once() -> None:
    versions = [
        record(style="instance", instruction=f"{i} {' '.join(WORDS[:20])}", text="", template=str(i), example="same")
        for i in range(5)
    ]
    pair = OverlapFilter([("test/e", versions)]).overlaps("t", [record(" ".join(WORDS[:20]))])[0]
    assert (pair.examples, pair.of) == (1, 1)
