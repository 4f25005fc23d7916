from __future__ import annotations

import random

import jinja2
import pytest

from moe.instruct.readers.promptsource import TemplateGroups
from moe.instruct.templates import FlanPattern, PromptSourceTemplate, Renderer, TemplateError, protect, uninverted
from tests.shared_data import shared_data


def apply(jinja: str, choices: str | None = None, key: str = "key", **fields: object):
    return PromptSourceTemplate(Renderer(), "name", jinja, choices).apply(protect(fields), key)


def test_prompt_target_and_choices() -> None:
    rendered = apply(
        "{{ q }}? {{ answer_choices | join(' or ') }} ||| {{ answer_choices[i] }}", "no ||| yes", q="so", i=1
    )
    assert rendered == ("so? no or yes", ("yes",), ("no", "yes"))
    assert apply("{{ q }} ||| {{ q }}!", "no ||| yes", q="so").candidates == ()  # the answer is none of the choices


def test_the_split_is_after_rendering() -> None:
    branches = "{% if a %}first ||| one{% else %}second ||| two{% endif %}"
    assert apply(branches, a=True)[:2] == ("first", ("one",))
    assert apply(branches, a=False)[:2] == ("second", ("two",))


def test_a_separator_inside_the_data_is_data() -> None:
    rendered = apply("{{ q.text }} ||| {{ a[0] }}", "{{ a | join('|||') }}", q={"text": "x ||| y"}, a=["p|||q", "r"])
    assert rendered == ("x ||| y", ("p|||q",), ("p|||q", "r"))


def test_a_false_condition_leaves_the_example_out() -> None:
    assert apply("{% if a %}x ||| y{% endif %}", a=False) is None
    assert apply("x ||| {% if a %}y{% endif %}", a=False) is None


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{{ missing }} ||| y", "fails: UndefinedError: 'missing' is undefined"),
        ("{{ q[5] }} ||| y", "fails: UndefinedError"),
        ("no target", "gives no ||| between prompt and target"),
        ("{{ q.__class__.__mro__ }} ||| y", "fails: SecurityError"),
        ("{{ 'a' * 10**9 }} ||| y", "repeated 1000000000 times is too long"),
        ("{{ 9 ** 99999 }} ||| y", "is too large for a template"),
        ("{% for i in range(99999) %}{{ q * 20 }}{% endfor %} ||| y", "gives more than 1000000 characters"),
    ],
)
def test_a_template_that_fails_says_how(jinja: str, message: str) -> None:
    with pytest.raises(TemplateError) as error:
        apply(jinja, q="q")
    assert message in str(error.value)


def test_what_is_not_jinja() -> None:
    with pytest.raises(TemplateError, match="is not valid Jinja"):
        apply("{% if %}")


def test_random_choices_depend_on_the_key_alone() -> None:
    jinja = "{{ range(1000) | list | choice }} {{ range(1000) | list | random }} ||| y"
    first = apply(jinja)
    random.seed(1)
    assert apply(jinja) == first
    assert len({apply(jinja, key=str(i)).prompt for i in range(20)}) > 15


def test_filters_of_promptsource() -> None:
    assert apply("{{ [1, 2, 2, 3, 3] | most_frequent }} ||| {{ 'x' | highlight }}").prompt == "[2, 3]"
    assert apply("{% for a, b in zip([1], [2]) %}{{ a + b }}{% endfor %} ||| y").prompt == "3"


def test_published_templates_render_as_plain_jinja_does() -> None:
    """The oracle is jinja2 without our sandbox, on real templates and a real shape of row."""
    groups = TemplateGroups(shared_data("promptsource_templates/templates.tar.gz"))
    fields = {
        "question": "Where is |the| key?",
        "choices": {"label": list("ABCDE"), "text": ["here", "there", "up", "down", "lost"]},
        "answerKey": "D",
    }
    plain = jinja2.Environment()
    plain.globals["zip"] = zip
    count = 0
    for text in groups.group("commonsense_qa") + groups.group("ai2_arc/ARC-Easy"):
        choices = [part.strip() for part in plain.from_string(text.answer_choices or "").render(fields).split("|||")]
        expected = plain.from_string(text.jinja).render(fields, answer_choices=choices).split("|||")
        rendered = PromptSourceTemplate(Renderer(), text.name, text.jinja, text.answer_choices).apply(fields, "")
        assert [rendered.prompt, *rendered.targets] == [part.strip() for part in expected]
        count += 1
    assert count > 8


def test_flan_patterns() -> None:
    pattern = FlanPattern("p", "{premise}\n\nHypothesis: {hypothesis}n\n{options_}", "{answer}")
    rendered = pattern.apply({"premise": "A {b} c", "hypothesis": "H", "options": ["yes", "no"], "answer": "no"})
    assert rendered.prompt == "A {b} c\n\nHypothesis: H\nOPTIONS:\n- yes\n- no"  # without the stray n
    assert (rendered.targets, rendered.candidates) == (("no",), ("yes", "no"))
    with pytest.raises(TemplateError, match="needs the field 'hypothesis'; there are: premise, answer"):
        pattern.apply({"premise": "A", "answer": "no"})


def test_inverted_flan_patterns_are_those_of_the_minority() -> None:
    assert uninverted([("{a}", "{t}"), ("{t}", "{a}"), ("say {a}", "{t}")]) == [0, 2]
    with pytest.raises(ValueError, match="say which to `keep`"):
        uninverted([("{a}", "{t}"), ("{t}", "{a}")])
    assert uninverted([("{a}", "{t}"), ("{t}", "{a}")], keep="{a}") == [1]
    with pytest.raises(ValueError, match="no pattern has the target keep"):
        uninverted([("{a}", "{t}")], keep="{x}")


def test_expressions_over_rows() -> None:
    renderer = Renderer()
    row = {"items": [{"t": "x"}, {"t": "y"}], "n": 1}
    assert renderer.expression("row['items'] | map(attribute='t') | list")(row) == ["x", "y"]
    with pytest.raises(TemplateError, match="'absent' is undefined"):
        renderer.expression("absent")(row)
    with pytest.raises(TemplateError, match="is not an expression"):
        renderer.expression("n +")
