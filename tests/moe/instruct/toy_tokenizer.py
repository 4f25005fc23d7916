"""A tokenizer whose tokens can be read: GPT-2's pieces, words with the space before them, numbered as they come."""

from __future__ import annotations

import re
from pathlib import Path

from moe.data.tokenizer_interface import StreamDecoder

_PIECE = re.compile(r" ?\w+| ?[^\w\s]|\s")


class ToyTokenizer:
    vocab_size = 4096
    eos_id = begin_id = 0
    bos_id = None
    fallback_ids: frozenset[int] = frozenset()
    lossless = True
    hash = "toy"

    def __init__(self) -> None:
        self._pieces = ["<eos>"]
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self._id(piece) for piece in _PIECE.findall(text)]

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self._pieces[token] for token in tokens)

    def pieces(self, tokens: list[int]) -> list[str]:
        return [self._pieces[token] for token in tokens]

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self)

    def save(self, folder: Path) -> list[Path]:
        raise NotImplementedError

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self._pieces)
            self._pieces.append(piece)
        return self._ids[piece]
