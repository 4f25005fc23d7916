"""Every published format, from a file as it is downloaded to records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe.instruct.build import find_tasks
from moe.instruct.categories import Categories
from moe.instruct.readers.structured import linearize
from moe.instruct.readers.tasks import Example, Skipped, TaskReader
from moe.instruct.records import Record
from tests.moe.instruct.conftest import SUPER_NI, WriteTask, define

QA = {"category": "Question Answering"}


def tasks(root: Path, source: dict[str, Any]) -> list[TaskReader]:
    return find_tasks(define(source), root, Categories.load()).readers


def records(reader: TaskReader) -> list[tuple[str, Record]]:
    return [(item.split, item.record) for item in reader.read() if isinstance(item, Example)]


def one(root: Path, reader: str, text: str, name: str = "f.jsonl", **settings: Any) -> TaskReader:
    """The only task of a source with one file."""
    (root / name).write_text(text)
    source = {"reader": reader, "tasks": {"t": QA | {"files": {"train": name}} | settings}}
    return tasks(root, source)[0]


def test_super_natural_instructions(tmp_path: Path, write_task: WriteTask) -> None:
    write_task("task1_squad_answer_generation")
    write_task("task2_imdb_old", category="Sentiment Analysis", Definition="An old text.", Source=None)
    new, old = tasks(tmp_path, SUPER_NI)
    assert new.info.name == "bench/task1_squad_answer_generation"
    assert (new.info.data_source, old.info.data_source) == ("squad", "imdb")
    assert (new.info.category, old.info.category, new.info.licence) == (
        "Question Answering",
        "Sentiment Analysis",
        "MIT",
    )
    found = records(new)
    assert [split for split, _ in found] == ["test"] * 60 + ["all"] * 40 + ["train"] * 20  # the test subset is 100
    assert found[3][1].instruction == "Do what task1_squad_answer_generation asks for."
    assert (found[3][1].input, found[3][1].targets) == ("task1_squad_answer_generation question 3", ("answer 3",))
    assert records(old)[0][1].instruction == "An old text."


def test_super_natural_instructions_derived_sets(tmp_path: Path) -> None:
    folder = tmp_path / "tasks" / "yelp"
    folder.mkdir(parents=True)
    for split, output in (("train", "good"), ("dev", "bad"), ("test", "unlisted")):
        task = {
            "Categories": "Sentiment Analysis",
            "Definition": ["D"],
            "Instances": [{"input": split, "output": output}],
        }
        (folder / f"{split}.json").write_text(json.dumps(task))
    (folder / "labels.json").write_text('["good", "bad"]')
    found = {split: record for split, record in records(tasks(tmp_path, SUPER_NI)[0])}
    assert {split: (r.targets, r.candidates) for split, r in found.items()} == {
        "train": (("good",), ("good", "bad")),
        "validation": (("bad",), ("good", "bad")),
        "test": (("unlisted",), ()),
    }


def test_super_natural_instructions_task_list(tmp_path: Path, write_task: WriteTask) -> None:
    for number in range(3):
        write_task(f"task{number}_s{number}_x")
    (tmp_path / "list.txt").write_text("task2_s2_x\ntask0_s0_x\n")
    source = SUPER_NI | {"options": {"task_list": "list.txt"}}
    assert [reader.info.name for reader in tasks(tmp_path, source)] == ["bench/task0_s0_x", "bench/task2_s2_x"]
    (tmp_path / "list.txt").write_text("task9_absent\n")
    with pytest.raises(ValueError, match=r"list.txt names task9_absent, which .*tasks does not have"):
        tasks(tmp_path, source)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"Definition": 3}, "key 'Definition' (3) must be a text or a list of texts"),
        ({"Categories": []}, "key 'Categories' ([]) must be a text or a list of texts"),
        ({"Instances": {}}, "key 'Instances' must be a list"),
        ({"Instances": [{"output": "x"}]}, "Instances[0]: key 'input' must be a text"),
        ({"Instances": [{"input": "x", "output": 3}]}, "Instances[0]: key 'output' must be a text or a list of texts"),
        (
            {"Categories": ["Question Anwsering"]},
            "category 'Question Anwsering' is unknown; near are: question answering",
        ),
    ],
)
def test_a_malformed_task_file_is_named_with_its_key(
    tmp_path: Path, write_task: WriteTask, keys: dict[str, Any], message: str
) -> None:
    write_task("task1_a_b", **keys)
    with pytest.raises(ValueError) as error:
        for reader in tasks(tmp_path, SUPER_NI):
            list(reader.read())
    assert "task1_a_b" in str(error.value)
    assert message in str(error.value)


def test_a_task_file_that_is_cut_off(tmp_path: Path, write_task: WriteTask) -> None:
    path = write_task("task1_a_b")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=r"task1_a_b.json is not JSON"):
        for reader in tasks(tmp_path, SUPER_NI):
            list(reader.read())


TEMPLATES = """
dataset: quiz
templates:
  u1: !Template
    {answer_choices: 'no ||| yes', id: u1, jinja: '{{q}}? ||| {{ answer_choices[label] }}', name: Plain One,
     reference: '', metadata: !TemplateMetadata {original_task: true, choices_in_prompt: false, metrics: []}}
  u2: !Template
    {answer_choices: null, id: u2, jinja: 'Ask what is {{ label }}. ||| {{q}}', name: inverted, reference: '',
     metadata: !TemplateMetadata {original_task: false}}
  u3: !Template
    {answer_choices: null, id: u3, jinja: '{% if label %}Really, {{ hint }} {{q}}? ||| yes{% endif %}', name: partial,
     reference: '', metadata: !TemplateMetadata {original_task: true}}
