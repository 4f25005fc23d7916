"""The hash of code in the keys of caches."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from moe.config import DataConfig
from moe.data import documents, prepare
from moe.data.code_hash import code_sha256

SOURCE = '''"""Doubles."""

FACTOR = 2  # twice


class Doubler:
    """Doubles one number."""


def double(number):
    """Return twice the number."""
    name = "number"
    return FACTOR * number, name
'''


def module(path: Path, source: str) -> ModuleType:
    path.write_text(source)
    made = ModuleType("made")
    made.__file__ = str(path)
    return made


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# twice", "# two times as many"),
        ('"""Doubles."""\n', ""),
        ("Doubles one number.", "Multiplies by two."),
        ("Return twice", "Twice"),
        ("    name =", "\n    # a name\n    name ="),
    ],
)
def test_docstrings_comments_and_formatting_do_not_count(old: str, new: str, tmp_path: Path) -> None:
    assert old in SOURCE
    changed = module(tmp_path / "changed.py", SOURCE.replace(old, new))
    assert code_sha256([changed]) == code_sha256([module(tmp_path / "made.py", SOURCE)])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("FACTOR = 2", "FACTOR = 3"),
        ("FACTOR * number", "number * FACTOR"),
        ('"number"', '"value"'),
        ("    return", "    return\n    return"),
    ],
)
def test_a_changed_statement_counts(old: str, new: str, tmp_path: Path) -> None:
    assert old in SOURCE
    changed = module(tmp_path / "changed.py", SOURCE.replace(old, new))
    assert code_sha256([changed]) != code_sha256([module(tmp_path / "made.py", SOURCE)])


def test_the_key_of_a_corpus_depends_on_the_code_of_its_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prepare.Source("text", lambda: iter(()))
    config = DataConfig(name="text", path=["unread.txt"])
    code = Path(documents.__file__).read_text()

    def key(text: str) -> str:
        readers = (module(tmp_path / "documents.py", text), *prepare._DECIDING[1:])
        monkeypatch.setattr(prepare, "_DECIDING", readers)
        return prepare._key(config, source, None)

    before = key(code)
    assert key(code + "# a comment\n") == before
    assert key(code.replace('_SALT = "moe"', '_SALT = "other"')) != before
