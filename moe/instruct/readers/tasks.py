"""What every reader yields: self-describing tasks, and their examples as records."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moe.instruct.categories import Categories
from moe.instruct.definition import Source, TaskSettings
from moe.instruct.raw_files import Row, read_rows
from moe.instruct.records import Record
from moe.instruct.templates import Renderer, TemplateError

FieldMapper = Callable[[dict[str, Any]], dict[str, Any] | None]
PUBLISHED_SPLITS = ("train", "validation", "test", "all")
_NAME = re.compile(r"[A-Za-z0-9][\w.,+=-]*(/[A-Za-z0-9][\w.,+=-]*)*")


@dataclass(frozen=True)
class TaskInfo:
    """What is known about a task before its examples are read."""

    name: str
    benchmark: str
    category: str
    cluster: str  # the benchmark's own category name
    data_source: str
    style: str
    licence: str
    cap: int  # training records
    splits: tuple[str, ...]  # the published splits, from PUBLISHED_SPLITS
    evaluation_only: bool = False
    examples_known: bool = True  # False: rows of the same raw example cannot be matched
    first_are_test: bool = False  # the examples marked "test" are for evaluation by convention only
    dropped_templates: tuple[str, ...] = ()  # inverted ones

    def record(self, instruction: str, text: str, targets: tuple[str, ...], **rest: Any) -> Record:
        return Record(
            self.name, self.benchmark, self.category, self.data_source, self.style, instruction, text, targets, **rest
        )


class Example(NamedTuple):
    """One record and its published split."""

    record: Record
    split: str


class Skipped(NamedTuple):
    """An example that yielded no record: `failed`, or the template does not apply to it."""

    template: str
    where: str
    reason: str
    failed: bool
    split: str


class TaskReader(NamedTuple):
    """A task and how to stream it; `read` may be called repeatedly."""

    info: TaskInfo
    read: Callable[[], Iterator[Example | Skipped]]


@dataclass
class Context:
    """A reader's input: its source, the data folder, the category table and the seed."""

    source: Source
    root: Path
    categories: Categories
    seed: int
    where: str  # names the source in error messages
    inputs: set[Path] = field(default_factory=set)  # every file requested, for the manifest
    renderer: Renderer = field(default_factory=Renderer)

    def __post_init__(self) -> None:
        unknown = self.source.options.keys() - _OPTIONS.get(self.source.reader, set())
        if unknown:
            known = ", ".join(sorted(_OPTIONS.get(self.source.reader, set()))) or "none"
            raise ValueError(
                f"{self.where}: reader {self.source.reader} has no option {min(unknown)!r}; it has: {known}"
            )

    def path(self, name: str | None) -> Path:
        """A file or folder of the data. Raises ValueError if it does not exist."""
        if name is None:
            raise ValueError(f"{self.where}: path must be given for reader {self.source.reader}")
        path = self.root / name
        if not path.exists():
            raise ValueError(f"{self.where}: {path} does not exist")
        if path.is_file():
            self.inputs.add(path)
        return path

    def files(self, name: str, settings: TaskSettings) -> dict[str, Path]:
        """The files of a task by published split."""
        wrong = settings.files.keys() - set(PUBLISHED_SPLITS)
        if not settings.files or wrong:
            said = f"has {min(wrong)!r}" if wrong else "is empty"
            raise ValueError(
                f"{self.where}: tasks.{name}.files {said}; its keys must be among {', '.join(PUBLISHED_SPLITS)}"
            )
        return {split: self.path(file) for split, file in settings.files.items()}

    def info(self, name: str, settings: TaskSettings, style: str, splits: tuple[str, ...], **rest: Any) -> TaskInfo:
        """The description of a task. Raises ValueError for an unknown category, or a name that is not a valid path."""
        full = f"{self.source.benchmark}/{name}"
        if not _NAME.fullmatch(full):
            raise ValueError(
                f"{self.where}: task {full!r}: a name has parts of letters, digits and . , + = - _ between slashes"
            )
        if settings.category is None:
            raise ValueError(f"{self.where}: task {full} needs a category")
        return TaskInfo(
            name=full,
            benchmark=self.source.benchmark,
            category=self.categories.of(settings.category, f"{self.where}: task {full}"),
            cluster=settings.category,
            data_source=settings.data_source or name,
            style=style,
            licence=settings.licence or self.source.licence,
            cap=self.source.task_cap,
            splits=splits,
            evaluation_only=settings.evaluation_only,
            **rest,
        )

    def instruction(self, name: str, settings: TaskSettings) -> str:
        if not settings.instruction:
            raise ValueError(f"{self.where}: tasks.{name}.instruction must be given")
        return settings.instruction

    def field_mapper(self, name: str, settings: TaskSettings) -> FieldMapper:
        """Maps a raw row to template fields: its own, overridden by the settings'; None if `where` excludes it."""
        try:
            compiled = {key: self.renderer.expression(source) for key, source in settings.fields.items()}
            keep = self.renderer.expression(settings.where or "true")
        except TemplateError as error:
            raise ValueError(f"{self.where}: tasks.{name}.fields: {error}") from error
        return lambda row: {**row, **{key: evaluate(row) for key, evaluate in compiled.items()}} if keep(row) else None


_OPTIONS = {
    "super_natural_instructions": {"task_list"},
    "t0_rendered": {"templates"},
    "dialogue": {"mode", "context_turns"},
    "chain_of_thought": {"target"},
    "structured": {"separator"},
}


def split_rows(files: dict[str, Path], columns: tuple[str, ...] | None = None) -> Iterator[tuple[str, Row]]:
    """The rows of all files with their split."""
    for split, path in files.items():
        for row in read_rows(path, columns):
            yield split, row


def mapped_rows(files: dict[str, Path], mapper: FieldMapper) -> Iterator[tuple[str, Row, dict[str, Any]] | Skipped]:
    """The rows of all files with their split and template fields."""
    for split, row in split_rows(files):
        try:
            fields = mapper(row.fields)
        except TemplateError as error:
            yield Skipped("", row.where, str(error), True, split)
            continue
        if fields is None:
            yield Skipped("", row.where, "left out by `where`", False, split)
        else:
            yield split, row, fields


def identity(value: Any) -> str:
    """Names a raw example by its content, so that equal ones fall into one split."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def as_targets(value: Any) -> tuple[str, ...]:
    """One answer or a list of them, as stripped texts."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(str(item).strip() for item in values)
