"""XGLM's tokenizer: a sentencepiece model with fairseq's ids.

    <s> 0, <pad> 1, </s> 2, <unk> 3, then the model's pieces from the fourth on, then seven filler words

The fillers pad the dictionary to 256,008 entries, a multiple of 8: 4 special tokens, 255,997 pieces and 7 fillers. The
model normalises text: it applies NFKC, turns line breaks and tabs into spaces and merges runs of spaces. So it is not
lossless.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import sentencepiece

from moe.data.tokenizer_interface import StreamDecoder

NUM_FILLERS = 7  # <madeupword0> to <madeupword6>
_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
_PIECE_SPECIALS = {"unk_id": 0, "bos_id": 1, "eos_id": 2}  # in the sentencepiece model, which has no padding piece
_OFFSET = len(_SPECIALS) - len(_PIECE_SPECIALS)


class XGLMTokenizer:
    """A sentencepiece model with fairseq's ids. Raises ValueError if the model has other special pieces than XGLM's."""

    FILE = "sentencepiece.bpe.model"  # its name in public checkpoints, although it is a unigram model

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        found = {name: getattr(self._processor, name)() for name in _PIECE_SPECIALS}
        if found != _PIECE_SPECIALS:
            raise ValueError(
                f"the model has the special pieces {found}, but XGLM's has {_PIECE_SPECIALS}; a sentencepiece model "
                f"with other ids must not be named {self.FILE}"
            )
        self._num_pieces: int = self._processor.vocab_size()
        self.bos_id: int | None = _SPECIALS.index("<s>")
        self.eos_id = _SPECIALS.index("</s>")
        self.begin_id = self.eos_id  # XGLM's texts begin with </s>, not with its <s>
        self.unk_id = _SPECIALS.index("<unk>")
        self.vocab_size: int = self._num_pieces + _OFFSET + NUM_FILLERS
        self.fallback_ids = frozenset({self.unk_id})
        self.lossless = False
        self.hash = hashlib.sha256(b"fairseq ids\n" + model).hexdigest()

    @classmethod
    def load(cls, path: Path | str) -> XGLMTokenizer:
        """Read a sentencepiece model file. Raises ValueError if it is missing or is not a sentencepiece model."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"tokenizer {path} does not exist")
        try:
            return cls(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"tokenizer {path} is not a sentencepiece model: {error}") from error

    def save(self, folder: Path) -> list[Path]:
        """Write sentencepiece.bpe.model."""
        (folder / self.FILE).write_bytes(self._model)
        return [folder / self.FILE]

    def encode(self, text: str) -> list[int]:
        """Token ids, without separator and start token."""
        return self._to_dictionary(self._processor.encode(text))

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """`encode` each text, in sentencepiece's own threads."""
        return [self._to_dictionary(pieces) for pieces in self._processor.encode(texts, num_threads=num_threads)]

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids. Special tokens and fillers become nothing, <unk> the model's sign for it (" ⁇ ")."""
        pieces = [0 if token == self.unk_id else token - _OFFSET for token in tokens if self._is_text(token)]
        return self._processor.decode(pieces)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes one token at a time."""
        return StreamDecoder(self)

    def _to_dictionary(self, pieces: list[int]) -> list[int]:
        return [self.unk_id if piece == 0 else piece + _OFFSET for piece in pieces]

    def _is_text(self, token: int) -> bool:
        return self.unk_id <= token < self._num_pieces + _OFFSET
