from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from moe.instruct.raw_files import read_rows

ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": "\u2028y"}]


def fields(path: Path, **rest: object) -> list[dict]:
    return [row.fields for row in read_rows(path, **rest)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("r.json", "\n".join(json.dumps(row) for row in ROWS)),  # one object a line, whatever the name says
        ("r.json", json.dumps(ROWS, indent=1)),
        ("r.json", json.dumps({"name": "n", "examples": ROWS})),
    ],
)
def test_json_in_its_published_forms(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with gzip.open(tmp_path / f"{name}.gz", "wb") as file:
        file.write(text.encode())
    assert fields(tmp_path / name) == fields(tmp_path / f"{name}.gz") == ROWS


def test_one_line_of_jsonl_is_a_row_whatever_its_keys(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"data": [{"x": 1}]}')
    assert fields(tmp_path / "r.jsonl") == [{"data": [{"x": 1}]}]


def test_tables(tmp_path: Path) -> None:
    (tmp_path / "r.tsv").write_text('a\tb\n1\tsay "x"\n')
    (tmp_path / "r.csv").write_text('a,b\n1,"x, y"\n')
    assert fields(tmp_path / "r.tsv") == [{"a": "1", "b": 'say "x"'}]  # quotes mean nothing in a tsv
    assert fields(tmp_path / "r.tsv", columns=("c", "d"))[0] == {"c": "a", "d": "b"}
    assert fields(tmp_path / "r.csv") == [{"a": "1", "b": "x, y"}]


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra data")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "r.parquet")
    assert fields(tmp_path / "r.parquet") == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.jsonl", '{"a": 1}\n{\n', "line 2 is not JSON"),
        ("r.jsonl", '{"a": 1}\n[1]\n', "line 2 is of type list, not an object"),
        ("r.json", '{"a": 1', "is not JSON"),
        ("r.json", '"text"', "holds a value of type str, not a list of rows"),
        ("r.tsv", "a\tb\n1\n", "line 2 has 1 columns, not 2: a, b"),
        ("r.csv", "a,b\n1\n", "line 2 does not have 2 columns"),
        ("r.txt", "a", "rows are read from .jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        fields(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
