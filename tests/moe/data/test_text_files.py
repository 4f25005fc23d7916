"""Every format the user may bring, and every way it may be broken."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from moe.data import text_files
from moe.data.text_files import Reading, find_files, read

TEXTS = ["First text.\nTwo lines.", "Zweiter Text: äöü \u2028 漢字", "third"]


def texts(*paths: object, field: str = "text") -> list[str]:
    return [document.text for document in read(find_files([str(path) for path in paths]), Reading(field))]


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text, "id": 1}, ensure_ascii=False) + "\n" for text in texts).encode()


def damaged(content: bytes) -> bytes:
    """With the first block of compressed content overwritten."""
    return content[:10] + b"\xff" * 10 + content[20:]


def test_jsonl_plain_and_compressed(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="needs the extra 'data'")
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(jsonl(TEXTS)))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        assert texts(tmp_path / name) == TEXTS
    (tmp_path / "other.jsonl").write_bytes(jsonl(TEXTS, field="content"))
    assert texts(tmp_path / "other.jsonl", field="content") == TEXTS


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"content": TEXTS * 300, "n": list(range(900))}), path)
    assert texts(path, field="content") == TEXTS * 300
    with pytest.raises(
        ValueError, match=r"a\.parquet has no column 'text' \(it has: content, n\); set data\.text_field"
    ):
        texts(path)
    with pytest.raises(ValueError, match=r"a\.parquet row 0 has no text in 'n': 0"):
        texts(path, field="n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet"):
        texts(path, field="content")


def test_text_is_cut_at_empty_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraph = ("word " * 200 + "\n") * 3 + "\n"
    path = tmp_path / "book.txt"
    path.write_text(paragraph * 40 + "the end")
    pieces = texts(path)
    assert "".join(pieces) == path.read_text()
    assert len(pieces) > 2
    assert all(piece.endswith("\n\n") and len(piece) >= Reading().piece_bytes for piece in pieces[:-1])


def test_the_text_of_a_table_is_its_last_column(tmp_path: Path) -> None:
    verses = [f"{number}: Yesu Kristo \u2028 alikuwa\n" for number in range(3000)]
    rows = "".join(f"b.MAT.1\t{number}\t{verse}" for number, verse in enumerate(verses)) + "\n"
    (tmp_path / "Swahili-NT.tsv.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "sw.tsv").write_text(rows)
    for name in ("Swahili-NT.tsv.gz", "sw.tsv"):
        pieces = texts(tmp_path / name)
        assert "".join(pieces) == "".join(verses)
        assert len(pieces) == 3  # cut after any row: 93 kB in pieces of 32 KiB
    (tmp_path / "sw.tsv").write_text("a\tfirst\nsecond\n")
    with pytest.raises(ValueError, match=r"sw\.tsv line 2 has no tab: a row of a \.tsv file must be a name, a tab"):
        texts(tmp_path / "sw.tsv")
    (tmp_path / "sw.tsv").write_bytes(b"a\tfirst\nb\tse\xffcond\n")
    with pytest.raises(ValueError, match=r"sw\.tsv is not UTF-8: byte 0xff at offset 12"):
        texts(tmp_path / "sw.tsv")


def test_a_long_text_without_empty_lines_is_cut_too(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("a line\n" * 400_000)
    pieces = texts(tmp_path / "log.txt")
    assert len(pieces) == 3
    assert "".join(pieces) == "a line\n" * 400_000


def test_folders_globs_and_domains(tmp_path: Path) -> None:
    for name in ("books/b.txt", "books/deep/a.txt", "books/c.jsonl", "books/notes.md", "mail/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]) if name.endswith("jsonl") else name.encode())
    files = find_files([str(tmp_path / "books"), str(tmp_path / "mail" / "x.txt"), f"{tmp_path}/**/*.md"])
    assert [(file.path.name, file.domain) for file in files] == [
        ("b.txt", "books"),
        ("c.jsonl", "books"),
        ("a.txt", "books"),
        ("x.txt", "x"),
        ("notes.md", tmp_path.name),
    ]
    assert texts(tmp_path / "books/notes.md") == ["books/notes.md"]


def test_a_pattern_names_the_domains(tmp_path: Path) -> None:
    for name in ("ml_help/de.txt", "ml_help/pt_PT.txt", "ml_guide/de.txt", "other/de.txt", "ml_help/deep/fr.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "ml_help" / "gu.txt.gz").write_bytes(gzip.compress(b"zipped"))

    def found(pattern: str) -> list[tuple[str, str]]:
        files = find_files([f"{tmp_path}/{pattern}"])
        return [(str(file.path.relative_to(tmp_path)), file.domain) for file in files]

    assert found("ml_*/@domain.txt") == [
        ("ml_guide/de.txt", "de"),
        ("ml_help/de.txt", "de"),
        ("ml_help/pt_PT.txt", "pt_PT"),
    ]
    assert found("ml_*/@domain.txt.gz") == [("ml_help/gu.txt.gz", "gu")]
    assert found("**/@domain.txt")[-1] == ("other/de.txt", "de")
    assert ("ml_help/deep/fr.txt", "fr") in found("**/@domain.txt")
    assert found("@domain/de.txt")[-1] == ("other/de.txt", "other")
    assert found("ml_help/[d-f]@domain.txt") == [("ml_help/de.txt", "e")]
    assert texts(tmp_path / "ml_help" / "@domain.txt.gz") == ["zipped"]
    (tmp_path / "fields.tex.gz").write_bytes(gzip.compress(b"any name"))
    assert texts(tmp_path / "fields.tex.gz") == ["any name"]
    with pytest.raises(ValueError, match=r"x_@domain\.txt matches no file"):
        found("x_@domain.txt")


def test_a_second_place_of_the_domain_must_agree(tmp_path: Path) -> None:
    for name in ("de/book.de.txt", "de/book.en.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files = find_files([f"{tmp_path}/@domain/*.@domain.txt"])
    assert [(file.path.name, file.domain) for file in files] == [("book.de.txt", "de")]


def test_sources_give_domains_by_name(tmp_path: Path) -> None:
    (tmp_path / "swahili.txt").write_text("a")
    (tmp_path / "bibles").mkdir()
    (tmp_path / "bibles" / "x.txt").write_text("b")
    files = find_files([], {"sw": [str(tmp_path / "swahili.txt"), str(tmp_path / "bibles")]})
    assert [(file.path.name, file.domain) for file in files] == [("swahili.txt", "sw"), ("x.txt", "sw")]
    with pytest.raises(ValueError, match=r"data\.sources\.sw must name at least one file"):
        find_files([], {"sw": []})


def test_lines_that_are_paragraphs_may_end_a_document(tmp_path: Path) -> None:
    path = tmp_path / "help.txt"
    path.write_text("a paragraph of some length\n" * 100)
    how = Reading(piece_bytes=200, lines_are_paragraphs=True)
    pieces = [document.text for document in read(find_files([str(path)]), how)]
    assert "".join(pieces) == path.read_text()
    assert {len(piece) for piece in pieces[:-1]} == {216}
    assert len(list(read(find_files([str(path)]), Reading(piece_bytes=200)))) == 1
    (tmp_path / "blank.txt").write_text("\n \n")
    assert list(read(find_files([str(tmp_path / "blank.txt")]), how)) == []


def test_equal_texts_are_one_group(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["same", "other", "same"]))
    groups = [document.group for document in read(find_files([str(tmp_path / "a.jsonl")]), Reading())]
    assert groups[0] == groups[2] != groups[1]


def test_files_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first document is there before the second line is read: a broken line behind it does no harm."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(["first"]) + b"broken\n")
    documents = read(find_files([str(tmp_path / "a.jsonl")]), Reading())
    assert next(documents).text == "first"
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        next(documents)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"good line\n\xff\xfe bad", r"bad\.txt is not UTF-8: byte 0xff at offset 10; convert"),
        ("bad.jsonl", jsonl(["x"]) + b'{"text": "\xe9"}\n', r"bad\.jsonl is not UTF-8: byte 0xe9 at offset 33"),
        ("bad.jsonl.gz", gzip.compress(b'{"text": "\xe9"}\n'), "offset 10 of its uncompressed content"),
        (
            "a.jsonl",
            jsonl(["x"]) + b'{"content": "y", "id": 2}\n',
            r"a\.jsonl line 2 has no text in the field 'text' \(it has: content, id\); set data\.text_field",
        ),
        ("a.jsonl", b"[1]\n", r"line 1 has no text in the field 'text' \(it has: list\)"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 has no text"),
        ("a.jsonl", b'\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl.gz", gzip.compress(jsonl(TEXTS))[:-9], r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.gz", damaged(gzip.compress(jsonl(TEXTS))), r"a\.jsonl\.gz cannot be read: .*decompressing"),
        ("a.txt.gz", damaged(gzip.compress(jsonl(TEXTS))), r"a\.txt\.gz cannot be read: .*decompressing"),
        (
            "a.jsonl",
            jsonl(["x"]) + b'{"text": "ab\\ud800c"}\n',
            r"a\.jsonl line 2 has half a surrogate pair, '\\ud800' at character 2 of its text",
        ),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / name)


def test_damaged_zstd_is_named(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="needs the extra 'data'")
    path = tmp_path / "a.jsonl.zst"
    frame = zstandard.compress(jsonl([f"text {number**9}" for number in range(20_000)]))
    for content in (b"{}\n", damaged(frame), frame + frame[:-1], frame + b"more"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.jsonl\.zst cannot be read: "):
            texts(path)


def test_zstd_of_several_frames_is_read_whole(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="needs the extra 'data'")
    path = tmp_path / "a.jsonl.zst"
    many = [f"text {number**9}" for number in range(20_000)]
    path.write_bytes(zstandard.compress(jsonl(many)) + zstandard.compress(jsonl(TEXTS)))
    assert texts(path) == [*many, *TEXTS]
    path.write_bytes(b"")
    assert texts(path) == []


def test_both_halves_of_a_surrogate_pair_are_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert texts(tmp_path / "a.jsonl") == ["\N{GRINNING FACE}"]


def test_the_offset_counts_earlier_pieces(tmp_path: Path) -> None:
    start = ("word " * 2000 + "\n\n") * 10
    (tmp_path / "a.txt").write_bytes(start.encode() + b"\xff")
    with pytest.raises(ValueError, match=f"byte 0xff at offset {len(start)}"):
        texts(tmp_path / "a.txt")


def test_paths_without_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere.txt", "does not exist"),
        (tmp_path / "empty", r"holds no file that ends in one of: \.txt, \.txt\.gz, \.tsv, \.tsv\.gz, \.jsonl"),
        (tmp_path / "*.jsonl", "matches no file"),
    ):
        with pytest.raises(ValueError, match=message):
            find_files([str(path)])


def test_json_is_no_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "corpus.json"
    path.write_text("[]")
    for paths, sources in (([str(path)], {}), ([str(tmp_path / "*")], {}), ([], {"sw": [str(path)]})):
        with pytest.raises(ValueError, match=r"corpus\.json is a \.json file, .* convert it to \.jsonl"):
            find_files(paths, sources)
    (tmp_path / "a.txt").write_text("x")
    assert [file.path.name for file in find_files([str(tmp_path)])] == ["a.txt"]  # a folder is searched for text


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.b.jsonlines", "a.TSV"])
def test_records_of_another_name_are_no_plain_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=rf"{name} would be read as plain text.* \.jsonl,.* in lower case"):
        find_files([str(tmp_path / name)])
    for plain in ("a.text", "jsonl", "a.jsonl.txt", "a.TXT"):
        (tmp_path / plain).write_text("x")
        assert [file.path.name for file in find_files([str(tmp_path / plain)])] == [plain]


def test_a_file_that_goes_away_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    files = find_files([str(path)])
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: .*directory"):
        list(read(files, Reading()))


def test_a_changed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    before = text_files.fingerprint(find_files([str(path)]), Reading())
    assert text_files.fingerprint(find_files([str(path)]), Reading()) == before
    path.write_text("xy")
    assert text_files.fingerprint(find_files([str(path)]), Reading()) != before
