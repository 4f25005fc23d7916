"""The default corpus: documentation and source of the running Python. Real text that every machine has.

    docs  the language reference's topics (pydoc) and the docstrings of the standard library
    code  the modules of the standard library, without their docstrings

Left out: tests, `pydoc_data` (the topics again), `encodings` (tables) and `lib2to3` (generated parsers). Modules are
split by their top-level module in both domains, topics by their name. Some modules copy docstrings and some topics
contain others, so longer paragraphs are read only once: otherwise training text would recur in held-out text.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from moe.data.documents import Document

_LEFT_OUT = {"site-packages", "dist-packages", "pydoc_data", "encodings", "lib2to3", "test", "__pycache__"}
_COPIES = {"aifc": "wave", "sunau": "wave"}  # all three were written from one template
_SHORT_PARAGRAPH = 60  # characters; shorter ones, such as "Return the size in bytes.", may be repeated
_TEST_FOLDERS = {"test", "tests", "idle_test"}


def fingerprint() -> str:
    """Identify the text: this Python's version and the folder of its standard library."""
    return f"python {sys.version} {sysconfig.get_path('stdlib')}"


def read() -> Iterator[Document]:
    """All documents, in a fixed order."""
    seen: set[str] = set()
    yield from _topics(seen)
    for path, name in _modules():
        with tokenize.open(path) as file:  # respects an encoding declaration
            source = file.read()
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a template among the modules, which is not Python
            continue
        group = _group(name)
        if docs := _unseen_paragraphs(_docstrings(tree, name), seen):
            yield Document("docs", group, docs)
        if code := _without_docstrings(source, tree).strip("\n"):
            yield Document("code", group, code + "\n")
    for name in sorted(sys.builtin_module_names):
        if docs := _unseen_paragraphs(_compiled_docstrings(name), seen):
            yield Document("docs", _group(name), docs)


def _topics(seen: set[str]) -> Iterator[Document]:
    from pydoc_data.topics import topics  # 0.7 MB that only this corpus needs

    # Many topics are sections of others. The longest come first, so that a chapter keeps its sections.
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        if text := _unseen_paragraphs(topics[name].strip("\n") + "\n", seen):
            yield Document("docs", f"topic {name}", text)


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
    """Remove long paragraphs of `text` that are already in `seen`, and add the others to `seen`."""
    kept = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        if len(words) >= _SHORT_PARAGRAPH and words in seen:
            continue
        seen.add(words)
        kept.append(paragraph)
    rest = "\n\n".join(kept)
    return rest if rest.strip() else ""


def _modules() -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        # config-* folders and _sysconfigdata are generated when Python is built
        if parts[0] in _LEFT_OUT or parts[0].startswith(("config-", "_sysconfigdata")) or _TEST_FOLDERS & {*parts}:
            continue
        yield path, ".".join(parts).removesuffix(".__init__")


def _group(name: str) -> str:
    """The top-level module. `_pydatetime`, `_datetime` and `datetime` are one group: they share docstrings."""
    top = re.sub(r"^_(py)?", "", name.split(".")[0])
    return _COPIES.get(top, top)


def _docstrings(tree: ast.Module, module: str) -> str:
    parts: list[str] = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if text := ast.get_docstring(node):
                parts.append(f"{name}{_signature(node)}\n\n{text}\n")
            for child in node.body:
                visit(child, f"{name}.{getattr(child, 'name', '')}")

    visit(tree, module)
    return "\n\n".join(parts)


def _signature(node: ast.AST) -> str:
    return f"({ast.unparse(node.args)})" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else ""


def _without_docstrings(source: str, tree: ast.Module) -> str:
    """The source without docstrings. A docstring that is an entire body becomes `pass`, so the rest stays valid."""
    lines = [line + "\n" for line in source.split("\n")]  # as ast counts lines; splitlines also splits at form feeds
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is None:
            continue
        statement = node.body[0]
        assert statement.end_lineno is not None and statement.end_col_offset is not None
        first, last = statement.lineno - 1, statement.end_lineno - 1
        before = lines[first].encode()[: statement.col_offset].decode()
        after = lines[last].encode()[statement.end_col_offset :].decode().strip()
        if before.strip() or after.startswith(";"):
            continue  # `def f(): "doc"` on one line: whole lines cannot be cut out
        replacement = f"{before}pass\n" if len(node.body) == 1 and not isinstance(node, ast.Module) else ""
        lines[first : last + 1] = [replacement] + [""] * (last - first)
    return "".join(lines)


def _compiled_docstrings(name: str) -> str:
    """The docstrings of a module that is compiled into the interpreter and so has no source file."""
    if name.startswith("_") and name.lstrip("_") in sys.builtin_module_names:
        return ""
    module = importlib.import_module(name)
    parts = [f"{name}\n\n{inspect.getdoc(module)}\n"] if inspect.getdoc(module) else []
    for owner, value in _public_members(module):
        if (text := inspect.getdoc(value)) and getattr(value, "__doc__", None):
            parts.append(f"{owner}\n\n{text}\n")
    return "\n\n".join(dict.fromkeys(parts))


def _public_members(module: ModuleType) -> Iterator[tuple[str, object]]:
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not callable(value) or getattr(value, "__module__", None) != module.__name__:
            continue
        yield f"{module.__name__}.{name}", value
        if inspect.isclass(value):
            for method, member in sorted(vars(value).items()):
                if not method.startswith("_"):
                    yield f"{module.__name__}.{name}.{method}", member
