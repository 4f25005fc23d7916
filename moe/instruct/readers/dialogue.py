"""Dialogues: rows of {"turns": [[speaker, utterance], ...]}.

mode "next_turn" makes an example of every answer, with the turns before it as input; mode "whole" makes the entire
conversation the target of an empty input (Iyer et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from moe.instruct.readers.tasks import Context, Example, Skipped, TaskInfo, TaskReader, identity, split_rows

CONTEXT_TURNS = 8


def read(context: Context) -> Iterator[TaskReader]:
    """Each task of the source. Options: `mode`, and `context_turns`, the maximum number of turns before an answer."""
    mode = context.source.options.get("mode", "next_turn")
    turns = context.source.options.get("context_turns", CONTEXT_TURNS)
    if mode not in ("next_turn", "whole"):
        raise ValueError(f"{context.where}: option mode ({mode!r}) must be next_turn or whole")
    if not isinstance(turns, int) or turns < 1:
        raise ValueError(f"{context.where}: option context_turns ({turns!r}) must be a whole number above 0")
    for name, settings in context.source.tasks.items():
        files = context.files(name, settings)
        info = context.info(name, settings, "task", tuple(files))
        if mode == "whole":
            if settings.instruction:
                raise ValueError(
                    f"{context.where}: tasks.{name}.instruction must be left out: whole dialogues have none"
                )
            yield TaskReader(info, partial(_whole, info, files))
        else:
            instruction = context.instruction(name, settings)
            yield TaskReader(info, partial(_next_turns, info, files, instruction, turns))


def _next_turns(
    info: TaskInfo, files: dict[str, Path], instruction: str, context_turns: int
) -> Iterator[Example | Skipped]:
    for split, row in split_rows(files):
        turns = _turns(row.fields, row.where)
        dialogue = identity(turns)
        # every second turn is an answer; all turns of a dialogue stay in one split
        for position in range(1, len(turns), 2):
            history = "\n".join(turns[max(0, position - context_turns) : position])
            speaker, _, answer = turns[position].partition(": ")
            if not answer.strip():
                yield Skipped("", row.where, f"turn {position} is empty", True, split)
                continue
            record = info.record(
                instruction, f"{history}\n{speaker}:", (answer.strip(),), example=f"{dialogue}/{position}"
            )
            yield Example(record, split)


def _whole(info: TaskInfo, files: dict[str, Path]) -> Iterator[Example | Skipped]:
    for split, row in split_rows(files):
        text = "\n".join(_turns(row.fields, row.where))
        yield Example(info.record("", "", (text,), example=identity(row.fields["turns"])), split)


def _turns(fields: dict[str, Any], where: str) -> list[str]:
    turns = fields.get("turns")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: key 'turns' must be a list of [speaker, utterance]")
    for number, turn in enumerate(turns):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"{where}: turns[{number}] ({turn!r}) must be [speaker, utterance]")
    return [f"{speaker.strip().capitalize()}: {' '.join(text.split())}" for speaker, text in turns]
