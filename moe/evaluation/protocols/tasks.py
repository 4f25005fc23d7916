"""The two named protocols: each task's splits, prompt and scoring rule.

`artetxe2021` is the protocol of the paper's English models (Artetxe et al. 2021), `xglm` that of the multilingual ones
(Lin et al. 2021). Splits are the authors'; a caller may name others, which the result records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from moe.evaluation.protocols import bias, english, mgsm, multilingual
from moe.evaluation.protocols.items import Template


class Source(NamedTuple):
    """Rows of the Hub. `{language}` in the names is replaced by the language of the text."""

    hub_id: str
    subsets: tuple[str | None, ...]  # read one after another
    split: str


class Task(NamedTuple):
    """One task of a protocol."""

    source: Source
    demonstrations: Source | None  # None: zero-shot only
    template: Callable[[str, str], Template]  # (template language, template set) -> template
    rule: str = "mean"  # moe.evaluation.protocols.rules
    languages: tuple[str, ...] = ("en",)
    kind: str = "choice"  # or "last_word": does the model predict it? or "number": the last number it writes
    on_record: bool = True  # False: the papers do not state their prompt, or lack the task; the prompt is ours
    english_demonstrations: Source | None = None  # if `{language}` has no "en"
    template_reads: tuple[str, ...] = ()  # the arguments of `template` that have an effect
    contrast: tuple[str, str, str] | None = None  # a name, and the two groups whose twins it subtracts

    @property
    def demo_languages(self) -> tuple[str, ...]:
        """The languages available for demonstrations."""
        extra = ("en",) if self.english_demonstrations is not None and "en" not in self.languages else ()
        return (*self.languages, *extra)


class Protocol(NamedTuple):
    """A named evaluation protocol."""

    tasks: dict[str, Task]
    num_runs: int  # demonstration draws, of which the mean is reported


def _only(template: Template) -> Callable[[str, str], Template]:
    """For a prompt that exists in English only."""
    return lambda language, template_set: template


def _task(
    hub_id: str, subset: str | None, split: str, shown: str | None, template: Template, rule: str = "mean"
) -> Task:
    demonstrations = None if shown is None else Source(hub_id, (subset,), shown)
    return Task(Source(hub_id, (subset,), split), demonstrations, _only(template), rule)


_GLUE = "aps/super_glue"
_ARC = "allenai/ai2_arc"
_TRANSLATED = ("template_language", "template_set")
_XCOPA, _XNLI, _PAWSX = "cambridgeltl/xcopa", "facebook/xnli", "google-research-datasets/paws-x"
_XWINOGRAD, _XSTORY_CLOZE = "Muennighoff/xwinograd", "juletxara/xstory_cloze"

_BLIMP_PARADIGMS = tuple(
    """
    adjunct_island anaphor_gender_agreement anaphor_number_agreement animate_subject_passive
    animate_subject_trans causative complex_NP_island coordinate_structure_constraint_complex_left_branch
    coordinate_structure_constraint_object_extraction determiner_noun_agreement_1 determiner_noun_agreement_2
    determiner_noun_agreement_irregular_1 determiner_noun_agreement_irregular_2
    determiner_noun_agreement_with_adj_2 determiner_noun_agreement_with_adj_irregular_1
    determiner_noun_agreement_with_adj_irregular_2 determiner_noun_agreement_with_adjective_1
    distractor_agreement_relational_noun distractor_agreement_relative_clause drop_argument ellipsis_n_bar_1
    ellipsis_n_bar_2 existential_there_object_raising existential_there_quantifiers_1
    existential_there_quantifiers_2 existential_there_subject_raising expletive_it_object_raising inchoative
    intransitive irregular_past_participle_adjectives irregular_past_participle_verbs
    irregular_plural_subject_verb_agreement_1 irregular_plural_subject_verb_agreement_2
    left_branch_island_echo_question left_branch_island_simple_question matrix_question_npi_licensor_present
    npi_present_1 npi_present_2 only_npi_licensor_present only_npi_scope passive_1 passive_2
    principle_A_c_command principle_A_case_1 principle_A_case_2 principle_A_domain_1 principle_A_domain_2
    principle_A_domain_3 principle_A_reconstruction regular_plural_subject_verb_agreement_1
    regular_plural_subject_verb_agreement_2 sentential_negation_npi_licensor_present
    sentential_negation_npi_scope sentential_subject_island superlative_quantifiers_1 superlative_quantifiers_2
    tough_vs_raising_1 tough_vs_raising_2 transitive wh_island wh_questions_object_gap wh_questions_subject_gap
    wh_questions_subject_gap_long_distance wh_vs_that_no_gap wh_vs_that_no_gap_long_distance wh_vs_that_with_gap
    wh_vs_that_with_gap_long_distance
    """.split()  # noqa: SIM905 - names, not 67 pairs of quotation marks
)

# not from the papers: no prompt on record, or none needed
_OURS = {
    "blimp": Task(
        Source("nyu-mll/blimp", _BLIMP_PARADIGMS, "train"), None, _only(english.blimp), "sum", on_record=False
    ),
    "balanced_copa": Task(
        Source("pkavumba/balanced-copa", (None,), "train"), None, _only(english.copa), on_record=False
    ),
    "lambada": Task(
        Source("cimec/lambada", (None,), "test"), None, _only(english.lambada), kind="last_word", on_record=False
    ),
    "crows_pairs": Task(
        Source("jannalu/crows_pairs_multilingual", ("english",), "test"),
        None,
        _only(bias.crows_pairs),
        "sum",
        on_record=False,
    ),
    "winogender": Task(
        Source("oskarvanderwal/winogender", ("all",), "test"),
        None,
        _only(bias.winogender),
        on_record=False,
        contrast=("female_minus_male", "gender=female", "gender=male"),
    ),
    "mnli": Task(
        Source("nyu-mll/glue", ("mnli",), "validation_matched"),
        Source("nyu-mll/glue", ("mnli",), "train"),
        multilingual.xnli,
        on_record=False,
        template_reads=_TRANSLATED,
    ),
    "mgsm": Task(
        Source("juletxara/mgsm", ("{language}",), "test"),
        Source("juletxara/mgsm", ("{language}",), "train"),
        mgsm.template,
        languages=mgsm.LANGUAGES,
        kind="number",
        on_record=False,
        template_reads=("template_language",),
    ),
    "hatecheck": Task(
        Source("Paul/hatecheck-{language}", (None,), "test"),
        None,
        _only(bias.hatecheck),
        languages=bias.HATECHECK_LANGUAGES,
        on_record=False,
    ),
}

_ENGLISH = {
    "hellaswag": _task("Rowan/hellaswag", None, "validation", "train", english.hellaswag),
    "piqa": _task("baber/piqa", None, "validation", "train", english.piqa),
    "storycloze": _task("LSDSem/story_cloze", "2016", "test", "validation", english.story_cloze),
    "winogrande": _task("allenai/winogrande", "winogrande_xl", "validation", "train", english.winograd, "suffix"),
    "openbookqa": _task("allenai/openbookqa", "main", "test", "train", english.openbookqa, "unconditional"),
    "record": _task(_GLUE, "record", "validation", "train", english.record),
    "arc_easy": _task(_ARC, "ARC-Easy", "validation", "train", english.arc),
    "arc_challenge": _task(_ARC, "ARC-Challenge", "validation", "train", english.calibrated_arc),
    "boolq": _task(_GLUE, "boolq", "validation", "train", english.boolq),
    "copa": _task(_GLUE, "copa", "validation", "train", english.copa),
}

_MULTILINGUAL = {
    "xstorycloze": Task(
        Source(_XSTORY_CLOZE, ("{language}",), "eval"),
        Source(_XSTORY_CLOZE, ("{language}",), "train"),
        _only(english.story_cloze),
        languages=multilingual.XSTORY_CLOZE_LANGUAGES,
    ),
    "xcopa": Task(
        Source(_XCOPA, ("{language}",), "test"),
        Source(_XCOPA, ("{language}",), "validation"),
        multilingual.xcopa,
        languages=multilingual.XCOPA_LANGUAGES,
        template_reads=_TRANSLATED,
        english_demonstrations=Source(_GLUE, ("copa",), "validation"),
    ),
    "xnli": Task(
        Source(_XNLI, ("{language}",), "test"),
        Source(_XNLI, ("{language}",), "validation"),
        multilingual.xnli,
        languages=multilingual.XNLI_LANGUAGES,
        template_reads=_TRANSLATED,
    ),
    "pawsx": Task(
        Source(_PAWSX, ("{language}",), "test"),
        Source(_PAWSX, ("{language}",), "validation"),
        multilingual.pawsx,
        languages=multilingual.PAWSX_LANGUAGES,
        template_reads=_TRANSLATED,
    ),
    "xwinograd": Task(
        Source(_XWINOGRAD, ("{language}",), "test"),
        Source(_XWINOGRAD, ("{language}",), "test"),  # the only split: a question is never among its own examples
        _only(english.winograd),
        languages=multilingual.XWINOGRAD_LANGUAGES,
    ),
}

PROTOCOLS = {
    "artetxe2021": Protocol(_ENGLISH | _OURS, num_runs=25),
    # the multilingual runs did not calibrate ARC
    "xglm": Protocol(
        _ENGLISH
        | {"arc_challenge": _task(_ARC, "ARC-Challenge", "validation", "train", english.arc)}
        | _MULTILINGUAL
        | _OURS,
        num_runs=5,
    ),
}


def find_task(protocol: str, task: str) -> Task:
    """A task of a protocol. Raises ValueError listing what there is."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol ({protocol!r}) must be one of: {', '.join(PROTOCOLS)}")
    tasks = PROTOCOLS[protocol].tasks
    if task not in tasks:
        raise ValueError(f"the protocol {protocol} has no task {task!r}; it has: {', '.join(sorted(tasks))}")
    return tasks[task]