"""


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    folder = tmp_path / "templates" / "quiz" / "small"
    folder.mkdir(parents=True)
    (folder / "templates.yaml").write_text(TEMPLATES)
    return tmp_path


def test_promptsource_over_raw_rows(templates: Path) -> None:
    (templates / "raw.jsonl").write_text('{"text": "so", "y": 1}\n{"text": "no", "y": 0}\n{"text": "x", "y": 7}\n')
    settings = {
        **QA,
        "template": "quiz/small",
        "files": {"train": "raw.jsonl"},
        "fields": {"q": "text", "label": "y"},
        "where": "y < 5",
    }
    source = {"reader": "promptsource", "path": "templates", "tasks": {"quiz": settings}}
    reader = tasks(templates, source)[0]
    assert reader.info.dropped_templates == ("inverted",)
    items = list(reader.read())
    assert [(item.record.instruction, item.record.targets) for item in items if isinstance(item, Example)] == [
        ("so?", ("yes",)),
        ("no?", ("no",)),
    ]
    skipped = [(item.template, item.failed) for item in items if isinstance(item, Skipped)]
    assert skipped == [("partial", True), ("partial", False), ("", False)]  # lacks `hint`; does not apply; `where`


def test_promptsource_names_what_is_wrong(templates: Path) -> None:
    (templates / "raw.jsonl").write_text("{}\n")
    settings = QA | {"files": {"train": "raw.jsonl"}}
    source = {"reader": "promptsource", "path": "templates", "tasks": {"other": settings}}
    with pytest.raises(ValueError, match="has no templates for 'other'"):
        tasks(templates, source)
    path = templates / "templates" / "quiz" / "small" / "templates.yaml"
    path.write_text(TEMPLATES.replace("jinja: '{{q}}", "ninja: '{{q}}"))
    with pytest.raises(ValueError, match=r"quiz/small: templates.u1: key 'jinja' \(None\) must be a text"):
        tasks(templates, source | {"tasks": {"quiz/small": settings}})
    path.write_text("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="is not YAML: could not determine a constructor"):
        tasks(templates, source | {"tasks": {"quiz/small": settings}})


def test_rendered_t0(templates: Path) -> None:
    folder = templates / "t0"
    folder.mkdir()
    row = {"prompt": " so? ", "completion": "yes<|endoftext|>"}
    (folder / "quiz_small_Plain_One.jsonl").write_text(json.dumps(row))
    (folder / "quiz_small_inverted.jsonl").write_text(json.dumps(row))
    source = {
        "reader": "t0_rendered",
        "path": "t0",
        "options": {"templates": "templates"},
        "tasks": {"quiz/small": QA},
    }
    found = records(tasks(templates, source)[0])
    assert [(r.instruction, r.targets, r.template) for _, r in found] == [("so?", ("yes",), "Plain One")]
    # the same rows in one file per data set
    for path in folder.iterdir():
        path.unlink()
    rows = [row | {"dataset": "quiz", "template": f"small_{name}"} for name in ("Plain_One", "inverted")]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert records(tasks(templates, source)[0]) == found
    (folder / "quiz.jsonl").write_text(json.dumps(row | {"dataset": "quiz", "template": "small_new"}))
    with pytest.raises(ValueError, match="PromptSource has no template 'quiz_small_new' in quiz/small"):
        records(tasks(templates, source)[0])


def test_flan(tmp_path: Path) -> None:
    patterns = {"copa": [["{p}\n{options_}", "{answer}"], ["So: {p}\n{options_}", "{answer}"], ["Write.", "{p}"]]}
    (tmp_path / "flan.json").write_text(json.dumps({"PATTERNS": patterns}))
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps({"p": f"p{i}", "l": i % 2}) + "\n" for i in range(3)))
    fields = {"options": "['a', 'b']", "answer": "['a', 'b'][l]"}
    settings = QA | {"files": {"train": "raw.jsonl"}, "fields": fields}
    reader = tasks(tmp_path, {"reader": "flan", "path": "flan.json", "tasks": {"copa": settings}})[0]
    assert (reader.info.cap, reader.info.dropped_templates) == (30_000, ("copa_2",))
    found = [record for _, record in records(reader)]
    assert [record.template for record in found] == ["copa_0", "copa_1", "copa_0"]  # in turn
    assert found[1].instruction == "So: p1\nOPTIONS:\n- a\n- b"
    assert (found[1].targets, found[1].candidates) == (("b",), ("a", "b"))


def test_source_and_target_by_tab(tmp_path: Path) -> None:
    reader = one(tmp_path, "source_target", "in\tout\n\nin 2\ta\tb\n", "f.tsv", instruction="Say.")
    found = [record for _, record in records(reader)]
    assert [(r.style, r.instruction, r.input, r.targets) for r in found] == [
        ("keyword", "Say.", "in", ("out",)),
        ("keyword", "Say.", "in 2", ("a", "b")),
    ]
    with pytest.raises(ValueError, match=r"f.tsv line 2 must be `source <tab> target`; it has no tab"):
        records(one(tmp_path, "source_target", "in\tout\nno tab\n", "f.tsv", instruction="Say."))


def test_structures_are_linearised(tmp_path: Path) -> None:
    assert (
        linearize({"header": ["a", "b"], "rows": [[1, "x\ny"], [2, "z"]]})
        == "col : a | b row 1 : 1 | x y row 2 : 2 | z"
    )
    assert linearize({"triples": [["s", "r", "o"], ["t", "q", "p"]]}) == "s : r : o | t : q : p"
    assert linearize({"db_id": "d", "tables": {"t": ["c1", "c2"], "u": ["c3"]}}) == "| d | t : c1 , c2 | u : c3"
    row = {"text_in": "who", "struct_in": "col : a", "seq_out": ["x"]}
    reader = one(tmp_path, "structured", json.dumps(row), instruction="Answer from the table.")
    assert records(reader)[0][1].input == "who ; structured knowledge: col : a"
    bad = json.dumps(row | {"struct_in": {"header": ["a"], "rows": [[1, 2]]}})
    with pytest.raises(ValueError, match=r"line 1: key 'struct_in': row 1 of a table \(\[1, 2\]\) must have 1 cells"):
        records(one(tmp_path, "structured", bad, instruction="Answer."))


def test_chain_of_thought(tmp_path: Path) -> None:
    text = "q\\nOptions:\\n(A) {x}\t(A)\tbecause {answer}\\nreally\nq\t\tr\n"
    reader = one(tmp_path, "chain_of_thought", text, "f.tsv", instruction="Explain.")
    item, skipped = reader.read()
    assert item.record.input == "q\nOptions:\n(A) {x}"
    assert item.record.targets == ("because {answer}\nreally\nSo the answer is (A).",)
    assert (skipped.reason, skipped.failed) == ("its answer is empty", True)


def test_dialogues(tmp_path: Path) -> None:
    row = json.dumps({"turns": [["USER", "hi"], ["SYSTEM", "hello  there"], ["USER", "bye"], ["SYSTEM", "goodbye"]]})
    found = [record for _, record in records(one(tmp_path, "dialogue", row, instruction="Answer."))]
    assert [(r.input, r.targets) for r in found] == [
        ("User: hi\nSystem:", ("hello there",)),
        ("User: hi\nSystem: hello there\nUser: bye\nSystem:", ("goodbye",)),
    ]
    assert len({r.example.partition("/")[0] for r in found}) == 1  # one dialogue, one split
    source = {"reader": "dialogue", "options": {"mode": "whole"}, "tasks": {"t": QA | {"files": {"train": "f.jsonl"}}}}
    whole = records(tasks(tmp_path, source)[0])[0][1]
    assert (whole.instruction, whole.input) == ("", "")
    assert whole.targets == ("User: hi\nSystem: hello there\nUser: bye\nSystem: goodbye",)
    with pytest.raises(ValueError, match=r"line 1: turns\[0\] \('x'\) must be \[speaker, utterance\]"):
        records(one(tmp_path, "dialogue", '{"turns": ["x"]}', instruction="Answer."))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Do", "input": "this", "output": "that"}, [("Do\n\nthis", ("that",))]),
        (
            {"instruction": "Do", "instances": [{"input": "", "output": "a"}, {"input": "b", "output": "c"}]},
            [("Do", ("a",)), ("Do\n\nb", ("c",))],
        ),
        ({"src": "source", "tgt": "target"}, [("source", ("target",))]),
    ],
)
def test_plain_instruction_files(tmp_path: Path, row: dict[str, Any], expected: list) -> None:
    found = [record for _, record in records(one(tmp_path, "instruction_jsonl", json.dumps(row)))]
    assert [(r.instruction, r.targets) for r in found] == expected


def test_rows_under_a_written_instruction(tmp_path: Path) -> None:
    fields = {"input": "q", "target": "c[l]", "candidates": "c"}
    row = json.dumps({"q": "Q", "c": ["x", "y"], "l": 1})
    found = records(one(tmp_path, "rows", row, instruction="Choose.", fields=fields))[0][1]
    assert found[5:9] == ("Choose.", "Q", ("y",), ("x", "y"))
    with pytest.raises(ValueError, match=r"tasks.t.fields.target must be given"):
        one(tmp_path, "rows", row, instruction="Choose.", fields={"input": "q"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reader": "other"}, "reader 'other' must be one of: super_natural_instructions, promptsource"),
        ({"options": {"sped": 1}}, "reader dialogue has no option 'sped'; it has: context_turns, mode"),
        ({"tasks": {"t": QA | {"files": {"dev": "f"}}}}, "tasks.t.files has 'dev'"),
        ({"tasks": {"t": QA | {"files": {"train": "absent"}}}}, "absent does not exist"),
        ({"tasks": {"../t": QA | {"files": {"train": "f.jsonl"}}}}, "a name has parts of letters"),
        ({"tasks": {"t": {"files": {"train": "f.jsonl"}}}}, "task bench/t needs a category"),
        ({"tasks": {}}, "gives no task"),
    ],
)
def test_what_a_definition_gets_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "f.jsonl").write_text("{}")
    source = {"reader": "dialogue", "tasks": {"t": QA | {"files": {"train": "f.jsonl"}, "instruction": "A."}}}
    with pytest.raises(ValueError) as error:
        tasks(tmp_path, source | changes)
    assert message in str(error.value)
