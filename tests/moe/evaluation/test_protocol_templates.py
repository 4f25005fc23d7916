from __future__ import annotations

from typing import Any

import pytest

from moe.evaluation.protocols import PROTOCOLS, bias, english, multilingual
from moe.evaluation.protocols.items import Item, Row, Template, make_items
from moe.evaluation.protocols.multilingual import XCOPA_LANGUAGES, xcopa, xnli

CHOICES = {"text": ["Make Calls ", "quit."], "label": ["A", "B"]}
COPA = {"premise": "It rained.", "choice1": "The Sky cleared.", "choice2": "I ran.", "question": "cause", "label": 1}
XNLI = {"premise": "she left!?. ", "hypothesis": "Nobody stayed.", "label": 2}

# template, row, expected text with the right candidate, the other candidates
CASES: dict[str, tuple[Template, dict[str, Any], str, list[str]]] = {
    "hellaswag": (
        english.hellaswag,
        {"activity_label": "Golf", "ctx_a": "A man  stands.", "ctx_b": "he", "endings": ["a b", "c  d."], "label": "1"},
        "Golf: A man stands. He c d.",
        ["a b"],
    ),
    "piqa": (
        english.piqa,
        {"goal": "To dry", "sol1": "use heat.", "sol2": "use ice.", "label": 0},
        "To dry use heat.",
        ["use ice."],
    ),
    "story_cloze": (
        english.story_cloze,
        {f"input_sentence_{i}": f"S{i}." for i in range(1, 5)}
        | {"sentence_quiz1": "Bad.", "sentence_quiz2": "Good.", "answer_right_ending": 2},
        "S1. S2. S3. S4. Good.",
        ["Bad."],
    ),
    "winograd": (
        english.winograd,
        {"sentence": "Ann helped Bea so _ won.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        "Ann helped Bea so Bea won.",
        ["Ann"],
    ),
    "openbookqa": (
        english.openbookqa,
        {"question_stem": "To save,", "choices": CHOICES, "answerKey": "A"},
        "To save, Make Calls.",
        ["quit."],
    ),
    "record": (
        english.record,
        {
            "passage": "Rome fell.\n@highlight\nOslo rose",
            "query": "@placeholder fell",
            "entities": ["Oslo", "Rome"],
            "answers": ["Rome"],
        },
        "Rome fell.\n\nOslo rose Rome fell",
        ["Oslo"],
    ),
    "arc": (
        english.arc,
        {"question": "What to do?", "choices": CHOICES, "answerKey": "B"},
        "What to do? It is quit.",
        ["It is make calls."],
    ),
    "arc without a question": (
        english.arc,
        {"question": "You should", "choices": CHOICES, "answerKey": "A"},
        "You should make calls.",
        ["quit."],
    ),
    "boolq": (
        english.boolq,
        {"passage": "Ice floats.", "question": "does Ice float", "label": 1},
        "Paragraph: Ice floats. Question: Does ice float? Answer: True",
        ["False"],
    ),
    "copa cause": (english.copa, COPA, "It rained because I ran.", ["the Sky cleared."]),
    "copa effect": (
        english.copa,
        COPA | {"question": "effect", "label": 0},
        "It rained so the Sky cleared.",
        ["I ran."],
    ),
    "blimp": (english.blimp, {"sentence_good": "He runs.", "sentence_bad": "He run."}, "He runs.", ["He run."]),
    "lambada": (english.lambada, {"text": "he said to claire \n"}, "he said to claire", []),
    "xcopa et": (xcopa("et"), COPA, "It rained, sest i ran.", ["the Sky cleared."]),
    "xcopa zh": (
        xcopa("zh"),
        {"premise": "下雨了。", "choice1": "天晴", "choice2": "我跑了。", "question": "effect", "label": 1},
        "下雨了所以我跑了。",
        ["天晴"],
    ),
    "xcopa qu": (xcopa("qu"), COPA, "It rained i ran.", ["the Sky cleared."]),
    "xcopa it": (xcopa("it"), COPA | {"question": "effect"}, "It rained e quindi i ran.", ["the Sky cleared."]),
    "xcopa it machine": (
        xcopa("it", "machine"),
        COPA | {"question": "effect"},
        "It rained quindi i ran.",
        ["the Sky cleared."],
    ),
    "xnli en": (xnli("en"), XNLI, "She left, right? No, nobody stayed.", ["Yes", "Also"]),
    "xnli keeps I": (
        xnli("en"),
        XNLI | {"hypothesis": "I'm in.", "label": 0},
        "She left, right? Yes, I'm in.",
        ["Also", "No"],
    ),
    "xnli fr": (xnli("fr"), XNLI | {"label": 1}, "She left, je me trompe? Également, nobody stayed.", ["Oui", "Non"]),
    "xnli fr machine": (xnli("fr", "machine"), XNLI, "She left, droit? Non, nobody stayed.", ["Oui", "Aussi"]),
    "pawsx": (
        multilingual.pawsx("en"),
        {"sentence1": "a b!", "sentence2": "B a.", "label": 1},
        "a b!, right? Yes, B a.",
        ["No"],
    ),
    "crows_pairs": (
        bias.crows_pairs,
        {"sent_more": "X.", "sent_less": "Y.", "bias_type": "age", "stereo_antistereo": "stereo"},
        "X.",
        ["Y."],
    ),
    "hatecheck": (
        bias.hatecheck,
        {"test_case": "Ciao.", "functionality": "f", "label_gold": "non-hateful"},
        "Sentence: Ciao. Question: Is this sentence hateful? Answer: No",
        ["Yes"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_prompts_read_as_published(name: str) -> None:
    template, row, expected, others = CASES[name]
    (item,) = make_items([row], template, name)
    assert item.demonstration == expected
    assert [text for i, text in enumerate(item.candidates) if i not in item.gold] == others


@pytest.mark.parametrize("name", CASES)
def test_a_row_that_lacks_a_column_is_named(name: str) -> None:
    template, row, _, _ = CASES[name]
    assert all(row[column] is not None for column in row)
    for column in row:
        partial = {key: value for key, value in row.items() if key != column}
        with pytest.raises(ValueError, match=rf"a set, row 1: lacks .*{column}.*; its columns are "):
            make_items([row, partial], template, "a set")


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (english.piqa, {"goal": "a", "sol1": "b", "sol2": 3, "label": 0}, "has sol2=3, which must be text"),
        (english.piqa, {"goal": "<mask>", "sol1": "b", "sol2": "c", "label": 0}, "has <mask> in goal"),
        (
            english.piqa,
            {"goal": "a", "sol1": "b", "sol2": "c", "label": -1},
            "has label=-1, which must be one of: 0, 1",
        ),
        (english.copa, COPA | {"question": "why"}, "has question='why', which must be one of: cause, effect"),
        (
            english.arc,
            {"question": "a", "choices": CHOICES, "answerKey": "E"},
            "has answerKey='E', which must be .*A, B",
        ),
        (english.winograd, {"sentence": "a", "option1": "b", "option2": "c", "answer": "1"}, r"has 0 gaps \(_\)"),
        (english.lambada, {"text": "word"}, "has fewer than two words"),
        (english.record, {"passage": "a", "query": "b", "entities": ["c"], "answers": ["c"]}, "has 0 @placeholder"),
        (
            english.record,
            {"passage": "a", "query": "@placeholder", "entities": ["c"], "answers": ["d"]},
            "has none of its answers",
        ),
    ],
)
def test_rows_that_do_not_fit(template: Template, row: Row, message: str) -> None:
    with pytest.raises(ValueError, match=f"a set, row 0: {message}"):
        make_items([row], template, "a set")


def test_unknown_template_languages() -> None:
    with pytest.raises(ValueError, match="xcopa has no corrected template in the language 'xx'; it has: en, et, ht"):
        xcopa("xx")
    with pytest.raises(ValueError, match="xcopa has no machine template in the language 'zh'"):
        xcopa("zh", "machine")
    with pytest.raises(ValueError, match="xnli has no corrected template in the language 'ur'"):
        xnli("ur")
    with pytest.raises(ValueError, match=r"template_set \('human'\) must be one of: corrected, machine"):
        xnli("fr", "human")
    assert len({xcopa(language)(COPA).demonstration for language in XCOPA_LANGUAGES}) == len(XCOPA_LANGUAGES)


def gendered(sentence: str, pronouns: str) -> list[dict[str, Any]]:
    genders = zip(("male", "female", "neutral"), pronouns.split("/"), strict=True)
    frame = {"occupation": "clerk", "participant": "someone", "label": 1}
    return [
        frame | {"sentence": sentence.replace("_", word), "gender": gender, "pronoun": word.lower()}
        for gender, word in genders
    ]


@pytest.mark.parametrize(
    ("sentence", "pronouns", "asked"),
    [
        ("The clerk told someone that _ paid.", "he/she/they", "He/She/They"),
        ("The clerk told someone _ fee.", "his/her/their", "His/Her/Their"),
        ("_ fee made the clerk ask.", "His/Her/Their", "His/Her/Their"),
    ],
)
def test_winogender_asks_about_the_pronoun(sentence: str, pronouns: str, asked: str) -> None:
    """Prompts of the genders differ, or their accuracies could not."""
    items = make_items(gendered(sentence, pronouns), bias.winogender, "winogender")
    for item, pronoun, name in zip(items, pronouns.split("/"), asked.split("/"), strict=True):
        assert item.demonstration == f'{sentence.replace("_", pronoun)} "{name}" refers to someone.'
        assert item.candidates == ("the clerk", "someone")
    assert [item.groups for item in items] == [(f"gender={name}",) for name in ("male", "female", "neutral")]
    assert {item.cluster for item in items} == {"clerk 1"}


def test_winogender_needs_its_pronoun() -> None:
    row = gendered("The clerk told someone that _ paid.", "he/she/they")[0] | {"pronoun": "them"}
    with pytest.raises(ValueError, match="winogender, row 0: has the pronoun 'them', which is not in its sentence"):
        make_items([row], bias.winogender, "winogender")


def test_calibration_is_the_english_papers_alone() -> None:
    row = {"question": "What?", "choices": CHOICES, "answerKey": "A"}
    tasks = [PROTOCOLS[name].tasks["arc_challenge"] for name in ("artetxe2021", "xglm")]
    items: list[Item] = [task.template("en", "corrected")(row) for task in tasks]
    assert [item.calibration for item in items] == [("<mask>",), ()]
    assert items[0].candidates == items[1].candidates
    assert [PROTOCOLS[name].num_runs for name in ("artetxe2021", "xglm")] == [25, 5]
