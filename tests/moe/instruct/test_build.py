from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe.cli import app
from moe.instruct import Benchmark, build
from moe.instruct.benchmark import changed_inputs
from moe.instruct.caps import Sample
from moe.instruct.definition import find_definition, load_definition, parse_definition
from tests.moe.instruct.conftest import SUPER_NI, WriteTask, define, record

LEVELS = {
    "held_out_categories": {"test": ["Textual Entailment"]},
    "held_out_tasks": {"validation": ["bench/task1_b_x"]},
    "held_out_instances": {"test": ["bench/task2_c_x"]},
}


@pytest.fixture
def tree(tmp_path: Path, write_task: WriteTask) -> Path:
    for number, source in enumerate("abcd"):
        write_task(f"task{number}_{source}_x")
    write_task("task9_rte_x", category="Textual Entailment")
    return tmp_path


def inputs(benchmark: Benchmark, split: str, task: str) -> set[str]:
    return {record.input for record in benchmark.records(split, task)}


def test_a_benchmark_of_three_levels(tree: Path) -> None:
    benchmark = build(define(SUPER_NI, **LEVELS), tree, tree / "out")
    assert {(e.task, e.level) for e in benchmark.tasks("test")} == {("bench/task9_rte_x", 1), ("bench/task2_c_x", 3)}
    assert [(e.task, e.level, e.records) for e in benchmark.tasks("validation")] == [("bench/task1_b_x", 2, 100)]
    assert [e.task for e in benchmark.tasks("train")] == ["bench/task0_a_x", "bench/task2_c_x", "bench/task3_d_x"]
    assert len(inputs(benchmark, "train", "bench/task0_a_x")) == 120
    trained, tested = (inputs(benchmark, split, "bench/task2_c_x") for split in ("train", "test"))
    assert (len(trained), len(tested), trained & tested) == (60, 60, set())
    assert benchmark.manifest["held_out_categories"] == ["Textual Entailment"]
    assert sum(1 for _ in benchmark.records("train")) == benchmark.manifest["splits"]["train"]["records"]


def test_the_same_again_and_another_seed(tree: Path) -> None:
    first, again = (build(define(SUPER_NI | {"cap": 50}, **LEVELS), tree, tree / name) for name in ("a", "b"))
    assert first.manifest == again.manifest
    other = build(
        parse_definition(
            {
                "name": "test",
                "seed": 1,
                "sources": [SUPER_NI | {"licence": "MIT", "benchmark": "bench", "cap": 50}],
                "splits": LEVELS,
            },
            "x",
        ),
        tree,
        tree / "c",
    )
    assert inputs(other, "train", "bench/task0_a_x") != inputs(first, "train", "bench/task0_a_x")


def test_caps(tree: Path) -> None:
    benchmark = build(define(SUPER_NI | {"cap": 50}, validation_records=30, **LEVELS), tree, tree / "out")
    assert [(e.records, e.seen) for e in benchmark.tasks("train")] == [(50, 120), (50, 60), (50, 120)]
    assert benchmark.tasks("validation")[0].records == 30


def test_a_sample_does_not_depend_on_order_and_smaller_ones_are_inside_larger() -> None:
    records = [record(f"text {i}", example=str(i), template=f"t{i % 3}") for i in range(500)]
    shuffled = random.Random(0).sample(records, 500)
    drawn = {}
    for limit in (10, 50):
        one, two = Sample(limit, 7), Sample(limit, 7, by_template=True)
        for item in records:
            one.add(item)
        for item in shuffled:
            two.add(item)
        assert one.drawn() == two.drawn()
        drawn[limit] = one.drawn()
        left = two.drawn(without={"t1"})
        assert len(left) == limit
        assert {item.template for item in left} == {"t0", "t2"}
    assert drawn[50][:10] == drawn[10]
    assert 100 < sum(int(item.example) for item in drawn[50]) / 50 < 400  # not the first ones


def promptsource(tree: Path, templates: int, condition: str = "true") -> dict:
    folder = tree / "templates" / "quiz"
    folder.mkdir(parents=True, exist_ok=True)
    items = "".join(
        f"  u{i}: !Template {{name: n{i}, answer_choices: null, "
        f"jinja: '{{% if {condition} or {i} == 0 %}}v{i} {{{{ q }}}} ||| {{{{ a }}}}{{% endif %}}', "
        f"metadata: !TemplateMetadata {{original_task: true}}}}\n"
        for i in range(templates)
    )
    (folder / "templates.yaml").write_text(f"dataset: quiz\ntemplates:\n{items}")
    (tree / "raw.jsonl").write_text("".join(json.dumps({"q": f"q{i}", "a": f"a{i}"}) + "\n" for i in range(40)))
    task = {"category": "Question Answering", "files": {"all": "raw.jsonl"}}
    return {"reader": "promptsource", "path": "templates", "tasks": {"quiz": task}}


