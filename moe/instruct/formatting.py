"""How a record becomes text: what the model reads, and the target it is to write (Iyer et al. 2022).

Training and evaluation make their prompts here. Everything that varies from example to example is in a `Layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe.instruct.records import Record

# the eight of the paper, whose print of the last one is broken
DELIMITERS = ("\nAnswer:", " Answer:", "\nA:", " A:", "\nOutput:", " Output:", "\nanswer:", "\noutput:")
# in front of a task's definition and of its input: what the paper's printed examples show
INSTRUCTION_LEADS = ("", "Instructions: ", "Task: ")
INPUT_LEADS = ("", "Input: ")
TRAINING_SEPARATOR = "\n\n\n"  # between examples, as in MetaICL
EVALUATION_SEPARATOR = "\n\n"  # a tuned model overfits the separator it was trained with (Iyer et al. 2022)
_PART_BREAK = "\n\n"  # between the definition of a task and what follows it


class Layout(NamedTuple):
    """The choices that the wording of one example leaves open."""

    delimiter: str = DELIMITERS[0]
    instruction_lead: str = ""
    input_lead: str = ""
    separator: str = EVALUATION_SEPARATOR


class Formatted(NamedTuple):
    """An example as text. The model reads `source`, a space and `target`; with no source, the target alone."""

    source: str
    target: str
    first_label_end: int  # characters of `source` before the first demonstration's answer; all of it without any


def draw_layout(random: np.random.Generator, *, separator: str = EVALUATION_SEPARATOR) -> Layout:
    """Delimiter and lead-ins, each evenly from its list."""
    delimiter, instruction, given = (
        choices[int(random.integers(len(choices)))] for choices in (DELIMITERS, INSTRUCTION_LEADS, INPUT_LEADS)
    )
    return Layout(delimiter, instruction, given, separator)


def format_record(record: Record, layout: Layout = Layout(), demonstrations: Sequence[Record] = ()) -> Formatted:  # noqa: B008 - immutable
    """The source and the first target of `record`, behind `demonstrations` of the same task.

    A task's definition stands once, in front of the demonstrations, which stand between it and the example. With a
    template, or one sentence for the task, every example is complete in itself and the demonstrations stand in front.
    A record without instruction and input (a dialogue) has an empty source. Raises ValueError for an empty target.
    """
    defined = record.style == "task"
    parts = [layout.instruction_lead + record.instruction] if defined and record.instruction.strip() else []
    front = _PART_BREAK.join(parts)
    examples: list[str] = []
    first_label_end: int | None = None
    for shown in demonstrations:
        asked = _question(shown, layout)
        if first_label_end is None:
            first_label_end = len(_behind(front, asked))
        examples.append(join(asked, _target(shown)))
    # without an input of its own, what stands last is the definition, and it is what the delimiter follows
    question = _question(record, layout, front=front if not examples else "")
    source = _behind(front, layout.separator.join([*examples, question]))
    return Formatted(source, _target(record), len(source) if first_label_end is None else first_label_end)


def join(source: str, target: str) -> str:
    """Source and target as one text: a space between, no spaces before it, no white space at the end."""
    source, target = source.rstrip(" "), target.rstrip()
    return f"{source} {target}" if source else target


def _question(record: Record, layout: Layout, front: str = "") -> str:
    """What belongs to this example, up to the delimiter, which a colon already stands for."""
    if record.style == "task":
        text = layout.input_lead + record.input if record.input.strip() else ""
    elif record.style == "keyword":
        text = "\n".join(part for part in (record.instruction, record.input) if part.strip())
    else:
        text = record.instruction
    asked = text if text.strip() else front
    if not asked.strip() or asked.rstrip().endswith(":"):
        return text
    return text + layout.delimiter


def _behind(front: str, text: str) -> str:
    """`text` after the definition; a delimiter alone stands right behind it."""
    if not front or not text:
        return front + text
    return front + text if text in DELIMITERS else front + _PART_BREAK + text


def _target(record: Record) -> str:
    if not record.targets or not record.targets[0].strip():
        raise ValueError(
            f"a record of {record.task} (example {record.example!r}) has an empty target: nothing would be learned "
            f"from it; leave it out of the benchmark"
        )
    return record.targets[0]
