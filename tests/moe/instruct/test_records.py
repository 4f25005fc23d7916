from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.instruct.records import Record, fault, from_json, read_records, to_json, write_records

RECORD = Record("b/t", "b", "Question Answering", "s", "task", "Do.", "in", ("a",), ("a", "b"), "name", "0")


@given(st.text(), st.lists(st.text(st.characters(categories=["L", "Zl", "Zp", "So", "Cs"]), min_size=1), min_size=1))
def test_any_text_survives_and_stays_on_one_line(text: str, targets: list[str]) -> None:
    record = RECORD._replace(input=text, targets=(*targets, "x"), candidates=())
    if fault(record) is None:
        line = to_json(record)
        assert len(line.splitlines()) == 1
        assert from_json(line, "here") == record


def test_files_round_trip(tmp_path: Path) -> None:
    records = [RECORD._replace(example=str(i), input="line\u2028separator \ud83d") for i in range(3)]
    assert write_records(tmp_path / "r.jsonl", records) == 3
    assert list(read_records(tmp_path / "r.jsonl")) == records


def test_what_belongs_to_the_example() -> None:
    assert RECORD.body == "in"
    assert RECORD._replace(style="instance", input="").body == "Do."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": []}, "it has no target"),
        ({"targets": ["  "]}, "it has an empty target"),
        ({"targets": "a"}, "targets ('a') must be a list of texts"),
        ({"style": "other"}, "style 'other' is not one of: task, instance, keyword"),
        ({"candidates": ["c", "d"]}, "its target 'a' is not among its candidates"),
        ({"task": 3}, r"task \(3\) must be text".replace("\\", "")),
    ],
)
def test_a_bad_record_is_named_with_file_and_line(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "r.jsonl"
    good = json.loads(to_json(RECORD))
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | changes) + "\n")
    with pytest.raises(ValueError) as error:
        list(read_records(path))
    assert f"{path} line 2" in str(error.value)
    assert message in str(error.value)


def test_a_line_that_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="here is not a record: it has instruction; a record has task, benchmark"):
        from_json('{"instruction": "x"}', "here")
    with pytest.raises(ValueError, match="here is not JSON"):
        from_json("{", "here")
