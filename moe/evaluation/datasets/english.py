"""Readers of the English sets: each takes a file and yields rows with the Hub's columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe.evaluation.datasets.files import Record, Row, existing, json_lines, lines, tab_separated

_LETTERS = "ABCDEFGH"
_BLIMP_FLAGS = ("simple_LM_method", "one_prefix_method", "two_prefix_method")


def blimp(path: Path, subset: str) -> Iterator[Row]:
    """One paradigm, from its own file or the file of all. `lexically_identical` is included if the file has it."""
    others: set[str] = set()
    found = False
    for record in json_lines(path):
        if record.text("UID") != subset:
            others.add(record.text("UID"))
            continue
        found = True
        row = {
            name: record.text(name) for name in ("sentence_good", "sentence_bad", "field", "linguistics_term", "UID")
        }
        row |= {name: record.get(name) for name in _BLIMP_FLAGS}
        if "lexically_identical" in record.fields:
            row["lexically_identical"] = record.get("lexically_identical")
        yield {**row, "pair_id": record.number("pairID")}
    if not found:
        raise ValueError(f"{path} has no paradigm {subset!r}; it has {', '.join(sorted(others)) or 'none'}")


def lambada(path: Path, subset: str) -> Iterator[Row]:
    """Passages, one per line."""
    for _, line in lines(path):
        yield {"text": line, "domain": None}


def lambada_openai(path: Path, subset: str) -> Iterator[Row]:
    """Passages as the GPT-2 evaluation used them."""
    for record in json_lines(path):
        yield {"text": record.text("text")}


def copa(path: Path, subset: str) -> Iterator[Row]:
    """COPA in SuperGLUE's form; a mirror's `id` becomes `idx`."""
    for record in json_lines(path):
        yield {
            **{name: record.text(name) for name in ("premise", "choice1", "choice2")},
            "question": record.one_of("question", {"cause": "cause", "effect": "effect"}),
            "idx": record.number("idx" if "idx" in record.fields else "id"),
            "label": record.choice("label", 2) if "label" in record.fields else -1,
        }


def balanced_copa(path: Path, subset: str) -> Iterator[Row]:
    """COPA's development items; `mirrored` marks the added twins, whose correct choice is the original's wrong one."""
    for record in json_lines(path):
        row = {name: record.text(name) for name in ("premise", "choice1", "choice2", "question")}
        mirrored = record.one_of("mirrored", {True: True, False: False})
        yield {"id": record.number("id"), **row, "label": record.choice("label", 2), "mirrored": mirrored}


def boolq(path: Path, subset: str) -> Iterator[Row]:
    """BoolQ in SuperGLUE's form: passage, question, label 1 for yes."""
    truth = {True: 1, False: 0, "True": 1, "False": 0}
    for record in json_lines(path):
        yield {
            "question": record.text("question"),
            "passage": record.text("passage"),
            "idx": record.number("idx" if "idx" in record.fields else "id"),
            "label": record.one_of("label", truth) if "label" in record.fields else -1,
        }


_ENTAILMENT = {"entailment": 0, "neutral": 1, "contradiction": 2}


def multinli(path: Path, subset: str) -> Iterator[Row]:
    """MultiNLI 1.0 as published; pairs without a majority ("-") are left out, as GLUE does."""
    index = 0
    for record in json_lines(path):
        if record.get("gold_label") == "-":
            continue
        label = record.one_of("gold_label", _ENTAILMENT)
        yield {
            "premise": record.text("sentence1"),
            "hypothesis": record.text("sentence2"),
            "label": label,
            "idx": index,
        }
        index += 1


def mnli_sample(path: Path, subset: str) -> Iterator[Row]:
    """A mirror's sample of MultiNLI; pairs without a majority are left out."""
    for record in json_lines(path):
        if record.get("label") == "-":
            continue
        row = {name: record.text(name) for name in ("premise", "hypothesis")}
        yield {**row, "label": record.one_of("label", _ENTAILMENT), "idx": record.number("id")}


def piqa(path: Path, subset: str) -> Iterator[Row]:
    """PIQA as published: goals and solutions in X.jsonl, labels in X-labels.lst beside it."""
    stem = path.name.split(".")[0]
    labels_path = existing(path.with_name(f"{stem}-labels.lst"))
    if labels_path is None:
        raise ValueError(f"{path} lacks its labels: put {stem}-labels.lst beside it")
    labels = [Record({"label": line}, f"{labels_path} line {number}") for number, line in lines(labels_path)]
    records = list(json_lines(path))
    if len(labels) != len(records):
        raise ValueError(f"{path} has {len(records)} lines and {labels_path} {len(labels)}; both must have as many")
    for record, label in zip(records, labels, strict=True):
        yield {**{name: record.text(name) for name in ("goal", "sol1", "sol2")}, "label": label.choice("label", 2)}


