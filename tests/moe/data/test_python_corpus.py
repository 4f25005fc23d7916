"""The default corpus on the Python that runs the tests."""

from __future__ import annotations

import ast

import pytest

from moe.data import python_corpus
from moe.data.documents import Document, split_of


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(python_corpus.read())


def test_there_is_enough_real_text_in_both_domains(documents: list[Document]) -> None:
    size = {domain: sum(len(d.text) for d in documents if d.domain == domain) for domain in ("docs", "code")}
    assert {d.domain for d in documents} == {"docs", "code"}
    assert size["docs"] > 2_000_000
    assert size["code"] > 6_000_000


def test_reading_twice_gives_the_same(documents: list[Document]) -> None:
    assert list(python_corpus.read()) == documents


def test_code_is_python_without_docstrings(documents: list[Document]) -> None:
    code = [d.text for d in documents if d.domain == "code"]
    leftover = 0
    for text in code:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                leftover += len(ast.get_docstring(node) or "")
    # `def f(): "doc"` on one line stays
    assert leftover < 0.001 * sum(map(len, code))


def test_docstrings_are_cut_without_touching_the_rest() -> None:
    source = (
        '"""Module."""\nimport os\n\n\ndef f():\n    """Only a docstring."""\n\n\n'
        'class A:\n    """Doc\n    on two lines."""\n    x = 1\n\n\n'
        'def g(): "one line"\n\x0cy = "not a docstring"\n'
    )
    cut = python_corpus._without_docstrings(source, ast.parse(source))
    assert cut.strip("\n") == (
        'import os\n\n\ndef f():\n    pass\n\n\nclass A:\n    x = 1\n\n\ndef g(): "one line"\n\x0cy = "not a docstring"'
    )


def test_left_out_modules_and_tests_are_not_there(documents: list[Document]) -> None:
    groups = {d.group for d in documents}
    assert not groups & {"pydoc_data", "encodings", "lib2to3", "test", "site-packages"}
    assert {"json", "argparse", "topic formatstrings", "datetime"} <= groups


def grams(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


def test_held_out_text_is_not_training_text(documents: list[Document]) -> None:
    """At most 1% of the 13-grams of words of a held-out split are in the training split."""
    shared: dict[str, set[tuple[str, ...]]] = {"train": set(), "validation": set(), "test": set()}
    for document in documents:
        shared[split_of(document.group, 0.05, 0.05)] |= grams(document.text)
    for split in ("validation", "test"):
        assert len(shared[split]) > 10_000
        assert len(shared[split] & shared["train"]) <= 0.01 * len(shared[split])


def test_a_copied_paragraph_is_left_out_and_a_short_one_kept() -> None:
    seen: set[str] = set()
    long = "A paragraph of more than sixty characters that two modules share word for word."
    assert python_corpus._unseen_paragraphs(f"first\n\n{long}", seen) == f"first\n\n{long}"
    assert python_corpus._unseen_paragraphs(f"first\n\nother\n\n{long.replace(' ', '  ', 1)}", seen) == "first\n\nother"
    assert python_corpus._unseen_paragraphs(long, seen) == ""
