"""The sample a joint vocabulary is trained on, and how well it fits each domain."""

from __future__ import annotations

import pytest

from moe.data.tokenizer import train_tokenizer
from moe.data.vocabulary_report import VocabularyReport, table
from moe.data.vocabulary_sample import BalancedSample

ENGLISH = "the cat sat on the mat "


def sample_bytes(sizes: dict[str, int], alpha: float, budget: int) -> dict[str, int]:
    sample = BalancedSample(budget, alpha)
    for name, count in sizes.items():
        for number in range(count):
            sample.add(name, f"{name}{number:08d}", 10)
    texts = sample.texts()
    return {name: sum(len(text) for text in texts if text.startswith(name)) for name in sizes}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_each_domain_has_its_share_of_bytes(alpha: float) -> None:
    """share ~ bytes ** alpha; what is scarce is repeated, what is plenty thinned out."""
    sizes = {"en": 5000, "de": 500, "sw": 50}
    powers = {name: (10 * count) ** alpha for name, count in sizes.items()}
    for budget in (20_000, 10**6):
        total = min(budget, 55_500)
        found = sample_bytes(sizes, alpha, budget)
        for name, power in powers.items():
            assert found[name] == pytest.approx(total * power / sum(powers.values()), abs=10)


def test_scarce_text_is_repeated_whole_and_the_rest_spread_evenly() -> None:
    sample = BalancedSample(1000, 0.0)
    for number in range(100):
        sample.add("en", f"e{number:09d}", 10)
    for number in range(20):
        sample.add("sw", f"s{number:09d}", 10)
    texts = sample.texts()
    swahili = [text for text in texts if text[0] == "s"]
    assert {swahili.count(text) for text in swahili} == {2, 3}
    english = [int(text[1:]) for text in texts if text[0] == "e"]
    assert len(set(english)) == len(english) == 50
    assert english[0] < 4
    assert english[-1] > 95


def test_coverage_and_fertility() -> None:
    tokenizer = train_tokenizer([ENGLISH * 50], 290)
    report = VocabularyReport(tokenizer)
    for domain, text in (("en", ENGLISH), ("en", "a hat"), ("mixed", "the жж cat漢")):
        report.add(domain, text, len(tokenizer.encode(text)))
    figures = report.figures()
    english, mixed = figures["en"], figures["mixed"]
    assert (english["words"], english["characters"]) == (8, len(ENGLISH) + 5)
    assert english["coverage"] == 1.0
    assert english["tokens_per_word"] == english["tokens"] / 8
    assert mixed["bytes"] == 4 + 4 + 1 + 3 + 3
    assert mixed["coverage"] == pytest.approx(8 / 11)  # two of one missing letter and one of another
    assert mixed["bytes_per_token"] == 15 / mixed["tokens"]
    assert [line.split()[0] for line in table(figures).splitlines()] == ["domain", "en", "mixed"]
