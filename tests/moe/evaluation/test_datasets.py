"""Readers give the Hub's columns, from the published files and from mirrors, and say where a file is wrong."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moe.evaluation.datasets import TABLE, SplitNotFoundError, find, listed_ids, read, splits_of
from tests.shared_data import shared_data

XCOPA_ROW = {"premise": "Mees.", "choice1": "A.", "choice2": "B.", "question": "cause", "label": 1, "idx": 0}
XCOPA_ROW |= {"changed": False}
# (id, subset, split): rows in the published set, and the answer of the first
COUNTS: dict[tuple[str, str | None, str], tuple[int, dict[str, Any]]] = {
    ("nyu-mll/blimp", "adjunct_island", "train"): (1000, {"UID": "adjunct_island"}),
    ("cimec/lambada", None, "validation"): (4869, {}),
    ("aps/super_glue", "copa", "train"): (400, {}),
    ("aps/super_glue", "copa", "validation"): (100, {"label": 1, "question": "effect"}),
    ("pkavumba/balanced-copa", None, "train"): (500, {"label": 0}),
    ("aps/super_glue", "boolq", "validation"): (3270, {"label": 0}),
    ("nyu-mll/glue", "mnli", "validation_matched"): (7469, {"label": 1}),
    ("baber/piqa", None, "validation"): (1838, {"label": 0}),
    ("allenai/ai2_arc", "ARC-Easy", "test"): (2376, {"answerKey": "A"}),
    ("allenai/ai2_arc", "ARC-Challenge", "test"): (1172, {"answerKey": "C"}),
    ("allenai/openbookqa", "main", "test"): (500, {"answerKey": "B"}),
    ("allenai/winogrande", "winogrande_xl", "validation"): (1267, {"answer": "2"}),
    ("cambridgeltl/xcopa", "et", "test"): (500, {"label": 0}),
    ("cambridgeltl/xcopa", "qu", "validation"): (100, {}),
    ("Muennighoff/xwinograd", "en", "test"): (2325, {"answer": "1", "option2": "the demonstrators"}),
    ("Muennighoff/xwinograd", "fr", "test"): (83, {}),
    ("Muennighoff/xwinograd", "jp", "test"): (959, {"sentence": "狙撃兵はテロリストを撃った。_は悪漢だったからだ。"}),
    ("Muennighoff/xwinograd", "pt", "test"): (263, {}),
    ("Muennighoff/xwinograd", "ru", "test"): (315, {}),
    ("juletxara/mgsm", "de", "test"): (250, {"answer_number": 18, "answer": None}),
    ("juletxara/mgsm", "de", "train"): (8, {"answer_number": 11}),
    ("jannalu/crows_pairs_multilingual", "english", "test"): (1508, {"bias_type": "race-color"}),
    ("oskarvanderwal/winogender", "all", "test"): (720, {"target": "customer", "label": 1, "pronoun": "he"}),
    ("Paul/hatecheck-german", None, "test"): (3645, {"label_gold": "hateful", "test_case": "Ich hasse Frauen."}),
}


def write_lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("where", "expected"), COUNTS.items(), ids=lambda value: "/".join(map(str, value)))
def test_real_files_have_the_columns_of_the_hub(where: Any, expected: tuple[int, dict[str, Any]]) -> None:
    rows = read(*where, shared_data(""))
    count, first = expected
    columns = set(TABLE.get(where[:2], TABLE["nyu-mll/blimp", "*"]).columns)
    assert len(rows) == count
    assert all(columns <= row.keys() for row in rows)
    assert first.items() <= rows[0].items()


def test_the_answers_of_mirrors_are_those_of_the_published_files() -> None:
    """PIQA lies there in both forms, and COPA's 500 questions are SuperGLUE's 400 and 100."""
    folder = shared_data("")
    published = read("baber/piqa", None, "validation", folder)
    (mirror,) = (file for file in TABLE["baber/piqa", None].splits["validation"] if file.note is not None)
    again = list(mirror.read(folder / f"{mirror.path}.gz", ""))
    answers = [[(row["goal"].strip(), row["label"]) for row in rows] for rows in (published, again)]
    assert sum(a == b for a, b in zip(*answers, strict=True)) > 0.99 * len(published)
    parts = [row for split in ("train", "validation") for row in read("aps/super_glue", "copa", split, folder)]
    whole = read("pkavumba/balanced-copa", None, "train", folder)
    answers = [  # the two have their choices in another order, and a right answer is the same text
        Counter((row["premise"], row["question"], row[f"choice{row['label'] + 1}"]) for row in rows)
        for rows in (parts, whole)
    ]
    assert answers[0] == answers[1]


def test_every_blank_of_xwinograd_holds_a_pronoun() -> None:
    rows = read("Muennighoff/xwinograd", "en", "test", shared_data(""))
    assert {row["sentence"].count("_") for row in rows} == {1}
    assert Counter(row["answer"] for row in rows).keys() == {"1", "2"}
    assert 'Tom said "Check" to Ralph as he moved _ bishop.' in {row["sentence"] for row in rows}


def test_the_hubs_own_form_is_read_first(tmp_path: Path) -> None:
    write_lines(tmp_path / "xcopa/data/et/test.et.jsonl", XCOPA_ROW)
    assert find("cambridgeltl/xcopa", "et", "test", tmp_path).path.name == "test.et.jsonl"
    write_lines(tmp_path / "cambridgeltl/xcopa/et/test.jsonl", XCOPA_ROW | {"label": 0})
    assert read("cambridgeltl/xcopa", "et", "test", tmp_path)[0]["label"] == 0


def test_parquet_parts_of_the_hub(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the Hub's parquet files need pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "baber/piqa/plain_text"
    folder.mkdir(parents=True)
    for part, label in enumerate((1, 0)):
        row = {"goal": ["g"], "sol1": ["a"], "sol2": ["b"], "label": [label]}
        parquet.write_table(pyarrow.table(row), folder / f"validation-0000{part}-of-00002.parquet")
    assert [row["label"] for row in read("baber/piqa", None, "validation", tmp_path)] == [1, 0]


def test_published_forms_that_no_mirror_has(tmp_path: Path) -> None:
    choices = [{"text": "one", "label": "1"}, {"text": "two", "label": "2"}]
    arc = {"id": "Mercury_1", "question": {"stem": "Which?", "choices": choices}, "answerKey": "2"}
    write_lines(tmp_path / "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Dev.jsonl", arc)
    (row,) = read("allenai/ai2_arc", "ARC-Easy", "validation", tmp_path)
    assert row == {
        "id": "Mercury_1",
        "question": "Which?",
        "choices": {"text": ["one", "two"], "label": ["1", "2"]},
        "answerKey": "2",
    }
    pair = {"sentence1": "a", "sentence2": "b", "gold_label": "neutral"}
    write_lines(tmp_path / "multinli_1.0/multinli_1.0_dev_matched.jsonl", pair | {"gold_label": "-"}, pair)
    (row,) = read("nyu-mll/glue", "mnli", "validation_matched", tmp_path)
    assert row == {"premise": "a", "hypothesis": "b", "label": 1, "idx": 0}
    xnli = tmp_path / "XNLI-1.0/xnli.test.tsv"
    xnli.parent.mkdir()
    xnli.write_text("language\tgold_label\tsentence1\tsentence2\nsw\tcontradiction\tp\th\nde\tneutral\tq\ti\n")
    assert read("facebook/xnli", "de", "test", tmp_path) == [{"premise": "q", "hypothesis": "i", "label": 1}]
    boolq = {"question": "is it", "passage": "It is.", "idx": 7, "label": True}
    write_lines(tmp_path / "super_glue/BoolQ/val.jsonl", boolq)
    assert read("aps/super_glue", "boolq", "validation", tmp_path) == [boolq | {"label": 1}]


def test_lines_end_at_line_feeds_and_gzip_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lambada/lambada_test.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress('{"text": "a\u2028b c"}\n\n{"text": "d e"}\n'.encode()))
    assert [row["text"] for row in read("EleutherAI/lambada_openai", "default", "test", tmp_path)] == [
        "a\u2028b c",
        "d e",
    ]


WRONG_LINES: list[tuple[dict[str, Any] | str, str]] = [
    ({key: XCOPA_ROW[key] for key in XCOPA_ROW if key != "choice2"}, r"jsonl line 2 has no field 'choice2'; it has"),
    (XCOPA_ROW | {"label": 2}, r"line 2: the field 'label' \(2\) must name one of 2 choices"),
    (XCOPA_ROW | {"label": True}, r"line 2: the field 'label' \(True\) must be a whole number"),
    (XCOPA_ROW | {"question": "why"}, r"line 2: the field 'question' \('why'\) must be one of 'cause', 'effect'"),
    (XCOPA_ROW | {"premise": None}, r"line 2: the field 'premise' \(None\) must be text"),
    ("{broken", r"line 2 is not JSON"),
    ("[1]", r"line 2 holds a list; each line must be an object"),
]


@pytest.mark.parametrize(("line", "message"), WRONG_LINES, ids=lambda value: None if isinstance(value, dict) else value)
def test_a_wrong_line_is_named(tmp_path: Path, line: dict[str, Any] | str, message: str) -> None:
    path = write_lines(tmp_path / "xcopa/data/et/test.et.jsonl", XCOPA_ROW)
    with path.open("a") as file:
        file.write(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(ValueError, match=message):
        read("cambridgeltl/xcopa", "et", "test", tmp_path)


def test_a_file_of_the_hub_is_checked_too(tmp_path: Path) -> None:
    write_lines(tmp_path / "baber/piqa/validation.jsonl", {"goal": "g", "sol1": "a", "label": 0})
    with pytest.raises(ValueError, match=r"validation\.jsonl line 1 has no field 'sol2'"):
        read("baber/piqa", None, "validation", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "changed", "not gzip"])
def test_a_damaged_archive_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "xcopa/data/et/test.et.jsonl.gz"
    path.parent.mkdir(parents=True)
    whole = gzip.compress((json.dumps(XCOPA_ROW) + "\n").encode() * 500)
    content = {"truncated": whole[:-20], "changed": whole[:30] + b"\xff" * 4 + whole[34:], "not gzip": b"abc"}
    path.write_bytes(content[damage])
    with pytest.raises(ValueError, match=r"test\.et\.jsonl\.gz is damaged: .*; replace the file"):
        read("cambridgeltl/xcopa", "et", "test", tmp_path)


def test_labels_of_piqa_must_be_as_many(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "piqa/valid.jsonl", {"goal": "g", "sol1": "a", "sol2": "b"})
    with pytest.raises(ValueError, match=r"lacks its labels: put valid-labels\.lst beside it"):
        read("baber/piqa", None, "validation", tmp_path)
    path.with_name("valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(ValueError, match=r"has 1 lines and .*valid-labels\.lst 2; both must have as many"):
        read("baber/piqa", None, "validation", tmp_path)


def test_what_is_not_listed_is_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'squad' cannot be read from files.*allenai/openbookqa \(main\)"):
        read("squad", None, "validation", tmp_path)
    with pytest.raises(ValueError, match=r"xcopa has no subset 'xx' that can be read; it has: et, ht"):
        read("cambridgeltl/xcopa", "xx", "test", tmp_path)
    with pytest.raises(ValueError, match=r"has no split 'train'; it has: validation, test"):
        read("cambridgeltl/xcopa", "et", "train", tmp_path)
    with pytest.raises(SplitNotFoundError, match=r"looked for cambridgeltl/xcopa/et/test\.jsonl .*xcopa/data/et/test"):
        read("cambridgeltl/xcopa", "et", "test", tmp_path)
    with pytest.raises(ValueError, match=r"the data folder .* does not exist"):
        read("cambridgeltl/xcopa", "et", "test", tmp_path / "nowhere")
    assert splits_of("nyu-mll/blimp", "any_paradigm") == ("train",)
    assert len(listed_ids()) == len({hub_id for hub_id, _ in TABLE})


def test_what_a_mirror_cannot_restore_is_refused_or_said(tmp_path: Path) -> None:
    folder = shared_data("")
    with pytest.raises(ValueError, match=r"other Chinese schemas \(16\) than the Hub, whose are from CLUEWSC 2020"):
        read("Muennighoff/xwinograd", "zh", "test", folder)
    with pytest.raises(SplitNotFoundError):  # a mirror has its questions without passages
        read("aps/super_glue", "boolq", "train", folder)
    notes = {
        ("nyu-mll/blimp", "adjunct_island", "train"): "lacks the column lexically_identical",
        ("nyu-mll/glue", "mnli", "validation_matched"): "does not say matched from mismatched",
        ("jannalu/crows_pairs_multilingual", "english", "test"): "the revision of Névéol",
    }
    for where, words in notes.items():
        assert words in (find(*where, folder).note or "")
    assert find("baber/piqa", None, "validation", folder).note is None
    with pytest.raises(ValueError, match=r"has no paradigm 'no_such'; it has adjunct_island"):
        read("nyu-mll/blimp", "no_such", "train", folder)
