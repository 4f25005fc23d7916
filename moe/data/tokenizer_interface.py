"""What every tokenizer can do, and text from tokens one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back. `moe.data.tokenizer.open_tokenizer` opens one."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eos_id(self) -> int:
        """Ends documents, and in training stands before the first. Encoded text holds it by its format alone."""

    @property
    def bos_id(self) -> int | None:
        """The token that the tokenizer's makers name as a text's start; None where they name none."""

    @property
    def begin_id(self) -> int:
        """Stands before a prompt and before what is scored: `eos_id`, unless the makers put another token there.

        Documents of a prepared corpus begin with that other token too. An "add_bos_token": false in the
        tokenizer_config.json beside the tokenizer makes this `eos_id`.
        """

    @property
    def fallback_ids(self) -> frozenset[int]:
        """Ids for what the vocabulary lacks: single bytes and <unk>. The corpus report counts them."""

    @property
    def lossless(self) -> bool:
        """Whether decode(encode(text)) == text."""

    @property
    def hash(self) -> str:
        """Hexadecimal SHA-256 of what decides the ids: equal hashes mean equal tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids, without separator or start token. Names of special tokens in `text` are plain text."""

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """`encode` of each text, in threads of the library's own."""

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD, special tokens nothing."""

    def stream_decoder(self) -> StreamDecoder:
        """A decoder to feed one token at a time."""

    def save(self, folder: Path) -> list[Path]:
        """Write its files into `folder`, under the names that `open_tokenizer` knows them by, and return them."""


class StreamDecoder:
    """Turns tokens into text piece by piece, holding back the first bytes of a character until its last one."""

    _LONGEST_CHARACTER = 4  # bytes of UTF-8, each at most one token

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []
        # decoded again before the held ones: many tokenizers drop the space of a first word
        self._context: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` completes, which may be empty."""
        self._held.append(token)
        text = self._text()
        if text.endswith("\ufffd") and len(self._held) < self._LONGEST_CHARACTER:
            return ""
        if text.endswith("\ufffd"):  # what cannot belong to the character that may still be coming goes
            for cut in range(1, len(self._held)):
                rest = self._tokenizer.decode(self._held[cut:])
                if text.endswith(rest) and self._text(cut) + rest == text:
                    text = self._text(cut)
                    self._take(text, cut)
                    return text
        self._take(text, len(self._held))
        return text

    def finish(self) -> str:
        """What was held back."""
        text = self._text() if self._held else ""
        self._take(text, len(self._held))
        return text

    def _text(self, count: int | None = None) -> str:
        """Of the first `count` held tokens, None for all."""
        held = self._held[:count]
        before = self._tokenizer.decode(self._context)
        both = self._tokenizer.decode([*self._context, *held])
        return both[len(before) :] if both.startswith(before) else self._tokenizer.decode(held)

    def _take(self, text: str, count: int) -> None:
        # a broken character must not be completed by what follows it
        if text and not text.endswith("\ufffd"):
            self._context = self._held[:count]
        elif text:
            self._context = []
        self._held = self._held[count:]
