"""Prompts of the English tasks (Artetxe et al. 2021): a row with the Hub's columns -> Item.

The paper's prompts are as its authors ran them. `blimp`, `lambada` and `mnli` are not among them: the first two have no
prompt at all, the last takes XNLI's (moe.evaluation.protocols.multilingual).
"""

from __future__ import annotations

import re

from moe.evaluation.protocols.items import MASK, Item, Row, columns, index, text, texts


def hellaswag(row: Row) -> Item:
    label, first, second = texts(row, "activity_label", "ctx_a", "ctx_b")
    endings, gold = columns(row, "endings", "label")
    context = f"{label}: {first} {second[:1].upper()}{second[1:]} {MASK}"
    candidates = tuple(_one_space(text(ending, "endings")) for ending in endings)
    return Item(_one_space(context), candidates, (index(gold, range(len(endings)), "label"),))


def piqa(row: Row) -> Item:
    goal, *solutions = texts(row, "goal", "sol1", "sol2")
    return Item(f"{goal} {MASK}", tuple(solutions), (index(columns(row, "label")[0], (0, 1), "label"),))


def story_cloze(row: Row) -> Item:
    """StoryCloze and XStoryCloze: four sentences and two endings."""
    sentences = texts(row, *(f"input_sentence_{i}" for i in range(1, 5)))
    endings = texts(row, "sentence_quiz1", "sentence_quiz2")
    gold = index(columns(row, "answer_right_ending")[0], (1, 2), "answer_right_ending")
    return Item(" ".join([*sentences, MASK]), tuple(endings), (gold,))


def winograd(row: Row) -> Item:
    """Winogrande and XWinograd: the sentence's `_` stands for one of two names. Its own spacing is kept."""
    sentence, *options = texts(row, "sentence", "option1", "option2")
    if sentence.count("_") != 1:
        raise ValueError(f"has {sentence.count('_')} gaps (_) in its sentence, which must have 1: {sentence!r}")
    gold = index(columns(row, "answer")[0], (1, 2), "answer")
    return Item(sentence.replace("_", MASK), tuple(options), (gold,))


def openbookqa(row: Row) -> Item:
    (stem,) = texts(row, "question_stem")
    choices, gold = _lettered(row)
    return Item(f"{stem} {MASK}", tuple(_full_stop(choice.strip()) for choice in choices), (gold,))


def record(row: Row) -> Item:
    """ReCoRD. The Hub lists each entity once, the original file every mention; equal texts get equal scores."""
    passage, query = texts(row, "passage", "query")
    entities, answers = columns(row, "entities", "answers")
    if query.count("@placeholder") != 1:
        raise ValueError(f"has {query.count('@placeholder')} @placeholder in its query, which must have 1: {query!r}")
    gold = tuple(i for i, entity in enumerate(entities) if entity in answers)
    if not gold:
        raise ValueError(f"has none of its answers ({', '.join(answers)}) among its entities")
    template = f"{passage.replace('@highlight', '')} {query.replace('@placeholder', MASK)}"
    return Item(template, tuple(text(entity, "entities") for entity in entities), gold)


def arc(row: Row) -> Item:
    (stem,) = texts(row, "question")
    choices, gold = _lettered(row)
    return Item(f"{stem} {MASK}", tuple(_statement(stem, choice) for choice in choices), (gold,))


def calibrated_arc(row: Row) -> Item:
    """ARC, minus the score a candidate gets without a question."""
    return arc(row)._replace(calibration=(MASK,))


def boolq(row: Row) -> Item:
    passage, question = texts(row, "passage", "question")
    # capitalize() lower-cases the rest, names included, as in the authors' prompts
    template = f"Paragraph: {passage} Question: {question.rstrip('?').capitalize()}? Answer: {MASK}"
    return Item(template, ("False", "True"), (index(columns(row, "label")[0], (0, 1), "label"),))


def copa(row: Row) -> Item:
    premise, *choices = texts(row, "premise", "choice1", "choice2")
    question, label = columns(row, "question", "label")
    connective = ("because", "so")[index(question, ("cause", "effect"), "question")]
    template = f"{premise.strip().removesuffix('.')} {connective} {MASK}"
    return Item(template, tuple(_lower_first_word(choice) for choice in choices), (index(label, (0, 1), "label"),))


def blimp(row: Row) -> Item:
    """Two bare sentences; the grammatical one must be likelier."""
    good, bad = texts(row, "sentence_good", "sentence_bad")
    groups = tuple(f"{name}={row[name]}" for name in ("field", "UID") if row.get(name))
    return Item(MASK, (good, bad), (0,), groups)


def lambada(row: Row) -> Item:
    """The last word of a passage, correct if each of its tokens is the likeliest."""
    (passage,) = texts(row, "text")
    before, space, word = passage.rstrip().rpartition(" ")
    if not before.strip():
        raise ValueError(f"has fewer than two words: {passage!r}")
    return Item(f"{before}{space}{MASK}", (word,), (0,))


def _lettered(row: Row) -> tuple[list[str], int]:
    """The texts of `choices` and the index of `answerKey`."""
    choices, key = columns(row, "choices", "answerKey")
    options, labels = columns(choices, "text", "label")
    return [text(option, "choices.text") for option in options], index(key, labels, "answerKey")


def _statement(stem: str, choice: str) -> str:
    start = "It is " if stem.rstrip().endswith("?") else ""
    return _full_stop(start + choice.strip().lower())


def _full_stop(sentence: str) -> str:
    return sentence if sentence.endswith(".") else f"{sentence}."


def _one_space(passage: str) -> str:
    return re.sub(r"\s+", " ", passage).strip()


def _lower_first_word(sentence: str) -> str:
    word, space, rest = sentence.strip().partition(" ")
    first = word if word == "I" or word.startswith("I'") else word.lower()
    return f"{first}{space}{rest}"
