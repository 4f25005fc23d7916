"""Sentencepiece tokenizers. Those trained here do not normalise: decode(encode(text)) == text for every text."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from moe.data import hf_tokenizer
from moe.data.tokenizer_interface import StreamDecoder

# Sentencepiece writes a space as U+2581 in its pieces. A U+2581 in the text itself is encoded as its UTF-8 bytes.
_META_SPACE = "▁"
_META_SPACE_BYTES = ("<0xE2>", "<0x96>", "<0x81>")
# A line break and the indentation after it are one token, up to six levels of four spaces. Trained pieces never span a
# line break, so without these tokens every indented line of code would begin with two.
_INDENTATIONS = [_META_SPACE * (4 * level) for level in range(7)]
_LINE_STARTS = [
    *(f"\n{spaces}" for spaces in _INDENTATIONS),
    *(f"\n\n{spaces}" for spaces in _INDENTATIONS[:3]),
    "\n\n\n",
]
_TRAINING_THREADS = 2  # fixed, because the order in which unigram training adds floats depends on it
_PROBE = "Text  with\ttabs,\n\n    spaces ▁ and 漢字."


class SentencePieceTokenizer:
    """A sentencepiece model with its own ids. A lossless model has byte fallback and does not change text.

    settings: the content of the tokenizer_config.json beside the model. Its "add_bos_token" alone decides whether texts
    begin with the start piece: most models have such a piece, but do not say whether it is used. Raises ValueError if
    the settings are not JSON.
    """

    FILE = "tokenizer.model"
    SETTINGS = hf_tokenizer.SETTINGS[0]

    def __init__(self, model: bytes, settings: bytes | None = None) -> None:
        self._model = model
        self._settings = settings
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        begin: int = self._processor.bos_id()
        self.bos_id = begin if begin >= 0 else None
        wishes = {} if settings is None else hf_tokenizer.json_object(settings, self.SETTINGS, Path(self.FILE))
        starts = bool(wishes.get("add_bos_token")) and self.bos_id is not None
        self.begin_id: int = begin if starts else self.eos_id
        self.hash = hashlib.sha256(model).hexdigest()
        self._meta_space_ids = [self._processor.piece_to_id(piece) for piece in _META_SPACE_BYTES]
        self._parts = self.unk_id not in self._meta_space_ids  # whether U+2581 is encoded as its bytes
        # a model like Llama's puts a space before each text it encodes, so it would put one before each part
        self._parts = self._parts and self.lossless
        self.fallback_ids = frozenset(
            token
            for token in range(self.vocab_size)
            if self._processor.is_byte(token) or self._processor.is_unknown(token)
        )

    @classmethod
    def load(cls, path: Path | str) -> SentencePieceTokenizer:
        """Read a sentencepiece model file and the settings beside it.

        Raises ValueError if the file is missing, is not a sentencepiece model or has no end-of-sentence piece.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"tokenizer {path} does not exist")
        beside = path.parent / cls.SETTINGS
        try:
            tokenizer = cls(path.read_bytes(), beside.read_bytes() if beside.is_file() else None)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"tokenizer {path} is not a sentencepiece model: {error}") from error
        if tokenizer.eos_id < 0:
            raise ValueError(f"tokenizer {path} has no end-of-sentence piece to separate documents; train it with one")
        return tokenizer

    @property
    def lossless(self) -> bool:
        return self.decode(self.encode(_PROBE)) == _PROBE

    def save(self, folder: Path) -> list[Path]:
        """Write tokenizer.model and the settings it was read with."""
        files = {self.FILE: self._model} | ({} if self._settings is None else {self.SETTINGS: self._settings})
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return [folder / name for name in files]

    def encode(self, text: str) -> list[int]:
        """Token ids, without the separator."""
        if _META_SPACE not in text or not self._parts:
            return self._processor.encode(text)
        first, *others = (self._processor.encode(part) for part in text.split(_META_SPACE))
        return first + [token for other in others for token in (*self._meta_space_ids, *other)]

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """`encode` each text, in sentencepiece's own threads."""
        encoded = self._processor.encode(texts, num_threads=num_threads)
        return [
            self.encode(text) if _META_SPACE in text else tokens for text, tokens in zip(texts, encoded, strict=True)
        ]

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids; invalid UTF-8 becomes U+FFFD, ids beyond the vocabulary become nothing."""
        return self._processor.decode([token for token in tokens if token < self.vocab_size])

    def piece(self, token: int) -> str:
        """The model's name for a token, such as "</s>"."""
        return self._processor.id_to_piece(token)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes one token at a time."""
        return StreamDecoder(self)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    kind: str = "bpe",
    *,
    line_starts: bool = True,
    character_coverage: float = 0.9999,
) -> SentencePieceTokenizer:
    """Train on `texts`. The same texts give the same model.

    kind: "bpe" or "unigram". line_starts: encode a line break with its indentation as one token, which shortens code;
    False for text without line breaks (data.text_format=fairseq). Runs of spaces can always become tokens.
    character_coverage: the share of the characters of `texts`, most frequent first, that become pieces; the others are
    encoded as bytes. Raises ValueError if there is too little text for the vocabulary, or if the vocabulary is too
    small for the 256 bytes.
    """
    symbols = _LINE_STARTS if line_starts else []
    smallest = 256 + 2 + len(symbols)  # bytes, separator and unknown
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
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=symbols,
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
    return SentencePieceTokenizer(model.getvalue())


_LONGEST_LINE = 16 * 1024  # characters; sentencepiece's trainer drops longer lines, so they are cut


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LONGEST_LINE // 4):  # a character has at most 4 bytes
                yield line[start : start + _LONGEST_LINE // 4]
