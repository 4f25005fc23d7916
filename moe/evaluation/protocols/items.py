"""What a template makes of a row: a text with a gap, the candidates to fill it, and which of them are correct."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

MASK = "<mask>"

Row = Mapping[str, Any]


class Item(NamedTuple):
    """One question. Scored texts are `template` with each candidate in place of `<mask>`."""

    template: str
    candidates: tuple[str, ...]
    gold: tuple[int, ...]  # all correct candidates; the first is shown in demonstrations
    groups: tuple[str, ...] = ()  # "name=value"; accuracy is also reported per group
    calibration: tuple[str, ...] = ()  # content-free templates whose scores are subtracted
    cluster: str = ""  # its items are dependent, so intervals resample them together; "" is a cluster of its own
    twin: str = ""  # items of one cluster with this in common differ in what their groups name alone

    @property
    def texts(self) -> list[str]:
        """The full text with each candidate."""
        return [fill(self.template, candidate) for candidate in self.candidates]

    @property
    def demonstration(self) -> str:
        """The text with the first correct candidate."""
        return fill(self.template, self.candidates[self.gold[0]])


Template = Callable[[Row], Item]


def fill(template: str, candidate: str) -> str:
    """`template` with its gap filled by `candidate`."""
    before, after = template.split(MASK)
    return before + candidate + after


def columns(row: Row, *names: str) -> list[Any]:
    """The values of the named columns. Raises ValueError naming those the row lacks."""
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; its columns are {', '.join(row) or 'none'}")
    return [row[name] for name in names]


def text(value: Any, name: str) -> str:
    """A column that must be text. Refuses text that contains the gap marker."""
    if not isinstance(value, str):
        raise ValueError(f"has {name}={value!r}, which must be text")
    if MASK in value:
        raise ValueError(f"has {MASK} in {name}, which marks the gap for candidates: {value!r}")
    return value


def texts(row: Row, *names: str) -> list[str]:
    """The values of columns that must be text."""
    return [text(value, name) for name, value in zip(names, columns(row, *names), strict=True)]


def index(value: Any, names: Sequence[Any], column: str) -> int:
    """The position of a label in `names`; "1" matches 1, and a bool matches its number."""
    spelled = [str(name) for name in names]
    found = str(int(value) if isinstance(value, bool) else value)
    if found not in spelled:
        raise ValueError(f"has {column}={value!r}, which must be one of: {', '.join(spelled)}")
    return spelled.index(found)


def make_items(rows: Sequence[Row], template: Template, where: str) -> list[Item]:
    """The item of each row. Raises ValueError naming a row that does not fit the template."""
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
