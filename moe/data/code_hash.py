"""A hash of Python code for the keys of caches: what is prepared by other code is not reused."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

_WITH_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_sha256(modules: Iterable[ModuleType]) -> str:
    """Hexadecimal SHA-256 of the code of `modules`. Docstrings, comments and formatting do not count.

    The format of ast.dump differs between minor versions of Python, so a new one changes every hash. That is accepted:
    the text can change with it too, since str.strip and str.split follow Python's version of Unicode.
    """
    digest = hashlib.sha256()
    for module in modules:
        tree = ast.parse(Path(str(module.__file__)).read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, _WITH_DOCSTRINGS) and ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        digest.update(ast.dump(tree).encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()
