"""The dotted names of a configuration's fields, and their values in plain dicts."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, get_args, get_origin, get_type_hints


def field_names(schema: type[Any], prefix: str = "", *, of_dicts: bool = False) -> list[str]:
    """The full names of all fields, including those of optional parts. of_dicts: only fields that are dicts."""
    names: list[str] = []
    types = get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        candidates: list[type[Any]] = [types[entry.name], *get_args(types[entry.name])]
        parts = [part for part in candidates if dataclasses.is_dataclass(part)]
        if parts:
            names += field_names(parts[0], f"{prefix}{entry.name}.", of_dicts=of_dicts)
        elif not of_dicts or get_origin(types[entry.name]) is dict:
            names.append(f"{prefix}{entry.name}")
    return names


def field_comments(schema: type[Any], prefix: str = "") -> dict[str, str]:
    """The comment after each field, by full name, including inherited ones and fields of optional parts."""
    comments: dict[str, str] = {}
    types = get_type_hints(schema)
    bases = filter(dataclasses.is_dataclass, reversed(schema.__mro__))
    source = "".join(map(inspect.getsource, bases))  # that of a class alone lacks what it inherits
    said = dict(re.findall(r"^    (\w+): [^#\n]*  # (.+)$", source, re.MULTILINE))
    for entry in dataclasses.fields(schema):
        name = f"{prefix}{entry.name}"
        if entry.name in said:
            comments[name] = said[entry.name]
        candidates: list[type[Any]] = [types[entry.name], *get_args(types[entry.name])]
        for part in filter(dataclasses.is_dataclass, candidates):
            comments |= field_comments(part, f"{name}.")
    return comments


def described(schema: type[Any], values: dict[str, Any]) -> list[str]:
    """Every field as an override with its value and comment; for fields of a null part, only the name."""
    lines, comments = [], field_comments(schema)
    for key in field_names(schema):
        parent = key.rpartition(".")[0]
        text = key if parent and value_at(values, parent) is None else f"{key}={as_override(value_at(values, key))}"
        lines.append(f"{text:<42}  # {comments[key]}" if key in comments else text)
    return lines


def optional_parts(schema: type[Any], prefix: str = "") -> dict[str, type[Any]]:
    """The full names and classes of the parts that may be null, outer ones first."""
    parts: dict[str, type[Any]] = {}
    types = get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        name = f"{prefix}{entry.name}"
        members: tuple[type[Any], ...] = get_args(types[entry.name])
        if type(None) in members and dataclasses.is_dataclass(members[0]):
            parts |= {name: members[0], **optional_parts(members[0], f"{name}.")}
        elif dataclasses.is_dataclass(types[entry.name]):
            parts |= optional_parts(types[entry.name], f"{name}.")
    return parts


def is_required(entry: dataclasses.Field[Any]) -> bool:
    """Whether it has no default."""
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def value_at(tree: Any, key: str) -> Any:
    """The value at a dotted key; None if there is none."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def set_at(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key. A dict updates the fields it names in an existing dict."""
    *parents, name = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    there = tree.get(name)
    tree[name] = {**there, **value} if isinstance(there, dict) and isinstance(value, dict) else value


def changed_values(base: dict[str, Any], wanted: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    """Where `wanted` differs from `base` at or below a dotted key, by full name; new names are prefixed with +."""
    before, after = value_at(base, key), value_at(wanted, key)
    if isinstance(before, dict) and isinstance(after, dict):
        below: list[tuple[str, Any]] = []
        for name in after:
            below += changed_values(base, wanted, f"{key}.{name}")
        return below
    parent, _, name = key.rpartition(".")
    is_named = name in (value_at(base, parent) if parent else base)
    return [] if before == after else [(key if is_named else f"+{key}", after)]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value under its dotted name: {"model.d_ff": 512, ...}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


_PLAIN = re.compile(r"(?!\.\d)[A-Za-z_/.][\w/.@*-]*", re.ASCII)  # what Hydra reads as text unquoted: .5 is a number
_NO_TEXT = ("null", "true", "false", "nan", "inf")


def as_override(value: Any) -> str:
    """A value in override syntax."""
    if isinstance(value, list):
        return f"[{','.join(map(as_override, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{as_override(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and value.lower() not in _NO_TEXT else _quoted(value)
    return "null" if value is None else str(value).lower()


def _quoted(text: str) -> str:
    """Quote for Hydra, which escapes only quotes, and backslashes before a quote or the end."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text) + '"'
