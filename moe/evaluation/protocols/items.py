"""What a template makes of a row: a text with a gap, the candidates for it, and which of them are right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

MASK = "<mask>"

Row = Mapping[str, Any]


class Item(NamedTuple):
    """One question. The text that is scored is `template` with a candidate in place of `<mask>`."""

    template: str
    candidates: tuple[str, ...]
    gold: tuple[int, ...]  # all that count as right; the first is shown in demonstrations
    groups: tuple[str, ...] = ()  # "name=value", by which accuracy is reported too
    calibration: tuple[str, ...] = ()  # templates without content, whose scores are subtracted
    cluster: str = ""  # items of one depend on each other, so intervals draw them together; "" is a cluster of its own

    @property
    def texts(self) -> list[str]:
        """The whole text with each candidate."""
        return [fill(self.template, candidate) for candidate in self.candidates]

    @property
    def demonstration(self) -> str:
        """The text with the first right candidate."""
        return fill(self.template, self.candidates[self.gold[0]])


Template = Callable[[Row], Item]


def fill(template: str, candidate: str) -> str:
    """`template` with `candidate` in its gap."""
    before, after = template.split(MASK)
    return before + candidate + after


def columns(row: Row, *names: str) -> list[Any]:
    """The values of columns. Raises ValueError naming those that the row lacks."""
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; its columns are {', '.join(row) or 'none'}")
    return [row[name] for name in names]


def text(value: Any, name: str) -> str:
    """A column that must be text, with the gap's own spelling refused."""
    if not isinstance(value, str):
        raise ValueError(f"has {name}={value!r}, which is not text")
    if MASK in value:
        raise ValueError(f"has {MASK} in {name}, which marks the gap for candidates: {value!r}")
    return value


def texts(row: Row, *names: str) -> list[str]:
    """The values of columns that must be text."""
    return [text(value, name) for name, value in zip(names, columns(row, *names), strict=True)]


def index(value: Any, names: Sequence[Any], column: str) -> int:
    """Which of `names` a label is; "1" and 1 are the same, a bool and its number too."""
    spelled = [str(name) for name in names]
    found = str(int(value) if isinstance(value, bool) else value)
    if found not in spelled:
        raise ValueError(f"has {column}={value!r}, which must be one of: {', '.join(spelled)}")
    return spelled.index(found)


def make_items(rows: Sequence[Row], template: Template, where: str) -> list[Item]:
    """The item of each row. Raises ValueError naming the row where one does not fit the template."""
    items = []
    for i, row in enumerate(rows):
        try:
            item = template(row)
        except ValueError as error:
            raise ValueError(f"{where}, row {i}: {error}") from error
        assert item.template.count(MASK) == 1
        assert all(0 <= right < len(item.candidates) for right in item.gold) and item.gold
        items.append(item)
    return items
