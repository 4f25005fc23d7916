"""How well the vocabulary fits each domain: coverage and fertility."""

from __future__ import annotations

from collections import Counter
from typing import TypedDict

from moe.data.tokenizer_interface import Tokenizer


class Fit(TypedDict):
    """Figures of one domain's text."""

    bytes: int  # UTF-8
    characters: int
    words: int  # separated by white space; few in languages that write no spaces
    tokens: int  # without the separators of documents
    coverage: float  # share of the characters that the vocabulary covers without byte tokens and <unk>
    tokens_per_word: float  # fertility
    characters_per_token: float
    bytes_per_token: float


class VocabularyReport:
    """Collects counts while documents are encoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._characters: dict[str, Counter[str]] = {}
        self._counts: dict[str, Counter[str]] = {}

    def add(self, domain: str, text: str, num_tokens: int) -> None:
        """Count one document, which became `num_tokens` tokens."""
        self._characters.setdefault(domain, Counter()).update(text)
        counts = self._counts.setdefault(domain, Counter())
        counts["bytes"] += len(text.encode())
        counts["words"] += len(text.split())
        counts["tokens"] += num_tokens

    def figures(self) -> dict[str, Fit]:
        """The figures of each domain, sorted by domain."""
        every = sorted(set().union(*self._characters.values()))
        familiar = {character for character in every if self._knows(character)}
        return {domain: self._fit(domain, familiar) for domain in sorted(self._counts)}

    def _knows(self, character: str) -> bool:
        return not self._tokenizer.fallback_ids.intersection(self._tokenizer.encode(character))

    def _fit(self, domain: str, familiar: set[str]) -> Fit:
        counts, characters = self._counts[domain], self._characters[domain]
        known = sum(count for character, count in characters.items() if character in familiar)
        total, tokens = characters.total(), counts["tokens"]
        return Fit(
            bytes=counts["bytes"],
            characters=total,
            words=counts["words"],
            tokens=tokens,
            coverage=known / total,
            tokens_per_word=tokens / max(counts["words"], 1),
            characters_per_token=total / max(tokens, 1),
            bytes_per_token=counts["bytes"] / max(tokens, 1),
        )


def table(figures: dict[str, Fit]) -> str:
    """Format the figures as a text table."""
    width = max(len("domain"), *(len(domain) for domain in figures))
    lines = [f"{'domain':{width}}  {'bytes':>13}  {'tokens':>13}  coverage  tokens/word  chars/token  bytes/token"]
    for domain, fit in figures.items():
        lines.append(
            f"{domain:{width}}  {fit['bytes']:13,}  {fit['tokens']:13,}  {fit['coverage']:8.3%}  "
            f"{fit['tokens_per_word']:11.2f}  {fit['characters_per_token']:11.2f}  {fit['bytes_per_token']:11.2f}"
        )
    return "\n".join(lines)
