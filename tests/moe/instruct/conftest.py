"""Small collections in their published formats, written where a test needs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe.instruct.definition import Definition, parse_definition
from moe.instruct.records import Record

WriteTask = Callable[..., Path]


@pytest.fixture
def write_task(tmp_path: Path) -> WriteTask:
    """Write one Super-NaturalInstructions file under tmp_path/tasks."""

    def write(name: str, category: str = "Question Answering", source: str = "", count: int = 120, **keys: Any) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        task: dict[str, Any] = {
            "Contributors": ["nobody"],
            "Source": [source or name.split("_")[1]],
            "Categories": [category],
            "Definition": [f"Do what {name} asks for."],
            "Positive Examples": [{"input": "a", "output": "b", "explanation": "c"}],
            "Negative Examples": [],
            "Instances": [
                {"id": f"{name}-{i}", "input": f"{name} question {i}", "output": [f"answer {i}"]} for i in range(count)
            ],
            "Instance License": ["MIT"],
        }
        path = folder / f"{name}.json"
        path.write_text(json.dumps(task | keys))
        return path

    return write


def define(*sources: dict[str, Any], **splits: Any) -> Definition:
    """A definition of some sources; `splits` are its rules."""
    plain = [{"licence": "MIT", "benchmark": "bench", **source} for source in sources]
    return parse_definition({"name": "test", "sources": plain, "splits": splits}, "test.yaml")


SUPER_NI = {"reader": "super_natural_instructions", "path": "tasks"}


def record(text: str = "text", target: str = "target", **changes: Any) -> Record:
    base = Record("bench/task", "bench", "Question Answering", "source", "task", "Do it.", text, (target,))
    return base._replace(**changes)
