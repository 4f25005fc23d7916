"""The benchmark of real public files, and the overlap that is known to be in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe.instruct import Benchmark, Categories, Definition, build, find_definition, load_definition
from moe.instruct.build import find_tasks
from moe.instruct.splits import plan_splits
from tests.moe.instruct.conftest import define
from tests.shared_data import FOLDER, shared_data

FROZEN = Path(__file__).parents[3] / "docs/opt_iml_run/bench"  # of the experiment in docs/opt_iml.md

# the tests build a part of it: the formats are the same, and all of it takes a minute on shared cores
LEFT_OUT = ("glue/mnli", "commonsense_qa", "super_glue/boolq", "mnli", "bool_q", "ARC", "arc", "piqa", "taskmaster4")
CAP = 300  # records of a task
MINIMUM_SHARE = 0.3  # of CommonsenseQA's dev set inside either training set; 0.64 and 0.42 are found


@pytest.fixture(scope="module")
def definition() -> Definition:
    shared_data("superni_subset")
    return load_definition(find_definition("public"))


@pytest.fixture(scope="module")
def benchmark(definition: Definition, tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    sources = []
    for source in definition.sources:
        left = {name: task for name, task in source.tasks.items() if source.reader == "t0_rendered" or not _out(name)}
        sources.append(replace(source, cap=CAP, tasks=left))
    rules = definition.splits
    held = {
        key: {split: [name for name in names if not _out(name)] for split, names in getattr(rules, key).items()}
        for key in ("held_out_categories", "held_out_tasks", "held_out_instances")
    }
    held["held_out_categories"]["test"].remove("Textual Entailment")
    part = replace(definition, sources=tuple(sources), splits=replace(rules, **held))
    return build(part, FOLDER, tmp_path_factory.mktemp("b") / "public")


def _out(name: str) -> bool:
    return any(part in name for part in LEFT_OUT)


def test_the_public_benchmark_is_large_enough(definition: Definition) -> None:
    infos = [reader.info for reader in find_tasks(definition, FOLDER, Categories.load()).readers]
    plan = plan_splits(infos, definition.splits, definition.seed)
    assert len(infos) >= 40
    assert len({info.category for info in infos}) >= 12
    held_out = {info.category for info in infos if plan.roles[info.name].level == 1}
    assert held_out >= {"Textual Entailment", "Cause Effect Classification", "Coreference Resolution"}
    assert {role.level for role in plan.roles.values()} == {1, 2, 3, None}
    assert not plan.removed


def test_every_record_of_the_public_benchmark_is_whole(benchmark: Benchmark) -> None:
    count = 0
    for split in ("train", "validation", "test"):
        for entry in benchmark.tasks(split):
            for record in benchmark.records(split, entry.task):
                assert record.category == entry.category
                assert "{{" not in record.body
                assert "<|endoftext|>" not in record.targets[0]
                count += 1
    assert count > 10_000


def test_the_benchmark_of_the_experiment_is_built_again(definition: Definition, tmp_path: Path) -> None:
    """All of it, to the hash of every file: counts, order, wording and splits are those of docs/opt_iml.md."""
    build(definition, FOLDER, tmp_path / "bench")
    names = sorted(path.relative_to(FROZEN) for path in FROZEN.rglob("*.json"))
    assert len(names) == 5
    for name in names:
        assert json.loads((tmp_path / "bench" / name).read_text()) == json.loads((FROZEN / name).read_text()), name


def test_rendered_by_us_and_rendered_by_t0_agree(benchmark: Benchmark) -> None:
    """T0's rows were rendered by PromptSource's own code: our prompts of the same templates end and begin as theirs."""
    definition = define(
        {
            "reader": "promptsource",
            "path": "promptsource_templates/templates.tar.gz",
            "tasks": {
                "commonsense_qa": {
                    "category": "multiple_choice_qa",
                    "files": {"train": "reasoning_small/CommonsenseQA_train_rand_split.jsonl.gz"},
                    "fields": {
                        "question": "row.question.stem",
                        "choices": "{'text': row.question.choices | map(attribute='text') | list, "
                        "'label': row.question.choices | map(attribute='label') | list}",
                    },
                }
            },
        }
    )
    reader = find_tasks(definition, FOLDER, Categories.load()).readers[0]
    ours: dict[tuple[str, str], set[str]] = {}
    for item in reader.read():
        record: Any = item.record
        ours.setdefault((record.template, record.instruction), set()).update(record.targets)
    theirs = list(benchmark.records("train", "t0/commonsense_qa"))
    same = [r for r in theirs if r.targets[0] in ours.get((r.template, r.instruction), ())]
    assert len(theirs) == CAP
    assert len(same) / len(theirs) > 0.98  # a few of T0's prompts were cut at 2048 characters or differ in spaces


def test_the_known_overlap_of_commonsense_qa_is_found(tmp_path: Path) -> None:
    shared_data("reasoning_small")
    source = {
        "reader": "promptsource",
        "path": "promptsource_templates/templates.tar.gz",
        "tasks": {
            "commonsense_qa": {
                "category": "multiple_choice_qa",
                "files": {"validation": "reasoning_small/CommonsenseQA_dev_rand_split.jsonl"},
                "fields": {
                    "question": "row.question.stem",
                    "choices": "{'text': row.question.choices | map(attribute='text') | list, "
                    "'label': row.question.choices | map(attribute='label') | list}",
                },
            }
        },
    }
    ecqa = {"category": "cot", "instruction": "Explain.", "files": {"train": "flan_cot/ecqa_train.tsv.gz"}}
    creak = {"category": "cot", "instruction": "Explain.", "files": {"train": "flan_cot/creak_train.tsv.gz"}}
    definition = define(
        {"reader": "super_natural_instructions", "path": "superni_subset"},
        source,
        {"reader": "chain_of_thought", "tasks": {"ecqa": ecqa, "creak": creak}},
        held_out_tasks={"test": ["bench/commonsense_qa"]},
        on_overlap="drop_train",
    )
    benchmark = build(definition, FOLDER, tmp_path / "out")
    assert benchmark.manifest["removed"].keys() == {
        "bench/ecqa",
        "bench/task073_commonsenseqa_answer_generation",
    }
    for reason in benchmark.manifest["removed"].values():
        assert float(reason.split(" %")[0]) > 100 * MINIMUM_SHARE
    with pytest.raises(ValueError, match=r"of test/bench/commonsense_qa .* is inside bench/ecqa"):
        build(replace(definition, splits=replace(definition.splits, on_overlap="stop")), FOLDER, tmp_path / "stop")
