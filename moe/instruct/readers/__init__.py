"""One reader per published format. A reader lists its tasks immediately and streams their examples later."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moe.instruct.readers import (
    chain_of_thought,
    dialogue,
    flan,
    instruction_jsonl,
    promptsource,
    rows,
    source_target,
    structured,
    super_natural_instructions,
    t0_rendered,
)
from moe.instruct.readers.tasks import Context, TaskReader

READERS: dict[str, Callable[[Context], Iterator[TaskReader]]] = {
    "super_natural_instructions": super_natural_instructions.read,
    "promptsource": promptsource.read,
    "t0_rendered": t0_rendered.read,
    "flan": flan.read,
    "source_target": source_target.read,
    "structured": structured.read,
    "chain_of_thought": chain_of_thought.read,
    "dialogue": dialogue.read,
    "instruction_jsonl": instruction_jsonl.read,
    "rows": rows.read,
}

__all__ = ["READERS"]