@pytest.mark.parametrize("templates", [1, 7])
def test_the_weight_of_a_task_does_not_depend_on_its_templates(tmp_path: Path, templates: int) -> None:
    entry = build(define(promptsource(tmp_path, templates)), tmp_path, tmp_path / "out").tasks("train")[0]
    assert (entry.records, entry.seen) == (40, 40 * templates)


def test_evaluation_has_every_prompt_but_no_partial_template(tmp_path: Path, write_task: WriteTask) -> None:
    write_task("task1_other_x", category="Summarization")
    source = promptsource(tmp_path, 3, condition='q[-1] == "1"')
    held = {"held_out_categories": {"test": ["Question Answering"]}}
    benchmark = build(define(SUPER_NI, source, **held), tmp_path, tmp_path / "a")
    assert {(r.template, r.example) for r in benchmark.records("test")} == {
        ("n0", r.example) for r in benchmark.records("test")
    }
    assert benchmark.tasks("test")[0].records == 40
    assert benchmark.manifest["templates"]["bench/quiz"]["partial"] == ["n1", "n2"]
    kept = build(define(SUPER_NI, source, keep_partial_templates=["bench/quiz"], **held), tmp_path, tmp_path / "b")
    assert kept.tasks("test")[0].records == 40 + 2 * 4


def test_failures_are_counted_or_errors(tree: Path) -> None:
    path = tree / "tasks" / "task0_a_x.json"
    task = json.loads(path.read_text())
    task["Instances"][5]["output"] = [" "]
    path.write_text(json.dumps(task))
    entry = build(define(SUPER_NI), tree, tree / "out").entry("train", "bench/task0_a_x")
    assert (entry.records, entry.skipped) == (119, {"it has an empty target": 1})
    with pytest.raises(ValueError, match=r"task bench/task0_a_x, example \w+: 'task0_a_x question 5': it has an empty"):
        build(define(SUPER_NI), tree, tree / "strict", strict=True)
    task["Instances"] = task["Instances"][5:6]
    path.write_text(json.dumps(task))
    with pytest.raises(ValueError, match=r"bench/task0_a_x gives no record for train: it has an empty target \(1\)"):
        build(define(SUPER_NI), tree, tree / "none")
    assert sorted(item.name for item in tree.iterdir()) == ["out", "tasks"]  # nothing half written


def test_a_leak_stops_the_build_and_is_named(tree: Path, write_task: WriteTask) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choice("abcdefghij") * 3 + str(rng.randrange(99)) for _ in range(20)) for _ in range(100)]
    rows = [{"input": text, "output": ["yes"]} for text in texts]
    write_task("task8_mnli_x", category="Textual Entailment", Instances=rows)
    path = tree / "tasks" / "task3_d_x.json"
    task = json.loads(path.read_text())
    task["Instances"] += [{"input": f"copied: {text}", "output": ["no"]} for text in texts[:2]]
    path.write_text(json.dumps(task))
    with pytest.raises(ValueError) as error:
        build(define(SUPER_NI, **LEVELS), tree, tree / "out")
    assert "2.0% of test/bench/task8_mnli_x (2 of 100) is inside bench/task3_d_x" in str(error.value)
    assert not (tree / "out").exists()
    report = json.loads((tree / "out.overlaps.json").read_text())
    assert [(pair["train"], pair["share"]) for pair in report["pairs"]] == [("bench/task3_d_x", 0.02)]
    # at the threshold a pair is not above it; a stated reason, or leaving the training task out, lets it pass
    build(define(SUPER_NI, overlap_threshold=0.02, **LEVELS), tree, tree / "a")
    reason = {"train": "bench/task3_d_x", "evaluation": "bench/task8_mnli_x", "reason": "labels differ"}
    build(define(SUPER_NI, allowed_overlaps=[reason], **LEVELS), tree, tree / "b")
    dropped = build(define(SUPER_NI, on_overlap="drop_train", **LEVELS), tree, tree / "c")
    assert "bench/task3_d_x" not in {entry.task for entry in dropped.tasks("train")}
    assert dropped.manifest["removed"]["bench/task3_d_x"].startswith("2.0 % of test/bench/task8_mnli_x")
    with pytest.raises(ValueError, match="no pair of bench/nothing in training and"):
        build(define(SUPER_NI, allowed_overlaps=[reason | {"train": "bench/nothing"}], **LEVELS), tree, tree / "d")


