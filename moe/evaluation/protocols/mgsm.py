"""Prompts of MGSM, math word problems in eleven languages, with the wording of its own exemplars.

The papers predate the set, so they have no prompt for it; their separators and demonstration draws are kept.
"""

from __future__ import annotations

from moe.evaluation.protocols.items import MASK, Item, Row, Template, columns, text

# the words before a question and before its solution
_WORDS = {
    "bn": ("প্রশ্ন:", "ধাপে ধাপে উত্তর:"),
    "de": ("Frage:", "Schritt-für-Schritt-Antwort:"),
    "en": ("Question:", "Step-by-Step Answer:"),
    "es": ("Pregunta:", "Respuesta paso a paso:"),
    "fr": ("Question :", "Réponse étape par étape :"),
    "ja": ("問題：", "ステップごとの答え："),
    "ru": ("Задача:", "Пошаговое решение:"),
    "sw": ("Swali:", "Jibu la Hatua kwa Hatua:"),
    "te": ("ప్రశ్న:", "దశలవారీగా సమాధానం:"),
    "th": ("โจทย์:", "คำตอบทีละขั้นตอน:"),
    "zh": ("问题：", "逐步解答："),
}
LANGUAGES = tuple(_WORDS)


def template(language: str, template_set: str = "corrected") -> Template:
    """The candidate is an exemplar's solution, or the bare number of a problem that has none.

    Exemplars already contain the words, problems do not. A line break would end an answer, so it becomes a space.
    Raises ValueError for a language MGSM lacks.
    """
    if language not in _WORDS:
        raise ValueError(f"mgsm has no template in the language {language!r}; it has: {', '.join(_WORDS)}")
    ask, solve = _WORDS[language]

    def of(row: Row) -> Item:
        question, number = columns(row, "question", "answer_number")
        solution = str(number) if row.get("answer") is None else _without_words(text(row["answer"], "answer"), 1)
        prompt = f"{ask} {_without_words(text(question, 'question'), 0)} {solve} {MASK}"
        return Item(prompt, (solution,), (0,))

    return of


def _without_words(passage: str, place: int) -> str:
    passage = " ".join(passage.split("\n")).strip()
    for words in _WORDS.values():
        passage = passage.removeprefix(words[place])
    return passage.strip()
