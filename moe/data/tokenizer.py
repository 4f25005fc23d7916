"""Sentencepiece without normalisation: decode(encode(text)) == text, for every text."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

# Sentencepiece writes a space as U+2581 inside its pieces. A U+2581 of the text itself goes by its UTF-8 bytes.
_META_SPACE = "▁"
_META_SPACE_BYTES = ("<0xE2>", "<0x96>", "<0x81>")
# A line break and the indentation behind it are one token, up to six levels of four spaces: trained pieces never span
# a line break, and in code every line would begin with two tokens.
_INDENTATIONS = [_META_SPACE * (4 * level) for level in range(7)]
_LINE_STARTS = [
    *(f"\n{spaces}" for spaces in _INDENTATIONS),
    *(f"\n\n{spaces}" for spaces in _INDENTATIONS[:3]),
    "\n\n\n",
]
_TRAINING_THREADS = 2  # a constant: unigram training adds floats in an order that depends on it


class Tokenizer:
    """A sentencepiece model with byte fallback. `eos_id` separates documents."""

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        self.hash = hashlib.sha256(model).hexdigest()
        self._meta_space_ids = [self._processor.piece_to_id(piece) for piece in _META_SPACE_BYTES]

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a sentencepiece model file.

        Raises ValueError when it is missing, is no such file, has no end-of-sentence piece or changes text.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"tokenizer {path} does not exist")
        try:
            tokenizer = cls(path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise ValueError(f"tokenizer {path} is not a sentencepiece model: {error}") from error
        if tokenizer.eos_id < 0:
            raise ValueError(f"tokenizer {path} has no end-of-sentence piece, which separates documents")
        probe = "Text  with\ttabs,\n\n    spaces ▁ and 漢字."
        if tokenizer.decode(tokenizer.encode(probe)) != probe:
            raise ValueError(
                f"tokenizer {path} changes text ({tokenizer.decode(tokenizer.encode(probe))!r} for {probe!r}), so bits "
                f"per byte would not count the text; train one with byte_fallback=true, "
                f"normalization_rule_name=identity, add_dummy_prefix=false and remove_extra_whitespaces=false"
            )
        return tokenizer

    def save(self, path: Path) -> None:
        """Write the model file."""
        path.write_bytes(self._model)

    def encode(self, text: str) -> list[int]:
        """Token ids, without the separator."""
        if _META_SPACE not in text:
            return self._processor.encode(text)
        first, *others = (self._processor.encode(part) for part in text.split(_META_SPACE))
        return first + [token for other in others for token in (*self._meta_space_ids, *other)]

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """`encode` of each text, in threads of sentencepiece's own."""
        encoded = self._processor.encode(texts, num_threads=num_threads)
        return [
            self.encode(text) if _META_SPACE in text else tokens for text, tokens in zip(texts, encoded, strict=True)
        ]

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._processor.decode(tokens)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder to feed one token at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Turns tokens into text piece by piece, holding back the first bytes of a character until its last one."""

    _LONGEST_CHARACTER = 4  # bytes of UTF-8, each at most one token

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` completes, which may be empty."""
        self._held.append(token)
        text = self._tokenizer.decode(self._held)
        if text.endswith("\ufffd") and len(self._held) < self._LONGEST_CHARACTER:
            return ""
        self._held = []
        return text

    def finish(self) -> str:
        """What was held back."""
        text = self._tokenizer.decode(self._held) if self._held else ""
        self._held = []
        return text


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: str = "bpe") -> Tokenizer:
    """Train on `texts`; the same texts give the same model. kind: "bpe" or "unigram".

    A line break with its indentation is a token, and runs of spaces are: code keeps its shape. Raises ValueError when
    the text is too little for the vocabulary, or the vocabulary too small for the 256 bytes.
    """
    smallest = 256 + 2 + len(_LINE_STARTS)  # bytes, separator and unknown
    if vocab_size < smallest:
        raise ValueError(f"data.vocab_size ({vocab_size}) must be at least {smallest}: each byte is a token")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=_LINE_STARTS,
            eos_id=0,
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=_LONGEST_LINE,
            shuffle_input_sentence=False,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"a {kind} tokenizer of data.vocab_size={vocab_size} cannot be trained on this text: "
            f"{str(error).strip().splitlines()[-1]}; lower data.vocab_size or give more text"
        ) from error
    return Tokenizer(model.getvalue())


_LONGEST_LINE = 16 * 1024  # characters; sentencepiece's trainer drops longer lines, so they are cut


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LONGEST_LINE // 4):  # at most 4 bytes a character
                yield line[start : start + _LONGEST_LINE // 4]
