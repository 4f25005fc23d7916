"""Files and functions stay readable at one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_FILE = 400
LIMITS = {"moe/training/trainer.py": 300, "train.py": 40}
LONGEST_FUNCTION = 60
FILES = [ROOT / "train.py", *sorted((ROOT / "moe").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_length(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    source = path.read_text()
    assert len(source.splitlines()) <= LIMITS.get(name, LONGEST_FILE)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{name}: {node.name}"


def test_there_is_no_drawer_for_everything() -> None:
    names = {path.name for path in FILES}
    assert not names & {"utils.py", "common.py", "helpers.py", "misc.py"}


def test_nothing_large_is_committed() -> None:
    for path in ROOT.rglob("*"):
        if path.is_file() and not path.is_symlink() and not {".git", "runs", "build", "dist"} & {*path.parts}:
            if any(part.startswith(".") or part.endswith(".egg-info") for part in path.relative_to(ROOT).parts[:-1]):
                continue
            assert path.stat().st_size <= 250 * 1024, path
