from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moe.instruct.encoding import encode_formatted
from moe.instruct.formatting import (
    DELIMITERS,
    INPUT_LEADS,
    INSTRUCTION_LEADS,
    Layout,
    draw_layout,
    format_record,
    join,
)
from moe.instruct.records import Record
from tests.moe.instruct.conftest import record
from tests.moe.instruct.toy_tokenizer import ToyTokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden_formats.json").read_text())

TASK = record("Two and two?", "Four", instruction="Add the numbers.")
SHOWN = [record("One and one?", "Two", instruction="Add the numbers."), record("Nought?", "0", instruction="Add.")]
INSTANCE = record("", "Four", style="instance", instruction="What is two and two?")
INSTANCES = [record("", "Two", style="instance", instruction="What is one and one?")]
KEYWORD = record("two and two", "Four", style="keyword", instruction="Compute this.")
KEYWORDS = [record("one and one", "Two", style="keyword", instruction="Compute this.")]
LAYOUT = Layout(" Answer:", "Task: ", "Input: ", "\n\n\n")

CASES: dict[str, tuple[Record, list[Record], Layout, str]] = {
    "task": (TASK, [], LAYOUT, "target"),
    "task_few_shot": (TASK, SHOWN, LAYOUT, "target"),
    "task_few_shot_suffix": (TASK, SHOWN, LAYOUT, "suffix"),
    "task_without_input": (record("", "Four", instruction="Name a number."), [], LAYOUT, "target"),
    "task_that_ends_in_a_colon": (record("2 + 2:", "Four", instruction="Add."), [], LAYOUT, "target"),
    "instance": (INSTANCE, [], Layout(), "target"),
    "instance_few_shot": (INSTANCE, INSTANCES, LAYOUT, "target"),
    "instance_few_shot_suffix": (INSTANCE, INSTANCES, LAYOUT, "suffix"),
    "keyword": (KEYWORD, [], Layout("\noutput:"), "target"),
    "keyword_few_shot": (KEYWORD, KEYWORDS, Layout("\noutput:"), "target"),
    "dialogue": (record("", "A: Hello.\nB: Hi.", style="task", instruction=""), [], LAYOUT, "target"),
    "loss_on_all": (TASK, [], Layout("\nA:"), "all"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_format_is_the_golden_one_token_by_token(name: str) -> None:
    """The file was written by hand from Iyer et al. 2022: pieces, and which of them is the first that counts."""
    asked, shown, layout, loss_on = CASES[name]
    tokenizer = ToyTokenizer()
    example = encode_formatted(tokenizer, format_record(asked, layout, shown), loss_on=loss_on)
    pieces = tokenizer.pieces(example.tokens)
    assert ("|".join(pieces[: example.first_counted]), "|".join(pieces[example.first_counted :])) == tuple(GOLDEN[name])


def test_a_delimiter_is_left_out_behind_a_colon_alone() -> None:
    for end, delimited in ((":", False), (": ", False), (":\n", False), ("?", True), ("", True)):
        source = format_record(record(f"Say it{end}", "x"), Layout(" A:")).source
        assert source.endswith(" A:") == delimited, end


def test_demonstrations_stand_behind_a_definition_and_before_a_prompt() -> None:
    defined = format_record(TASK, LAYOUT, SHOWN).source
    assert defined.index("Add the numbers.") < defined.index("One and one?") < defined.index("Two and two?")
    assert defined.count("Add the numbers.") == 1
    prompted = format_record(INSTANCE, LAYOUT, INSTANCES).source
    assert prompted.startswith("What is one and one?")
    assert format_record(KEYWORD, LAYOUT, KEYWORDS).source.count("Compute this.") == 2


def test_the_first_label_is_where_the_first_demonstration_is_answered() -> None:
    formatted = format_record(TASK, LAYOUT, SHOWN)
    assert formatted.source[: formatted.first_label_end].endswith("Input: One and one? Answer:")
    assert formatted.source[formatted.first_label_end :].startswith(" Two\n\n\nInput: Nought?")
    alone = format_record(TASK, LAYOUT)
    assert alone.first_label_end == len(alone.source)


def test_spaces_at_the_end_of_a_source_go_and_line_breaks_stay() -> None:
    assert join("a:  ", "b \n") == "a: b"
    assert join("a:\n", "b") == "a:\n b"
    assert join("", " b ") == " b"


def test_layouts_are_drawn_evenly_and_repeat() -> None:
    layouts = [draw_layout(np.random.default_rng(seed)) for seed in range(4000)]
    assert layouts == [draw_layout(np.random.default_rng(seed)) for seed in range(4000)]
    for field, choices in (
        ("delimiter", DELIMITERS),
        ("instruction_lead", INSTRUCTION_LEADS),
        ("input_lead", INPUT_LEADS),
    ):
        counts = Counter(getattr(layout, field) for layout in layouts)
        expected = len(layouts) / len(choices)
        assert set(counts) == set(choices)
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values()), counts


@pytest.mark.parametrize("targets", [(), ("  \n",)])
def test_an_empty_target_is_refused_with_its_task_and_example(targets: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"bench/task \(example '7'\) has an empty target"):
        format_record(record(example="7")._replace(targets=targets))
