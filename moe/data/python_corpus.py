"""The default corpus: the documentation and source of the Python that runs this. Real text on every machine.

    docs  the language reference's topics (pydoc) and the docstrings of the standard library
    code  its modules without their docstrings

Left out: tests, `pydoc_data` (it is the topics again), `encodings` (tables) and `lib2to3` (generated parsers). Both
domains are split by top-level module, and a topic by its name. Modules copy docstrings and topics contain each other:
a paragraph that was there before is left out, so that held-out text is not training text.
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
_COPIES = {"aifc": "wave", "sunau": "wave"}  # three modules from one template
_SHORT_PARAGRAPH = 60  # characters: "Return the size in bytes." may come again
_TEST_FOLDERS = {"test", "tests", "idle_test"}


def fingerprint() -> str:
    """What the text depends on: this Python's version and its library folder."""
    return f"python {sys.version} {sysconfig.get_path('stdlib')}"


def read() -> Iterator[Document]:
    """All documents, in a fixed order."""
    seen: set[str] = set()
    yield from _topics(seen)
    for path, name in _modules():
        with tokenize.open(path) as file:  # minds a coding line
            source = file.read()
        try:
            tree = ast.parse(source)
        except SyntaxError:  # templates that ship beside the modules are not Python
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
    from pydoc_data.topics import topics  # 0.7 MB that only this corpus wants

    # many topics are sections of others: the longest come first, so that a chapter keeps its sections
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        if text := _unseen_paragraphs(topics[name].strip("\n") + "\n", seen):
            yield Document("docs", f"topic {name}", text)


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
    """`text` without the longer paragraphs that are in `seen` already, to which the others are added."""
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
        # lib-dynload and config-* hold what was built, not what was written
        if parts[0] in _LEFT_OUT or parts[0].startswith(("config-", "_sysconfigdata")) or _TEST_FOLDERS & {*parts}:
            continue
        yield path, ".".join(parts).removesuffix(".__init__")


def _group(name: str) -> str:
    """Top-level module; `_pydatetime`, `_datetime` and `datetime` are one, for they share their docstrings."""
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
    """The source less its docstrings; one that is a whole body becomes `pass`, so that the rest stays Python."""
    lines = [line + "\n" for line in source.split("\n")]  # as ast counts them; splitlines also splits at form feeds
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
            continue  # `def f(): "doc"` on one line: cutting it would need more than lines
        replacement = f"{before}pass\n" if len(node.body) == 1 and not isinstance(node, ast.Module) else ""
        lines[first : last + 1] = [replacement] + [""] * (last - first)
    return "".join(lines)


def _compiled_docstrings(name: str) -> str:
    """Docstrings of a module compiled into the interpreter, which has no source to read."""
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
