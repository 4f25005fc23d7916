"""Turns a record into text: the source that the model reads and the target that it should write (Iyer et al. 2022).

Training and evaluation both build their prompts here. A `Layout` holds everything that varies between examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe.instruct.records import Record

# the paper's eight delimiters; the last one is garbled in print
DELIMITERS = ("\nAnswer:", " Answer:", "\nA:", " A:", "\nOutput:", " Output:", "\nanswer:", "\noutput:")
# before a task's definition and before its input, as in the paper's printed examples
INSTRUCTION_LEADS = ("", "Instructions: ", "Task: ")
INPUT_LEADS = ("", "Input: ")
TRAINING_SEPARATOR = "\n\n\n"  # between examples, as in MetaICL
EVALUATION_SEPARATOR = "\n\n"  # another one: a tuned model overfits its training separator (Iyer et al. 2022)
_PART_BREAK = "\n\n"  # between a task's definition and the text after it


class Layout(NamedTuple):
    """The parts of an example's text that its record does not determine."""

    delimiter: str = DELIMITERS[0]
    instruction_lead: str = ""
    input_lead: str = ""
    separator: str = EVALUATION_SEPARATOR


class Formatted(NamedTuple):
    """An example as text. The model reads `source`, a space and `target`, or only `target` if `source` is empty."""

    source: str
    target: str
    first_label_end: int  # characters of `source` before the first demonstration's answer; without one, its length


def draw_layout(random: np.random.Generator, *, separator: str = EVALUATION_SEPARATOR) -> Layout:
    """Draw the delimiter and both lead-ins, each uniformly from its list."""
    delimiter, instruction, given = (
        choices[int(random.integers(len(choices)))] for choices in (DELIMITERS, INSTRUCTION_LEADS, INPUT_LEADS)
    )
    return Layout(delimiter, instruction, given, separator)


def format_record(record: Record, layout: Layout = Layout(), demonstrations: Sequence[Record] = ()) -> Formatted:  # noqa: B008 - immutable
    """Format `record` with its first target, after `demonstrations` of the same task.

    In the style "task", the definition is written once: before the demonstrations, which precede the example. In the
    other styles (a template, or one sentence per task) every example is complete in itself. A record without
    instruction and input (a dialogue) has an empty source. Raises ValueError for an empty target.
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
    # if the record has no input and no demonstrations, the definition comes last and the delimiter follows it
    question = _question(record, layout, front=front if not examples else "")
    source = _behind(front, layout.separator.join([*examples, question]))
    return Formatted(source, _target(record), len(source) if first_label_end is None else first_label_end)


def join(source: str, target: str) -> str:
    """Join source and target with exactly one space, and strip white space from the end."""
    source, target = source.rstrip(" "), target.rstrip()
    return f"{source} {target}" if source else target


def _question(record: Record, layout: Layout, front: str = "") -> str:
    """The text of one example up to and including the delimiter, which is left out after a final colon.

    front: the definition, if it directly precedes this example; it then decides about the delimiter of an empty input.
    """
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
    """`text` after the definition `front`. A text that is only a delimiter follows it without a break."""
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
