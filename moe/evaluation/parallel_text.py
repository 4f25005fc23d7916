"""The same text in many languages, aligned by line: NTREX-128, FLORES, or a folder with one file per language.

This module decides which lines serve as demonstrations and which are translated, so that the two never overlap.
"""

from __future__ import annotations

import difflib
import gzip
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moe.evaluation.datasets.files import DAMAGED

DEMO_LINES = 100  # for sets without a demonstration split: the first documents, until they hold this many lines

_NTREX = re.compile(r"newstest2019-(?:src|ref)\.(?P<code>[^.]+)\.txt(?:\.gz)?")


class ParallelText(NamedTuple):
    """Aligned lines: demos[code][i] and test[code][i] mean the same in every language `code`."""

    demos: dict[str, list[str]]
    test: dict[str, list[str]]
    layout: str  # "ntrex", "flores" or "files"
    files: dict[str, str]  # code -> file of its test lines


def load_parallel(
    folder: Path, languages: Sequence[str] | None = None, *, demo_lines: int = DEMO_LINES
) -> ParallelText:
    """Read a folder of aligned files.

    NTREX-128: newstest2019-src.CODE.txt and -ref.CODE.txt (.gz), with DOCUMENT_IDS.tsv; the first whole documents
    become demonstrations until they hold `demo_lines` lines. FLORES: dev/CODE.dev provides demonstrations and
    devtest/CODE.devtest is translated. Other folders: CODE.txt (.gz), of which the first `demo_lines` lines are
    demonstrations. languages: codes as in the file names; None means all. Raises ValueError for an unknown language,
    for files of different lengths (naming both), for empty lines, and if no line is left to translate.
    """
    layout, tests, demos = _find(folder)
    codes = sorted(tests) if languages is None else list(languages)
    if len(set(codes)) != len(codes) or len(codes) < 2:
        raise ValueError(f"languages ({', '.join(codes)}) must be at least two, all different")
    for code in codes:
        if code not in tests or (demos and code not in demos):
            near = difflib.get_close_matches(code, tests, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(near)}?" if near else f"there are: {', '.join(sorted(tests))}"
            raise ValueError(f"{folder} has no language {code!r}; {hint}")
    lines = _aligned({code: tests[code] for code in codes})
    files = {code: str(tests[code]) for code in codes}
    if demos:
        return ParallelText(_aligned({code: demos[code] for code in codes}), lines, layout, files)
    total = len(lines[codes[0]])
    split = _end_of_demos(folder / "DOCUMENT_IDS.tsv", total, demo_lines)
    if split >= total:
        raise ValueError(
            f"demo_lines ({demo_lines}) leaves none of the {total} lines of {folder} to translate; lower it"
        )
    return ParallelText(
        {code: text[:split] for code, text in lines.items()},
        {code: text[split:] for code, text in lines.items()},
        layout,
        files,
    )


def _find(folder: Path) -> tuple[str, dict[str, Path], dict[str, Path]]:
    """Layout, test files and demonstration files by code; no demonstration files if the test files provide them."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the one that holds the aligned files")
    if (folder / "devtest").is_dir():
        tests = {path.name.removesuffix(".devtest"): path for path in sorted((folder / "devtest").glob("*.devtest"))}
        demos = {path.name.removesuffix(".dev"): path for path in sorted((folder / "dev").glob("*.dev"))}
        if not tests or not demos:
            raise ValueError(
                f"{folder} has a folder devtest, as FLORES has, but must hold devtest/CODE.devtest and dev/CODE.dev too"
            )
        return "flores", tests, demos
    ntrex = {}
    for path in sorted(folder.iterdir()):
        match = _NTREX.fullmatch(path.name)
        if match is not None:
            ntrex[match["code"]] = path
    if ntrex:
        return "ntrex", ntrex, {}
    found = {path.name.split(".txt")[0]: path for path in sorted(folder.glob("*.txt*")) if _is_text(path)}
    if not found:
        raise ValueError(
            f"{folder} holds neither newstest2019-ref.CODE.txt (NTREX), dev/CODE.dev (FLORES) nor CODE.txt files"
        )
    return "files", found, {}


def _is_text(path: Path) -> bool:
    return path.name.endswith((".txt", ".txt.gz"))


def _aligned(files: dict[str, Path]) -> dict[str, list[str]]:
    lines = {code: _lines(path) for code, path in files.items()}
    first, *others = files
    for code in others:
        if len(lines[code]) != len(lines[first]):
            raise ValueError(
                f"{files[first]} has {len(lines[first])} lines and {files[code]} has {len(lines[code])}: line-aligned "
                f"files must have equally many"
            )
    return lines


def _lines(path: Path) -> list[str]:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged: {error}; replace the file") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}; convert the file first") from error
    lines = [line.strip() for line in text.split("\n")]  # splitlines() would also split at U+2028; strip removes \r
    if lines and not lines[-1]:
        lines.pop()
    empty = [number for number, line in enumerate(lines, start=1) if not line]
    if empty:
        raise ValueError(
            f"{path} line {empty[0]} is empty: fill it in, or remove the line from the files of all languages"
        )
    return lines


def _end_of_demos(document_ids: Path, total: int, demo_lines: int) -> int:
    """How many lines are demonstrations: at least `demo_lines`, and whole documents if their ids are known."""
    if demo_lines < 1:
        raise ValueError(f"demo_lines ({demo_lines}) must be at least 1")
    if not document_ids.is_file():
        return demo_lines
    ids = document_ids.read_text(encoding="utf-8-sig").splitlines()
    if len(ids) != total:
        raise ValueError(f"{document_ids} has {len(ids)} ids for {total} lines of text: it must have one for each line")
    end = min(demo_lines, total)
    while end < total and ids[end] == ids[end - 1]:
        end += 1
    return end
