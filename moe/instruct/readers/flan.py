"""FLAN's `PATTERNS` (a JSON of its templates.py: group to pairs of input and target pattern), applied to raw data sets.

Templates are assigned in turn to consecutive examples, as in FLAN; inverted ones are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from moe.instruct.raw_files import read_json
from moe.instruct.readers.tasks import (
    Context,
    Example,
    FieldMapper,
    Skipped,
    TaskInfo,
    TaskReader,
    identity,
    mapped_rows,
)
from moe.instruct.templates import FlanPattern, TemplateError, uninverted


def read(context: Context) -> Iterator[TaskReader]:
    """Each task of the source. Rows need the fields of its patterns; `options` (a list) becomes {options_}."""
    path = context.path(context.source.path)
    groups = read_json(path)
    groups = groups.get("PATTERNS") if isinstance(groups, dict) else None
    if not isinstance(groups, dict):
        raise ValueError(f"{path}: key 'PATTERNS' must map groups to patterns")
    for name, settings in context.source.tasks.items():
        group = settings.template or name
        pairs = groups.get(group)
        where = f"{path}: PATTERNS.{group}"
        if not isinstance(pairs, list) or not pairs:
            raise ValueError(f"{where} does not exist or is empty")
        for number, pair in enumerate(pairs):
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise ValueError(f"{where}[{number}] must be a pair of texts")
        try:
            kept = uninverted([(source, target) for source, target in pairs], settings.keep)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        patterns = [FlanPattern(f"{group}_{number}", *pairs[number]) for number in kept]
        files = context.files(name, settings)
        dropped = tuple(f"{group}_{number}" for number in range(len(pairs)) if number not in kept)
        info = context.info(name, settings, "instance", tuple(files), dropped_templates=dropped)
        yield TaskReader(info, partial(_examples, info, files, patterns, context.field_mapper(name, settings)))


def _examples(
    info: TaskInfo, files: dict[str, Path], patterns: list[FlanPattern], mapper: FieldMapper
) -> Iterator[Example | Skipped]:
    number = -1
    for item in mapped_rows(files, mapper):
        if isinstance(item, Skipped):
            yield item
            continue
        split, row, fields = item
        number += 1
        pattern = patterns[number % len(patterns)]
        try:
            prompt, targets, candidates = pattern.apply(fields)
        except TemplateError as error:
            yield Skipped(pattern.name, row.where, str(error), True, split)
            continue
        example = identity(row.fields)
        record = info.record(prompt.strip(), "", targets, candidates=candidates, template=pattern.name, example=example)
        yield Example(record, split)
