"""Readers of the multilingual sets, and of those on bias and hate speech."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe.evaluation.datasets.files import Record, Row, comma_separated, json_lines, open_text, tab_separated

XCOPA_LANGUAGES = ("et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh")
XWINOGRAD_LANGUAGES = ("en", "fr", "jp", "pt", "ru", "zh")
MGSM_LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
XNLI_LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
PAWSX_LANGUAGES = ("de", "en", "es", "fr", "ja", "ko", "zh")
XSTORY_CLOZE_LANGUAGES = ("ar", "en", "es", "eu", "hi", "id", "my", "ru", "sw", "te", "zh")
HATECHECK_LANGUAGES = (
    *("arabic", "dutch", "french", "german", "hindi"),
    *("italian", "mandarin", "polish", "portuguese", "spanish"),
)


def xcopa(path: Path, subset: str) -> Iterator[Row]:
    """XCOPA as published."""
    for record in json_lines(path):
        yield {
            **{name: record.text(name) for name in ("premise", "choice1", "choice2")},
            "question": record.one_of("question", {"cause": "cause", "effect": "effect"}),
            "label": record.choice("label", 2),
            "idx": record.number("idx"),
            "changed": record.one_of("changed", {True: True, False: False}),
        }


_XWINOGRAD_COLUMNS = ("language", "type", "source", "sentence", "tokens", "pronoun", "candidates")


def xwinograd(path: Path, subset: str) -> Iterator[Row]:
    """One language of the file of all, with the pronoun replaced by a blank. Raises ValueError for Chinese."""
    if subset == "zh":
        raise ValueError(
            f"{path} holds other Chinese schemas (16) than the Hub, whose are from CLUEWSC 2020: put the Hub's at "
            f" Muennighoff/xwinograd/zh/test.jsonl"
        )
    for record in tab_separated(path, _XWINOGRAD_COLUMNS):
        if record.text("language") != subset:
            continue
        sentence = record.text("sentence")
        start, end = _span(sentence, _parsed(record, "tokens"), _parsed(record, "pronoun")[1], record.where)
        blanked = f"{sentence[:start]}_{sentence[end:]}"
        candidates = _parsed(record, "candidates")
        right = [index for index, candidate in enumerate(candidates) if candidate[3]]
        if blanked.count("_") != 1 or len(candidates) != 2 or len(right) != 1:
            raise ValueError(
                f"{record.where} has {blanked.count('_')} blanks, {len(candidates)} candidates and {len(right)} right "
                f"ones; it must have 1, 2 and 1"
            )
        options = {"option1": candidates[0][0], "option2": candidates[1][0]}
        yield {"sentence": blanked, **options, "answer": str(right[0] + 1)}


def _parsed(record: Record, name: str) -> Any:
    try:
        return json.loads(record.text(name))
    except json.JSONDecodeError as error:
        raise ValueError(f"{record.where}: the column {name!r} is not JSON: {error}") from error


def _span(sentence: str, tokens: list[str], span: list[int], where: str) -> tuple[int, int]:
    """Start and end, in characters, of tokens[span[0]:span[1]] in `sentence`."""
    position = start = 0
    for index, token in enumerate(tokens[: span[1]]):
        # the Penn Treebank tokeniser spells opening and closing quotation marks in its own way
        spellings = (token, '"') if token in ("``", "''") else (token,)
        found = [(sentence.find(each, position), len(each)) for each in spellings if each in sentence[position:]]
        if not found:
            raise ValueError(f"{where}: the token {token!r} must be in {sentence!r} from character {position} on")
        begin, length = min(found)
        if index == span[0]:
            start = begin
        position = begin + length
    return start, position


_ENTAILMENT = {"entailment": 0, "neutral": 1, "contradiction": 2}


def xnli(path: Path, subset: str) -> Iterator[Row]:
    """One language of XNLI as published, from a file that holds all."""
    for record in tab_separated(path):
        if record.text("language") == subset:
            texts = {"premise": record.text("sentence1"), "hypothesis": record.text("sentence2")}
            yield {**texts, "label": record.one_of("gold_label", _ENTAILMENT)}


def pawsx(path: Path, subset: str) -> Iterator[Row]:
    """PAWS-X as published."""
    for record in tab_separated(path):
        texts = {name: record.text(name) for name in ("sentence1", "sentence2")}
        yield {"id": record.number("id"), **texts, "label": record.choice("label", 2)}


def mgsm(path: Path, subset: str) -> Iterator[Row]:
    """MGSM's problems as published: question and number."""
    for record in tab_separated(path, ("question", "answer")):
        answer = Record({"answer": record.text("answer").replace(",", "")}, record.where).number("answer")
        yield {"question": record.text("question"), "answer": None, "answer_number": answer, "equation_solution": None}


def mgsm_exemplars(path: Path, subset: str) -> Iterator[Row]:
    """MGSM's eight exemplars with their chains of thought, from one JSON file for all languages."""
    with open_text(path) as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    top = Record(content, str(path))
    numbers = top.get("EXEMPLAR_NUMBER_ANSWERS")
    solutions = top.get("EXEMPLAR_EQUATION_SOLUTIONS")
    exemplars = Record(top.get("MGSM_EXEMPLARS"), f"{path} MGSM_EXEMPLARS").get(subset)
    if not len(numbers) == len(solutions) == len(exemplars):
        raise ValueError(
            f"{path} must hold as many exemplars ({len(exemplars)}) as numbers ({len(numbers)}) and solutions "
            f"({len(solutions)})"
        )
    for number, solution, (key, exemplar) in zip(numbers, solutions, exemplars.items(), strict=True):
        record = Record(exemplar, f"{path} {subset} {key}")
        texts = {"question": record.text("q"), "answer": record.text("a")}
        yield {**texts, "answer_number": int(number), "equation_solution": solution}


_BIAS_TYPES = (
    *("race-color", "socioeconomic", "gender", "disability", "nationality", "sexual-orientation"),
    *("physical-appearance", "religion", "age"),
)


def crows_pairs(path: Path, subset: str) -> Iterator[Row]:
    """CrowS-Pairs (2020) as published. `sent_more` is the more stereotypical sentence."""
    for record in comma_separated(path):
        yield {
            "id": record.number(""),  # the file's first column has no name
            "sent_more": record.text("sent_more"),
            "sent_less": record.text("sent_less"),
            "stereo_antistereo": record.one_of("stereo_antistereo", {name: name for name in ("stereo", "antistereo")}),
            "bias_type": record.one_of("bias_type", {name: name for name in _BIAS_TYPES}),
        }


def hatecheck(path: Path, subset: str) -> Iterator[Row]:
    """One language of Multilingual HateCheck as published; numbers and booleans are typed as on the Hub."""
    labels = {name: name for name in ("hateful", "non-hateful")}
    truth = {"True": True, "False": False}
    for record in comma_separated(path):
        row = {name: value or None for name, value in record.fields.items()}
        row |= {name: record.one_of(name, labels) for name in ("label_gold", "label_annotated_maj")}
        row |= {name: record.one_of(name, truth) for name in ("disagreement_in_case", "disagreement_in_template")}
        texts = {name: record.text(name) for name in ("mhc_case_id", "functionality", "test_case")}
        yield {**row, **texts}
