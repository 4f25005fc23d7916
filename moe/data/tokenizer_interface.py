"""The interface of all tokenizers, and incremental decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back. `moe.data.tokenizer.open_tokenizer` opens one."""

    @property
    def vocab_size(self) -> int:
        """The largest id plus one."""

    @property
    def eos_id(self) -> int:
        """Ends documents; in training it also precedes the first. Only a text format puts it into encoded text."""

    @property
    def bos_id(self) -> int | None:
        """The start-of-text token that the tokenizer's makers define; None if they define none."""

    @property
    def begin_id(self) -> int:
        """Precedes prompts and scored text: `eos_id`, unless the tokenizer's makers use another token.

        Documents of a prepared corpus begin with that other token too. "add_bos_token": false in the
        tokenizer_config.json beside the tokenizer makes this `eos_id`.
        """

    @property
    def fallback_ids(self) -> frozenset[int]:
        """Ids for text outside the vocabulary: single bytes and <unk>. The corpus report counts them."""

    @property
    def lossless(self) -> bool:
        """Whether decode(encode(text)) == text."""

    @property
    def hash(self) -> str:
        """Hexadecimal SHA-256 of everything that determines the ids: equal hashes mean equal tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids, without separator or start token. Names of special tokens in `text` are plain text."""

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """`encode` each text, in the library's own threads."""

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids; invalid UTF-8 becomes U+FFFD, special tokens become nothing.

        So do ids beyond the vocabulary: an embedding is often wider, and a model may write those.
        """

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes one token at a time."""

    def save(self, folder: Path) -> list[Path]:
        """Write its files into `folder`, under the names `open_tokenizer` recognises, and return them."""


class StreamDecoder:
    """Turns tokens into text piece by piece, holding back incomplete characters."""

    _LONGEST_CHARACTER = 4  # bytes of UTF-8, each at most one token

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []
        # decoded before the held tokens: many tokenizers drop the space of a first word
        self._context: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        self._held.append(token)
        text = self._text()
        if text.endswith("\ufffd") and len(self._held) < self._LONGEST_CHARACTER:
            return ""
        if text.endswith("\ufffd"):  # emit the part that cannot belong to a character still to come
            for cut in range(1, len(self._held)):
                rest = self._tokenizer.decode(self._held[cut:])
                if text.endswith(rest) and self._text(cut) + rest == text:
                    text = self._text(cut)
                    self._take(text, cut)
                    return text
        self._take(text, len(self._held))
        return text

    def finish(self) -> str:
        """The text held back."""
        text = self._text() if self._held else ""
        self._take(text, len(self._held))
        return text

    def _text(self, count: int | None = None) -> str:
        """Text of the first `count` held tokens; None means all."""
        held = self._held[:count]
        before = self._tokenizer.decode(self._context)
        both = self._tokenizer.decode([*self._context, *held])
        return both[len(before) :] if both.startswith(before) else self._tokenizer.decode(held)

    def _take(self, text: str, count: int) -> None:
        # a broken character must not be completed by what follows
        if text and not text.endswith("\ufffd"):
            self._context = self._held[:count]
        elif text:
            self._context = []
        self._held = self._held[count:]