def test_a_benchmark_is_frozen(tree: Path) -> None:
    out = tree / "out"
    benchmark = build(define(SUPER_NI, **LEVELS), tree, out)
    with pytest.raises(ValueError, match="exists: a benchmark is frozen"):
        build(define(SUPER_NI, **LEVELS), tree, out)
    path = out / benchmark.tasks("train")[0].file
    content = path.read_bytes()
    path.write_bytes(content.replace(b"question 7", b"question 8"))
    with pytest.raises(ValueError, match=r"task0_a_x.jsonl does not match the manifest"):
        Benchmark(out)
    path.unlink()
    with pytest.raises(ValueError, match=r"task0_a_x.jsonl is missing"):
        Benchmark(out)
    path.write_bytes(content)
    Benchmark(out)
    manifest = out / "test" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"level": 1', '"level": 2'))
    with pytest.raises(ValueError, match=r"test/manifest.json does not match the manifest"):
        Benchmark(out, verify=False)


def test_changed_downloads_are_found(tree: Path, write_task: WriteTask) -> None:
    benchmark = build(define(SUPER_NI, **LEVELS), tree, tree / "out")
    assert changed_inputs(benchmark, tree) == []
    write_task("task0_a_x", count=3)
    (tree / "tasks" / "task3_d_x.json").unlink()
    assert changed_inputs(benchmark, tree) == ["tasks/task0_a_x.json", "tasks/task3_d_x.json"]


def test_the_catalogue_shows_every_task_and_escapes_its_text(tree: Path, write_task: WriteTask) -> None:
    rows = [{"input": "<script>alert(1)</script>", "output": ["<b>"]}]
    write_task("task7_markup_x", Instances=rows)
    benchmark = build(define(SUPER_NI, **LEVELS), tree, tree / "out")
    page = (tree / "out" / "catalogue.html").read_text()
    assert all(
        f"<summary>{e.task}" in page for split in ("train", "validation", "test") for e in benchmark.tasks(split)
    )
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<script>") == 1
    assert "held-out category" in page


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"sources": []}, "sources must be a list with at least one source"),
        ({"sorces": []}, "there is no key 'sorces'; did you mean sources?"),
        ({"name": "x", "sources": [{"reader": "r"}]}, "sources[0]: benchmark must be given"),
        (
            {"name": "x", "sources": [{"reader": "r", "benchmark": "b", "licence": "l", "cap": 0}]},
            "cap (0) must be above 0",
        ),
        ({"name": "x", "sources": [{"reader": 3}]}, "sources[0]: reader (3) must be str"),
        ({"name": "x", "sources": [{"raeder": "r"}]}, "there is no key 'raeder'; did you mean reader?"),
        ({"splits": {"on_overlap": "go"}}, "splits.on_overlap ('go') must be one of: stop, drop_train, report"),
        ({"splits": {"held_out_tasks": {"dev": 1}}}, "splits.held_out_tasks has 'dev'"),
        (
            {"splits": {"held_out_tasks": {"test": True}}},
            "splits.held_out_tasks.test (True) must be a list of names or",
        ),
        ({"splits": {"overlap_threshold": 1.0}}, "splits.overlap_threshold (1.0) must be at least 0 and below 0.5"),
    ],
)
def test_a_definition_says_what_is_wrong(plain: dict, message: str) -> None:
    source = {"reader": "r", "benchmark": "b", "licence": "l"}
    with pytest.raises(ValueError) as error:
        parse_definition({"name": "x", "sources": [source]} | plain, "d.yaml")
    assert message in str(error.value)
    assert "d.yaml" in str(error.value)


def test_the_command(tree: Path) -> None:
    definition = tree / "mine.yaml"
    definition.write_text(
        json.dumps({"name": "mine", "sources": [SUPER_NI | {"licence": "MIT", "benchmark": "bench"}]})
    )
    out = str(tree / "out")
    run = lambda *arguments: CliRunner().invoke(app, ["instruct", *arguments])  # noqa: E731
    built = run("build", str(definition), str(tree), out)
    assert built.exit_code == 0, built.output
    assert "train: 5 tasks in 2 categories, 600 records" in built.output
    assert "is what was built" in run("check", out, "--data", str(tree)).output
    assert "bench/task9_rte_x\tTextual Entailment\t-\t120" in run("show", out).output
    shown = run("show", out, "--task", "bench/task0_a_x", "--count", "2").output.strip().split("\n")
    assert [json.loads(line)["task"] for line in shown] == ["bench/task0_a_x"] * 2
    (tree / "tasks" / "task0_a_x.json").unlink()
    failed = run("check", out, "--data", str(tree))
    assert "1 inputs are not those that" in str(failed.exception)
    with pytest.raises(ValueError, match=r"benchmark 'publik' is neither a \.yaml file nor one of: public"):
        find_definition("publik")
    assert load_definition(find_definition("public")).name == "public"
