"""How a model is prompted and scored: the rules of a published evaluation under one name (Iyer et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from moe.instruct.evaluation.metrics import EXACT_MATCH_RULES
from moe.instruct.evaluation.ranking import NORMALISATIONS
from moe.instruct.formatting import EVALUATION_SEPARATOR, Layout


@dataclass(frozen=True)
class Protocol:
    """The rules. Tasks, numbers of demonstrations and limits may vary between evaluations."""

    name: str
    num_shots: tuple[int, ...] = (0, 5)
    rank: bool = True  # records with candidates are ranked by likelihood; False generates all answers
    always_written: tuple[str, ...] = ()  # benchmarks whose tasks are generated although they have candidates
    normalisation: str = "sum"  # of a candidate's likelihood, see moe.instruct.evaluation.ranking
    score_end: bool = True  # the end token counts, as in tuning's loss, so that "no" is not a prefix of "not so"
    layout: Layout | None = None  # of all prompts; None draws delimiter and lead-ins per example, as in training
    separator: str = EVALUATION_SEPARATOR  # between demonstrations; it also ends a few-shot answer
    max_new_tokens: int = 256
    exact_match: str = "normalised"
    primary: str = "rouge_l"  # the score of tasks with generated answers; ranked ones use accuracy
    exact_match_categories: tuple[str, ...] = ()  # whose generated tasks score by exact match, whatever `primary` says
    limit: int | None = None  # raw examples per task, the first ones

    def __post_init__(self) -> None:
        if not self.num_shots or min(self.num_shots) < 0 or len(set(self.num_shots)) < len(self.num_shots):
            raise ValueError(f"num_shots ({list(self.num_shots)}) must be different numbers of at least 0")
        for name, choices in (
            ("normalisation", NORMALISATIONS),
            ("exact_match", EXACT_MATCH_RULES),
            ("primary", ("rouge_l", "exact_match")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of: {', '.join(choices)}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens ({self.max_new_tokens}) must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit ({self.limit}) must be at least 1, or null for all")
        if not self.separator:
            raise ValueError("separator ('') must not be empty: demonstrations would run into each other")


# test tasks whose published metric is exact match; the others use ROUGE-L (Iyer et al. 2022)
_EXACT_MATCH_CATEGORIES = (
    "Textual Entailment",
    "Cause Effect Classification",
    "Coreference Resolution",
    "Dialogue Act Recognition",
    "Answerability Classification",
    "Word Analogy",
)

# The published prompts of BIG-Bench Hard and MMLU end in a colon, after which no delimiter is added.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # tasks with candidates are ranked, except in Super-NaturalInstructions
        Protocol("opt_iml", always_written=("super_natural_instructions",)),
        # T0's: ranked by the sum including the end token, which its tokenizer adds to every answer; zero-shot
        Protocol("promptsource", num_shots=(0,)),
        # FLAN's prompts list the options, and answers are ranked; generated if there are no options
        Protocol("flan"),
        # every task is generated, classification too; the first 100 instances; the published words around the parts
        Protocol(
            "super_natural_instructions",
            num_shots=(0, 2),
            rank=False,
            layout=Layout("\nOutput:", "Definition: ", "Input: "),
            exact_match_categories=_EXACT_MATCH_CATEGORIES,
            limit=100,
        ),
        Protocol("unified_skg", rank=False),
        Protocol("bbh", num_shots=(3,), rank=False, layout=Layout(), exact_match="strict", primary="exact_match"),
        Protocol("mmlu", layout=Layout(), score_end=False),
    )
}


def find_protocol(name: str) -> Protocol:
    """The rules of a name. Raises ValueError listing the names."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol ({name!r}) must be one of: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
