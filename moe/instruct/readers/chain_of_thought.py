"""FLAN's chain-of-thought TSVs: question, answer and rationale, no header; a line break is written as `\\n`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from moe.instruct.readers.tasks import Context, Example, Skipped, TaskInfo, TaskReader, identity, split_rows

COLUMNS = ("question", "answer", "rationale")
TARGET = "{rationale}\nSo the answer is {answer}."  # the rationale comes first, so that the answer can follow from it


def read(context: Context) -> Iterator[TaskReader]:
    """Each task of the source. The option `target` replaces TARGET; it must hold {rationale} and {answer}."""
    target = context.source.options.get("target", TARGET)
    if not isinstance(target, str) or "{answer}" not in target or "{rationale}" not in target:
        raise ValueError(f"{context.where}: option target ({target!r}) must hold {{rationale}} and {{answer}}")
    for name, settings in context.source.tasks.items():
        files = context.files(name, settings)
        info = context.info(name, settings, "task", tuple(files))
        yield TaskReader(info, partial(_examples, info, files, context.instruction(name, settings), target))


def _examples(info: TaskInfo, files: dict[str, Path], instruction: str, form: str) -> Iterator[Example | Skipped]:
    for split, row in split_rows(files, COLUMNS):
        question, answer, rationale = (row.fields[name].replace("\\n", "\n").strip() for name in COLUMNS)
        if not answer or not rationale:
            yield Skipped("", row.where, f"its {'rationale' if answer else 'answer'} is empty", True, split)
            continue
        # the data may contain braces, so the answer is put into our own form first and the rationale around it
        before, after = form.split("{rationale}", 1)
        target = before.replace("{answer}", answer) + rationale + after.replace("{answer}", answer)
        yield Example(info.record(instruction, question, (target,), example=identity(question)), split)
