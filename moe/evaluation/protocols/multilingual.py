"""Prompts of the multilingual tasks, in English or another language (Lin et al. 2021): row -> Item.

The template's language need not be the text's: the XGLM paper's main results use English templates throughout, and its
ablation crosses the languages of template, demonstrations and question.
"""

from __future__ import annotations

import string
from collections.abc import Mapping

from moe.evaluation.protocols.items import MASK, Item, Row, Template, columns, index, texts

# "corrected" is "machine" with the entries that people corrected; all others are the same in both
TEMPLATE_SETS = ("corrected", "machine")

# XCOPA: what joins premise and choice when the question is the cause, and the effect
_CONNECTIVES = {
    "en": (" because ", " so "),
    "et": (", sest ", " nii "),
    "ht": (" paske ", " konsa "),
    "id": (" karena ", " begitu "),
    "it": (" perché ", " quindi "),
    "qu": (" ", " "),  # none: the sentences simply follow each other
    "sw": (" kwa sababu ", " hivyo "),
    "ta": (" ஏனெனில் ", " எனவே "),
    "th": (" เพราะ ", " ดังนั้น "),
    "tr": (" çünkü ", " yani "),
    "vi": (" bởi vì ", " nên "),
}
_CORRECTED_CONNECTIVES = {
    "it": (" perché ", " e quindi "),
    "tr": (" çünkü ", ", o nedenle "),
    "vi": (" bởi vì ", " thế nên "),
    "zh": ("因为", "所以"),  # the machine translation is not on record
}

# XNLI: the tag after the premise; the words for entailment, neutral and contradiction, in the order of the labels
_TAGS = {
    "ar": None,  # only the tag is on record
    "bg": ("нали?", "Да", "Също", "Не"),
    "de": ("rechts?", "Jawohl", "Ebenfalls", "Nein"),
    "el": None,
    "en": ("right?", "Yes", "Also", "No"),
    "es": ("¿Derecha?", "sí", "También", "No"),
    "fr": ("droit?", "Oui", "Aussi", "Non"),
    "hi": None,
    "ru": ("Правильно?", "да", "Также", "Нет"),
    "sw": ("haki?", "Ndio", "Pia", "Hapana"),
    "th": ("ขวา?", "ใช่", "อีกด้วย", "เลขที่"),
    "tr": ("sağ?", "Evet", "Ayrıca", "Numara"),
    "ur": None,
    "vi": ("đúng?", "đúng", "Cũng", "Không"),
    "zh": ("对？", "是的", "还", "不"),
}
_CORRECTED_TAGS = {
    "bg": ("нали?", "Да", "Също", "Не"),
    "de": ("oder?", "Ja", "Außerdem", "Nein"),
    "el": ("αλήθεια?", "Ναί", "Επίσης", "Οχι"),
    "es": ("¿verdad?", "Sí", "Además", "No"),
    "fr": ("je me trompe?", "Oui", "Également", "Non"),
    "hi": ("सही?", "हाँ", "तथा", "नहीं"),
    "ru": ("верно?", "Да", "Также", "Нет"),
    "sw": ("haki?", "Ndio", "Pia", "Hapana"),
    "vi": ("đúng không?", "Đúng", "Ngoài ra", "Không"),
    "zh": ("对吗？", "是的", "而且", "不"),
}
XCOPA_LANGUAGES = ("et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh")
XNLI_LANGUAGES = tuple(_TAGS)
PAWSX_LANGUAGES = ("de", "en", "es", "fr", "ja", "ko", "zh")
XWINOGRAD_LANGUAGES = ("en", "fr", "jp", "pt", "ru", "zh")
XSTORY_CLOZE_LANGUAGES = ("ar", "en", "es", "eu", "hi", "id", "my", "ru", "sw", "te", "zh")


def xcopa(language: str, template_set: str = "corrected") -> Template:
    """XCOPA with the connectives of `language`. Raises ValueError if none are on record."""
    connectives = _lookup("xcopa", language, template_set, _CONNECTIVES, _CORRECTED_CONNECTIVES)

    def template(row: Row) -> Item:
        premise, *choices = texts(row, "premise", "choice1", "choice2")
        question, label = columns(row, "question", "label")
        connective = connectives[index(question, ("cause", "effect"), "question")]
        premise = premise.strip()
        if premise.endswith((".", "。")):
            premise = premise[:-1]
        candidates = tuple(_lower_first_letter(choice.strip()) for choice in choices)
        return Item(f"{premise}{connective}{MASK}", candidates, (index(label, (0, 1), "label"),))

    return template


def xnli(language: str, template_set: str = "corrected") -> Template:
    """XNLI and MNLI: `premise, right? Yes, hypothesis`. Raises ValueError for a language without a template."""
    tag, *words = _lookup("xnli", language, template_set, _TAGS, _CORRECTED_TAGS)

    def template(row: Row) -> Item:
        premise, hypothesis = texts(row, "premise", "hypothesis")
        premise = premise.strip()
        premise = premise[:1].upper() + premise[1:]
        while premise and premise[-1] in string.punctuation + string.whitespace:
            premise = premise[:-1]
        hypothesis = hypothesis.strip()
        if not hypothesis.startswith(("I ", "I,", "I'")):
            hypothesis = _lower_first_letter(hypothesis)
        gold = index(columns(row, "label")[0], (0, 1, 2), "label")
        return Item(f"{premise}, {tag} {MASK}, {hypothesis}", tuple(words), (gold,))

    return template


def pawsx(language: str, template_set: str = "corrected") -> Template:
    """PAWS-X: `sentence, right? Yes, sentence`, with unmodified sentences. Only English templates are on record."""
    _lookup("pawsx", language, template_set, {"en": ("No", "Yes")}, {})

    def template(row: Row) -> Item:
        first, second = texts(row, "sentence1", "sentence2")
        gold = index(columns(row, "label")[0], (0, 1), "label")
        return Item(f"{first}, right? {MASK}, {second}", ("No", "Yes"), (gold,))

    return template


def _lookup(
    task: str,
    language: str,
    template_set: str,
    machine: Mapping[str, tuple[str, ...] | None],
    corrected: Mapping[str, tuple[str, ...]],
) -> tuple[str, ...]:
    if template_set not in TEMPLATE_SETS:
        raise ValueError(f"template_set ({template_set!r}) must be one of: {', '.join(TEMPLATE_SETS)}")
    entries = {code: entry for code, entry in machine.items() if entry is not None}
    if template_set == "corrected":
        entries |= corrected
    if language not in entries:
        raise ValueError(
            f"{task} has no {template_set} template in the language {language!r}; it has: {', '.join(sorted(entries))}"
        )
    return entries[language]


def _lower_first_letter(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
