"""How a model is asked and marked: the rules of a published evaluation under one name (opt_iml.md 7)."""

from __future__ import annotations

from dataclasses import dataclass

from moe.instruct.evaluation.metrics import EXACT_MATCH_RULES
from moe.instruct.evaluation.ranking import NORMALISATIONS
from moe.instruct.formatting import EVALUATION_SEPARATOR, Layout


@dataclass(frozen=True)
class Protocol:
    """The rules. Tasks, numbers of demonstrations and limits can be told apart from them in every evaluation."""

    name: str
    num_shots: tuple[int, ...] = (0, 5)
    rank: bool = True  # records with candidates are ranked by likelihood; False writes an answer for all
    always_written: tuple[str, ...] = ()  # benchmarks whose tasks are written although they have candidates
    normalisation: str = "sum"  # of a candidate's likelihood, of moe.instruct.evaluation.ranking
    score_end: bool = True  # the end of the answer counts, as in tuning's loss; "no" is then no beginning of "not so"
    layout: Layout | None = None  # of all prompts; None draws delimiter and lead-ins for each example, as in training
    separator: str = EVALUATION_SEPARATOR  # between demonstrations; text that a few-shot answer ends before, too
    max_new_tokens: int = 256
    exact_match: str = "normalised"
    primary: str = "rouge_l"  # the score of a task whose answers are written; a ranked one has accuracy
    exact_match_categories: tuple[str, ...] = ()  # whose written tasks score by exact match, whatever `primary` says
    limit: int | None = None  # raw examples of each task, the first ones

    def __post_init__(self) -> None:
        if not self.num_shots or min(self.num_shots) < 0 or len(set(self.num_shots)) < len(self.num_shots):
            raise ValueError(f"num_shots {list(self.num_shots)} must be different numbers, none below 0")
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
            raise ValueError("separator must not be empty: demonstrations would run into each other")


# those of the test tasks whose published metric is exact match; the others have ROUGE-L (opt_iml.md 7)
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
        # a task with candidates is ranked, except in Super-NaturalInstructions
        Protocol("opt_iml", always_written=("super_natural_instructions",)),
        # T0's: ranked by the sum with the end token, which its tokenizer adds to every answer; zero-shot
        Protocol("promptsource", num_shots=(0,)),
        # FLAN's prompts list the options, and its answers are ranked; without options, written
        Protocol("flan"),
        # every task is written, classification too; the first 100 instances; the published words around the parts
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
    """The rules of a name. Raises ValueError with the names there are."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol {name!r} must be one of: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
