"""Prompts of an evaluation are those of training; demonstrations are others' answers and fit; candidates are ranked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.data.tokenizer import Tokenizer
from moe.evaluation.scorer import Score
from moe.instruct.encoding import encode_formatted
from moe.instruct.evaluation.presets import PROTOCOLS, Protocol, find_protocol
from moe.instruct.evaluation.prompts import Demonstrations, make_prompts
from moe.instruct.evaluation.ranking import chance, rank
from moe.instruct.evaluation.tasks import EvaluationTask, _bbh_prompt, first_examples, read_bbh, read_mmlu
from moe.instruct.formatting import DELIMITERS, Layout, format_record
from moe.instruct.records import Record
from tests.moe.instruct.conftest import record
from tests.shared_data import shared_data

FIXED = Protocol("test", layout=Layout(), max_new_tokens=8)


def records(count: int, **changes: object) -> list[Record]:
    return [record(f"the cat {i}", f"dog {i}", example=f"e{i}", **changes) for i in range(count)]


def task_of(rows: list[Record], pool: list[Record] | None = None, **changes: object) -> EvaluationTask:
    task = EvaluationTask("bench/task", "bench", "Question Answering", 1, rows, rows if pool is None else pool)
    return task._replace(**changes)


def test_prompts_are_those_of_training(tokenizer: Tokenizer) -> None:
    rows = records(60)
    made = make_prompts(tokenizer, task_of(rows), Protocol("test", max_new_tokens=8), 0, 256, 0).prompts
    for row, prompt in zip(rows, made, strict=True):
        (answer,) = prompt.answers
        assert prompt.written == answer.tokens[: answer.first_target]
        # one of the wordings that training draws, and the same tokens
        texts = [
            format_record(row, Layout(delimiter, lead, given))
            for delimiter in DELIMITERS
            for lead in ("", "Instructions: ", "Task: ")
            for given in ("", "Input: ")
        ]
        assert answer in [encode_formatted(tokenizer, text) for text in texts]
    read = [tokenizer.decode(prompt.written or []) for prompt in made]
    assert all(sum(text.endswith(delimiter) for text in read) > 0 for delimiter in DELIMITERS)
    assert made == make_prompts(tokenizer, task_of(rows), Protocol("test", max_new_tokens=8), 0, 256, 0).prompts
    assert made != make_prompts(tokenizer, task_of(rows), Protocol("test", max_new_tokens=8), 0, 256, 1).prompts


def test_prompts_without_a_leading_separator(tokenizer: Tokenizer) -> None:
    rows = [*records(2), record("the mat", "dog", example="r", candidates=("dog", "cat"))]
    whole, bare = (
        make_prompts(tokenizer, task_of(rows), FIXED, 1, 90, 0, leading_separator=leading).prompts
        for leading in (True, False)
    )
    for one, other in zip(whole, bare, strict=True):
        assert other.num_shots == 1
        assert [answer.tokens for answer in other.answers] == [answer.tokens[1:] for answer in one.answers]
        assert other.written == (None if one.written is None else one.written[1:])
    with pytest.raises(ValueError, match="task bench/task, example 'e0': its prompt is empty"):
        make_prompts(tokenizer, task_of([rows[0]._replace(instruction="", input="")]), FIXED, 0, 90, 0)


def test_demonstrations_are_of_other_examples_and_of_one_template() -> None:
    rows = [
        record(
            "", f"dog {i}", example=f"e{i}/{turn}", style="instance", template=template, instruction=f"{template} {i}"
        )
        for i in range(4)
        for turn in range(2)
        for template in ("t", "u")
    ]
    pool = Demonstrations(task_of(rows), 0)
    for row in rows:
        shown = pool.of(row, row.example, 3)
        assert {other.template for other in shown} == {row.template}
        families = [other.example.split("/")[0] for other in shown]
        assert row.example.split("/")[0] not in families
        assert shown == pool.of(row, row.example, 5)[:3]
    orders = {tuple(other.example for other in pool.of(row, row.example, 3)) for row in rows}
    assert len(orders) > 4  # drawn for each record anew
    with pytest.raises(ValueError, match=r"num_shots \(9\) is more than the 6 other examples of task bench/task under"):
        pool.of(rows[0], rows[0].example, 9)


def test_where_demonstrations_stand(tokenizer: Tokenizer) -> None:
    """Between the definition and the example, or before a complete one (Iyer et al. 2022)."""
    row, shown = records(2)
    (prompt,) = make_prompts(tokenizer, task_of([row], [shown]), FIXED, 1, 256, 0).prompts
    text = "Do it.\n\nthe cat 1\nAnswer: dog 1\n\nthe cat 0\nAnswer:"
    assert prompt.written == [tokenizer.eos_id, *tokenizer.encode(text)]
    row, shown = (r._replace(style="keyword") for r in (row, shown))
    (prompt,) = make_prompts(tokenizer, task_of([row], [shown]), FIXED, 1, 256, 0).prompts
    text = "Do it.\nthe cat 1\nAnswer: dog 1\n\nDo it.\nthe cat 0\nAnswer:"
    assert prompt.written == [tokenizer.eos_id, *tokenizer.encode(text)]


def test_what_does_not_fit(tokenizer: Tokenizer) -> None:
    rows = records(6)
    task = task_of(rows[:1], rows)
    whole = make_prompts(tokenizer, task, FIXED, 5, 512, 0).prompts[0]
    assert (whole.num_shots, whole.is_cut) == (5, False)
    length = len(whole.written or []) + FIXED.max_new_tokens
    assert make_prompts(tokenizer, task, FIXED, 5, length, 0).prompts[0].num_shots == 5
    fewer = make_prompts(tokenizer, task, FIXED, 5, length - 1, 0).prompts[0]
    assert (fewer.num_shots, fewer.is_cut) == (4, False)
    drawn = Demonstrations(task, 0).of(rows[0], "e0", 5)
    expected = format_record(rows[0], Layout(), drawn[1:])  # the nearest ones stay
    assert fewer.written == [tokenizer.eos_id, *tokenizer.encode(expected.source)]
    alone = make_prompts(tokenizer, task, FIXED, 0, 512, 0).prompts[0].written or []
    cut = make_prompts(tokenizer, task, FIXED, 5, len(alone) + 5, 0).prompts[0]
    assert (cut.num_shots, cut.is_cut) == (0, True)
    assert cut.written == [tokenizer.eos_id, *alone[4:]]  # three tokens of the left were too many
    with pytest.raises(ValueError, match=r"max_new_tokens \(8\) leaves no room for a prompt of bench/task"):
        make_prompts(tokenizer, task, FIXED, 0, 9, 0)
    long = [rows[0], rows[1]._replace(targets=("dog " * 300,))]
    made = make_prompts(tokenizer, task_of(long), FIXED, 0, 64, 0)
    assert (len(made.prompts), made.num_too_long) == (1, 1)
    with pytest.raises(ValueError, match=r"no answer of task bench/task fits into model\.max_seq_len \(64\)"):
        make_prompts(tokenizer, task_of(long[1:]), FIXED, 0, 64, 0)


def test_candidates_have_one_context(tokenizer: Tokenizer) -> None:
    choices = ("dog", "the red log ran to the mat " * 3)
    row = record("the cat " * 40, "dog", candidates=choices)
    (prompt,) = make_prompts(tokenizer, task_of([row]), FIXED, 0, 100, 0).prompts
    assert prompt.is_ranked
    assert prompt.is_cut
    contexts = {tuple(answer.tokens[: answer.first_target]) for answer in prompt.answers}
    assert len(contexts) == 1
    assert max(answer.positions for answer in prompt.answers) == 100
    assert all(answer.tokens[-1] == answer.tokens[0] == tokenizer.eos_id for answer in prompt.answers)
    (bare,) = make_prompts(tokenizer, task_of([row]), FIXED, 0, 100, 0, leading_separator=False).prompts
    source = tokenizer.encode(format_record(row, Layout()).source)
    for answer in bare.answers:  # the end of the source, one token more than beside a separator
        assert answer.tokens[: answer.first_target] == source[-answer.first_target :]
        assert answer.first_target == prompt.answers[0].first_target
    (written,) = make_prompts(tokenizer, task_of([row]), Protocol("t", rank=False), 0, 600, 0).prompts
    assert not written.is_ranked
    always = Protocol("t", always_written=("bench",))
    assert not make_prompts(tokenizer, task_of([row]), always, 0, 600, 0).prompts[0].is_ranked
    with pytest.raises(ValueError, match="a candidate is empty"):
        make_prompts(tokenizer, task_of([row._replace(candidates=("dog", " "))]), FIXED, 0, 100, 0)


def test_normalisations() -> None:
    candidates = ("no", "not at all")
    answers = [Score((-2.0, -1.5), None), Score((-1.0, -1.0, -1.2, -1.0), None)]
    blanks = [Score((-0.5, -1.5), None), Score((-3.0, -0.5, -0.5, -0.5), None)]

    def scores(rule: str, score_end: bool = True) -> list[float]:
        return rank(rule, score_end, candidates, ("no",), answers, blanks).scores

    assert scores("sum") == pytest.approx([-3.5, -4.2])
    assert scores("token_mean") == pytest.approx([-1.75, -1.05])
    assert scores("byte_mean") == pytest.approx([-3.5 / 2, -4.2 / 10])
    assert scores("unconditional") == pytest.approx([-1.5, 0.3])
    assert scores("sum", score_end=False) == pytest.approx([-2.0, -3.2])
    assert scores("token_mean", score_end=False) == pytest.approx([-2.0, -3.2 / 3])
    assert rank("sum", True, candidates, ("no",), answers).credit == 1.0
    assert rank("token_mean", True, candidates, ("no",), answers).credit == 0.0
    tie = rank("sum", True, ("a", "b", "c"), ("b",), [Score((-1.0,), None)] * 2 + [Score((-2.0,), None)])
    assert (tie.chosen, tie.credit) == ([0, 1], 0.5)
    assert chance(("a", "b", "c"), ("b", "c")) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"normalisation \('pmi'\) must be one of: sum, token_mean"):
        rank("pmi", True, candidates, ("no",), answers)


def test_protocols() -> None:
    assert find_protocol("super_natural_instructions").limit == 100
    assert not find_protocol("super_natural_instructions").rank
    assert {"promptsource", "flan", "unified_skg", "bbh", "mmlu"} < PROTOCOLS.keys()
    with pytest.raises(ValueError, match=r"protocol \('helm'\) must be one of: opt_iml, promptsource"):
        find_protocol("helm")
    with pytest.raises(ValueError, match=r"num_shots \(\[0, 0\]\) must be different numbers"):
        Protocol("x", num_shots=(0, 0))


def test_the_first_examples_with_all_their_versions() -> None:
    rows = [record(example=name, template=t) for name, t in (("a", "t"), ("b", "t"), ("a", "u"), ("c", "t"))]
    assert [(r.example, r.template) for r in first_examples(rows, 2)] == [("a", "t"), ("b", "t"), ("a", "u")]
    assert first_examples(rows, None) == rows


def test_mmlu_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for split, rows in (("dev", ["2+2?,3,4,5,6,B"]), ("test", ['"1,1?",1,2,3,4,B', "0?,0,1,2,3,A"])):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"high_school_maths_{split}.csv").write_text("\n".join(rows) + "\n")
    (task,) = read_mmlu(tmp_path)
    assert task.name == "mmlu/high_school_maths"
    assert task.records[1].example == "high_school_maths 1"  # no other subject has it, so it is drawn by itself
    protocol = find_protocol("mmlu")
    prompt = make_prompts(tokenizer, task, protocol, 1, 1024, 0).prompts[0]
    text = (
        "The following are multiple choice questions (with answers) about high school maths.\n\n"
        "2+2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer: B\n\n1,1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B"
    )
    assert prompt.answers[prompt.gold].tokens == [tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert len(read_mmlu(tmp_path, limit=1)[0].records) == 1
    (tmp_path / "dev" / "high_school_maths_dev.csv").write_text("2+2?,3,4,5,6,E\n")
    with pytest.raises(ValueError, match=r"maths_dev\.csv row 0 must have a question, four options and one of A, B"):
        read_mmlu(tmp_path)
    with pytest.raises(ValueError, match="has no task that matches 'mmlu/law'"):
        read_mmlu(tmp_path, patterns=["mmlu/law"])


def test_bbh_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "cot-prompts").mkdir()
    shown = "Q: not True is\nA: Let's think step by step.\nThe answer is near. So the answer is False."
    (tmp_path / "cot-prompts" / "logic.txt").write_text(f"canary\n-----\nEvaluate.\n\n{shown}\n\n{shown}\n")
    (tmp_path / "logic.json").write_text(json.dumps({"examples": [{"input": "True is", "target": "True"}]}))
    (task,) = read_bbh(tmp_path)
    prompt = make_prompts(tokenizer, task, find_protocol("bbh"), 2, 1024, 0).prompts[0]
    text = "Evaluate.\n\nQ: not True is\nA: False\n\nQ: not True is\nA: False\n\nQ: True is\nA:"
    assert prompt.written == [tokenizer.eos_id, *tokenizer.encode(text)]
    with pytest.raises(ValueError, match=r"num_shots \(3\) is more than the 2 other examples of task bbh/logic"):
        make_prompts(tokenizer, task, find_protocol("bbh"), 3, 1024, 0)
    (tmp_path / "logic.json").write_text('{"examples": [{"input": 1}]}')
    with pytest.raises(ValueError, match=r"examples\[0\] must have the texts 'input' and 'target'"):
        read_bbh(tmp_path)


def test_the_public_bbh_files() -> None:
    folder = shared_data("bigbench_hard")
    assert {task.name: len(task.records) for task in read_bbh(folder)} == {
        "bbh/boolean_expressions": 250,
        "bbh/date_understanding": 250,
        "bbh/navigate": 250,
        "bbh/object_counting": 250,
        "bbh/word_sorting": 250,
    }
    prompts = {path.stem: _bbh_prompt(path) for path in (folder / "cot_prompts").glob("*.txt")}
    assert len(prompts) == 27
    assert {name for name, (_, pairs) in prompts.items() if len(pairs) != 3} == set()
    assert prompts["date_understanding"][1][1][1] == "(B)"
    assert prompts["navigate"][1][0][1] in ("Yes", "No")
