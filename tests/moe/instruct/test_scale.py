"""The size of Super-NaturalInstructions: 1,600 task files of 76 categories, in a process that counts its memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from moe.instruct.categories import Categories

ROOT = Path(__file__).parents[3]
TASKS, INSTANCES = 1600, 40
MAXIMUM_SECONDS = 120.0  # of the shared cores; 11 were measured
MAXIMUM_BYTES = 2 * 2**30
PROGRAM = """
import json, resource, sys, time
from pathlib import Path
from moe.instruct import build, load_definition
start = time.perf_counter()
benchmark = build(load_definition(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]))
seconds = time.perf_counter() - start
bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([seconds, bytes, "torch" in sys.modules]))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scale")
    (root / "tasks").mkdir()
    rng = random.Random(0)
    words = [f"word{i}" for i in range(5000)]
    names = Categories.load().names[:76]
    for number in range(TASKS):
        instances = [
            {"id": f"{i}", "input": " ".join(rng.choices(words, k=40)), "output": [" ".join(rng.choices(words, k=3))]}
            for i in range(INSTANCES)
        ]
        task = {
            "Source": [f"source{number // 2}"],  # two tasks share each source
            "Categories": [names[number % 76]],
            "Definition": [f"Definition of task {number}: {' '.join(rng.choices(words, k=20))}"],
            "Instances": instances,
        }
        (root / "tasks" / f"task{number:04}_source{number // 2}_x.json").write_text(json.dumps(task))
    return root


def test_sixteen_hundred_tasks(tree: Path) -> None:
    definition = {
        "name": "scale",
        "sources": [{"reader": "super_natural_instructions", "benchmark": "sni", "licence": "none", "path": "tasks"}],
        "splits": {
            "held_out_categories": {"validation": 5, "test": 10},
            "held_out_tasks": {"validation": 20, "test": 40},
            "held_out_instances": {"test": 20},
            "on_shared_source": "drop_train",
        },
    }
    (tree / "scale.yaml").write_text(json.dumps(definition))
    arguments = [str(tree / "scale.yaml"), str(tree), str(tree / "out")]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    seconds, memory, has_torch = json.loads(result.stdout)
    assert seconds < MAXIMUM_SECONDS
    assert memory < MAXIMUM_BYTES
    assert not has_torch
    manifest = json.loads((tree / "out" / "manifest.json").read_text())
    entries = {
        split: json.loads((tree / "out" / split / "manifest.json").read_text())["tasks"]
        for split in ("train", "validation", "test")
    }
    trained = {entry["task"] for entry in entries["train"]}
    evaluated = [entry for split in ("validation", "test") for entry in entries[split]]
    held_out = {entry["task"] for entry in evaluated if entry["level"] in (1, 2)}
    assert len(manifest["held_out_categories"]) >= 15
    assert len(trained) + len(held_out) + len(manifest["removed"]) == TASKS
    assert not trained & held_out
    assert not {entry["category"] for entry in entries["train"]} & set(manifest["held_out_categories"])
    sources = {entry["data_source"] for entry in entries["train"]}
    assert not sources & {entry["data_source"] for entry in evaluated if entry["level"] in (1, 2)}
    assert manifest["overlaps_above_threshold"] == 0
