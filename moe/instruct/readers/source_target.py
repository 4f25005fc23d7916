"""CrossFit, ExMix and T5 style: tab-separated `source \\t target`, further columns being other references. One sentence
of the definition introduces each task (Iyer et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from moe.instruct.raw_files import open_bytes
from moe.instruct.readers.tasks import Context, Example, Skipped, TaskInfo, TaskReader, identity


def read(context: Context) -> Iterator[TaskReader]:
    """Each task of the source. Raises ValueError naming the file and a line without a tab."""
    for name, settings in context.source.tasks.items():
        files = context.files(name, settings)
        info = context.info(name, settings, "keyword", tuple(files))
        yield TaskReader(info, partial(_examples, info, files, context.instruction(name, settings)))


def _examples(info: TaskInfo, files: dict[str, Path], instruction: str) -> Iterator[Example | Skipped]:
    for split, path in files.items():
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    source, *targets = line.decode("utf-8").rstrip("\r\n").split("\t")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path} line {number} is not UTF-8: {error}") from error
                if not targets:
                    if not source.strip():
                        continue
                    raise ValueError(f"{path} line {number} must be `source <tab> target`; it has no tab")
                record = info.record(
                    instruction, source.strip(), tuple(item.strip() for item in targets), example=identity(source)
                )
                yield Example(record, split)