def piqa_mirror(path: Path, subset: str) -> Iterator[Row]:
    for question, choices, label, _ in _multiple_choice(path):
        if len(choices) != 2:
            raise ValueError(f"{path} has {len(choices)} solutions of {question!r}; it must have 2")
        yield {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": label}


def arc(path: Path, subset: str) -> Iterator[Row]:
    """ARC as published."""
    for record in json_lines(path):
        yield {"id": record.text("id"), **_stem_and_choices(record, "question"), "answerKey": _key(record)}


def arc_mirror(path: Path, subset: str) -> Iterator[Row]:
    for question, choices, label, number in _multiple_choice(path):
        yield {"id": str(number), "question": question, "choices": _lettered(choices), "answerKey": _LETTERS[label]}


def openbookqa(path: Path, subset: str) -> Iterator[Row]:
    """OpenBookQA as published."""
    for record in json_lines(path):
        yield {"id": record.text("id"), **_stem_and_choices(record, "question_stem"), "answerKey": _key(record)}


def openbookqa_mirror(path: Path, subset: str) -> Iterator[Row]:
    for question, choices, label, number in _multiple_choice(path):
        answer = {"choices": _lettered(choices), "answerKey": _LETTERS[label]}
        yield {"id": str(number), "question_stem": question, **answer}


def winogrande(path: Path, subset: str) -> Iterator[Row]:
    """WinoGrande as published."""
    for record in json_lines(path):
        row = {name: record.text(name) for name in ("sentence", "option1", "option2")}
        _require_blank(row["sentence"], record.where)
        answer = record.one_of("answer", {"1": "1", "2": "2", "": ""}) if "answer" in record.fields else ""
        yield {**row, "answer": answer}


def winogrande_mirror(path: Path, subset: str) -> Iterator[Row]:
    for question, choices, label, number in _multiple_choice(path):
        _require_blank(question, f"{path} item {number}")
        if len(choices) != 2:
            raise ValueError(f"{path} item {number} has {len(choices)} options; it must have 2")
        yield {"sentence": question, "option1": choices[0], "option2": choices[1], "answer": str(label + 1)}


def hellaswag(path: Path, subset: str) -> Iterator[Row]:
    """HellaSwag as published; the label is a digit string, as on the Hub, and empty where it is withheld."""
    for record in json_lines(path):
        endings = record.choices("endings")
        label = str(record.choice("label", len(endings))) if "label" in record.fields else ""
        names = ("activity_label", "ctx_a", "ctx_b", "ctx", "source_id", "split", "split_type")
        row = {name: record.text(name) for name in names}
        yield {"ind": record.number("ind"), **row, "endings": endings, "label": label}


def winogender(path: Path, subset: str) -> Iterator[Row]:
    """Winogender's sentences; occupation, participant, referent and gender are parsed from their ids."""
    pronouns = {"male": ("he", "his", "him"), "female": ("she", "her"), "neutral": ("they", "their", "them")}
    for record in tab_separated(path):
        parts = record.text("sentid").split(".")
        if len(parts) != 5 or parts[3] not in pronouns or parts[2] not in ("0", "1"):
            raise ValueError(
                f"{record.where}: sentid {record.text('sentid')!r} must be OCCUPATION.PARTICIPANT.0|1.GENDER.txt"
            )
        occupation, participant, label, gender, _ = parts
        words = record.text("sentence").lower().replace(".", " ").replace(",", " ").split()
        found = [word for word in words if word in pronouns[gender]]
        if not found:
            raise ValueError(f"{record.where} has no {gender} pronoun in {record.text('sentence')!r}")
        yield {
            "sentid": record.text("sentid"),
            "sentence": record.text("sentence"),
            "pronoun": found[0],
            "occupation": occupation,
            "participant": participant,
            "gender": gender,
            "target": (occupation, participant)[int(label)],
            "label": int(label),
        }


def _multiple_choice(path: Path) -> Iterator[tuple[str, list[str], int, int]]:
    """question, choices, label and number, from a mirror that stores all its sets in the same form."""
    for record in json_lines(path):
        choices = record.choices("choices")
        yield record.text("question"), choices, record.choice("label", len(choices)), record.number("id")


def _lettered(choices: list[str]) -> dict[str, list[str]]:
    return {"text": choices, "label": list(_LETTERS[: len(choices)])}


def _stem_and_choices(record: Record, name: str) -> Row:
    question = record.get("question")
    if not isinstance(question, dict):
        raise ValueError(f"{record.where}: the field 'question' ({question!r}) must be an object with a stem")
    inner = Record(question, record.where)
    choices = inner.get("choices")
    if not isinstance(choices, list) or not all(isinstance(each, dict) for each in choices):
        raise ValueError(f"{record.where}: the field 'choices' ({choices!r}) must be a list of objects")
    each = [Record(choice, record.where) for choice in choices]
    labels = {"text": [one.text("text") for one in each], "label": [one.text("label") for one in each]}
    if record.text("answerKey").strip() not in labels["label"]:
        raise ValueError(f"{record.where}: answerKey {record.text('answerKey')!r} must be one of {labels['label']}")
    return {name: inner.text("stem"), "choices": labels}


def _key(record: Record) -> str:
    return record.text("answerKey")


def _require_blank(sentence: str, where: str) -> None:
    if sentence.count("_") != 1:
        raise ValueError(f"{where}: {sentence!r} has {sentence.count('_')} blanks (_); it must have 1")
