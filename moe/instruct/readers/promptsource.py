"""PromptSource templates applied to raw data sets. The path is a checkout's `templates/` folder or an archive of it;
each task names its group, as `super_glue/copa`, and maps its rows to the fields of the Hugging Face data set."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from moe.instruct.templates import PromptSourceTemplate, TemplateError, protect
from moe.instruct.yaml_files import parse_yaml


class TemplateText(NamedTuple):
    """A template as published."""

    name: str
    jinja: str
    answer_choices: str | None
    original_task: bool


class TemplateGroups:
    """The templates.yaml files of a folder or tar archive, read on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content: dict[str, bytes] = {}
        if path.is_dir():
            for file in sorted(path.glob("**/templates.yaml")):
                self._content[_group(str(file.relative_to(path)))] = file.read_bytes()
        else:
            try:
                with tarfile.open(path) as archive:
                    for member in archive:
                        stream = archive.extractfile(member) if member.name.endswith("templates.yaml") else None
                        if stream is not None:
                            self._content[_group(member.name)] = stream.read()
            except (tarfile.TarError, OSError, EOFError) as error:
                raise ValueError(f"{path} is neither a folder nor a tar archive of templates: {error}") from error
        if not self._content:
            raise ValueError(f"{path} holds no templates.yaml")

    @property
    def names(self) -> list[str]:
        return list(self._content)

    def group(self, name: str) -> list[TemplateText]:
        """All templates of one data set. Raises ValueError naming the group and the key that is wrong."""
        if name not in self._content:
            raise ValueError(f"{self.path} has no templates for {name!r}")
        where = f"{self.path}: {name}"
        plain = parse_yaml(self._content[name], where)
        if not isinstance(plain, dict) or not isinstance(plain.get("templates"), dict):
            raise ValueError(f"{where}: key 'templates' must be a mapping")
        return [_template(item, f"{where}: templates.{key}") for key, item in plain["templates"].items()]


def read(context: Context) -> Iterator[TaskReader]:
    """Each task of the source, with the templates that ask for the original task."""
    groups = TemplateGroups(context.path(context.source.path))
    for name, settings in context.source.tasks.items():
        texts = groups.group(settings.template or name)
        kept = [text for text in texts if text.original_task]
        if not kept:
            raise ValueError(f"{context.where}: no template of {settings.template or name} asks for the original task")
        templates = []
        for text in kept:
            try:
                templates.append(PromptSourceTemplate(context.renderer, text.name, text.jinja, text.answer_choices))
            except TemplateError as error:
                raise ValueError(f"{context.where}: template {text.name!r} of {name} {error}") from error
        files = context.files(name, settings)
        info = context.info(
            name,
            settings,
            "instance",
            tuple(files),
            dropped_templates=tuple(text.name for text in texts if not text.original_task),
        )
        mapper = context.field_mapper(name, settings)
        yield TaskReader(info, partial(_examples, info, files, templates, mapper, context.seed))


def _examples(
    info: TaskInfo, files: dict[str, Path], templates: list[PromptSourceTemplate], mapper: FieldMapper, seed: int
) -> Iterator[Example | Skipped]:
    for item in mapped_rows(files, mapper):
        if isinstance(item, Skipped):
            yield item
            continue
        split, row, fields = item
        example = identity(row.fields)
        protected = protect(fields)
        for template in templates:
            try:
                rendered = template.apply(protected, f"{seed}/{info.name}/{template.name}/{example}")
            except TemplateError as error:
                yield Skipped(template.name, row.where, str(error), True, split)
                continue
            if rendered is None:
                yield Skipped(template.name, row.where, "does not apply", False, split)
                continue
            prompt, targets, candidates = rendered
            record = info.record(prompt, "", targets, candidates=candidates, template=template.name, example=example)
            yield Example(record, split)


def _group(path: str) -> str:
    return re.sub(r"^(.*/)?templates/(?=.+/templates\.yaml$)|/templates\.yaml$", "", path)


def _template(item: Any, where: str) -> TemplateText:
    if not isinstance(item, dict):
        raise ValueError(f"{where} must be a !Template")
    for key in ("name", "jinja"):
        if not isinstance(item.get(key), str):
            raise ValueError(f"{where}: key {key!r} ({item.get(key)!r}) must be a text")
    choices = item.get("answer_choices")
    if choices is not None and not isinstance(choices, str):
        raise ValueError(f"{where}: key 'answer_choices' ({choices!r}) must be a text or null")
    metadata = item.get("metadata")
    original = metadata.get("original_task") if isinstance(metadata, dict) else None
    return TemplateText(item["name"], item["jinja"], choices, original is True)
