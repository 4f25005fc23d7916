"""YAML without surprises: a safe loader, PromptSource's two tags as plain mappings, duplicate keys are errors."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, if libyaml is installed


class _Loader(_SafeLoader):  # type: ignore[misc,valid-type]
    """The safe loader, in which a tag can build nothing but a mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1] if len(set(map(str, keys))) < len(keys) else []
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, lambda loader, node: loader.construct_mapping(node, deep=True))


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. Raises ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is not a file")
    return parse_yaml(path.read_bytes(), str(path))


def parse_yaml(content: bytes, where: str) -> Any:
    """The value of YAML text. Raises ValueError starting with `where`."""
    try:
        return yaml.load(content, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
