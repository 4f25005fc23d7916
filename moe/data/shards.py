"""Token shards: one split of a corpus as a memory-mapped file of token ids, with a checksum.

tokens.bin     uint16 or uint32, little-endian: every document followed by the separator
documents.npy  (N, 3) int64: where each document starts, its domain, its UTF-8 bytes
meta.json      dtype, vocabulary size, tokenizer hash, domains, counts, sha256 of both files; written last
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1


def token_dtype(vocab_size: int) -> str:
    """The smaller of the two types that fits the vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class ShardWriter:
    """Appends documents to a new shard; `finish` makes it readable."""

    def __init__(self, folder: Path, *, vocab_size: int, tokenizer_hash: str, dtype: str | None = None) -> None:
        dtype = token_dtype(vocab_size) if dtype is None else dtype
        if vocab_size - 1 > np.iinfo(dtype).max:
            raise ValueError(
                f"a vocabulary of {vocab_size} does not fit {dtype}, whose largest id is {np.iinfo(dtype).max}; "
                f"use uint32 or a smaller vocabulary"
            )
        self._folder = folder
        self._meta: dict[str, Any] = {
            "format": FORMAT,
            "dtype": dtype,
            "vocab_size": vocab_size,
            "tokenizer": tokenizer_hash,
        }
        self._domains: list[str] = []
        self._documents: list[tuple[int, int, int]] = []
        self._num_tokens = 0
        folder.mkdir(parents=True)
        self._file = (folder / "tokens.bin").open("wb")

    def add(self, domain: str, tokens: list[int], num_bytes: int) -> None:
        """Append one document: its tokens with the separator, and the UTF-8 length of its text."""
        if domain not in self._domains:
            self._domains.append(domain)
        self._documents.append((self._num_tokens, self._domains.index(domain), num_bytes))
        self._file.write(np.asarray(tokens, dtype=np.dtype(self._meta["dtype"]).newbyteorder("<")).tobytes())
        self._num_tokens += len(tokens)

    def finish(self) -> None:
        """Write the index and the checksums."""
        self._file.close()
        documents = np.array(self._documents, dtype=np.int64).reshape(-1, 3)
        np.save(self._folder / "documents.npy", documents, allow_pickle=False)
        self._meta |= {
            "domains": self._domains,
            "num_documents": len(documents),
            "num_tokens": self._num_tokens,
            "num_bytes": int(documents[:, 2].sum()),
            "sha256": {name: file_sha256(self._folder / name) for name in ("tokens.bin", "documents.npy")},
        }
        (self._folder / "meta.json").write_text(json.dumps(self._meta, indent=1))


class TokenShard:
    """A finished shard, verified when opened.

    Raises ValueError naming a file that is missing, truncated or changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta_file = folder / "meta.json"
        if not meta_file.is_file():
            raise ValueError(f"{folder} is not a token shard: it has no meta.json; `moe prepare` writes one")
        try:
            meta = json.loads(meta_file.read_text())
            number = meta["format"]
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(
                f"{meta_file} is damaged ({error!r}); delete {folder.parent} and run the same command again to prepare "
                f"the corpus again"
            ) from error
        if number != FORMAT:
            raise ValueError(
                f"{folder} has shard format {number}, not {FORMAT}; delete {folder.parent} to prepare it again"
            )
        for name, expected in meta["sha256"].items():
            found = file_sha256(folder / name) if (folder / name).is_file() else "no such file"
            if found != expected:
                raise ValueError(
                    f"{folder / name} is damaged: sha256 {found}, expected {expected}; "
                    f"delete {folder.parent} and run the same command again to prepare the corpus again"
                )
        self.vocab_size: int = meta["vocab_size"]
        self.tokenizer_hash: str = meta["tokenizer"]
        self.sha256: str = meta["sha256"]["tokens.bin"]
        self.domains: list[str] = sorted(meta["domains"])
        self.num_tokens: int = meta["num_tokens"]
        self.num_bytes: int = meta["num_bytes"]
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        path = folder / "tokens.bin"
        # an empty file cannot be memory-mapped
        self.tokens = np.memmap(path, dtype=dtype, mode="r") if self.num_tokens else np.empty(0, dtype)
        documents = np.load(folder / "documents.npy", allow_pickle=False)
        self.document_starts: np.ndarray = documents[:, 0]  # (N,)
        self.document_bytes: np.ndarray = documents[:, 2]  # (N,)
        self.document_lengths = np.diff(self.document_starts, append=self.num_tokens)  # (N,) tokens
        self._domain_of_document = documents[:, 1]
        self._domain_numbers = {name: number for number, name in enumerate(meta["domains"])}

    def tokens_of(self, domain: str) -> int:
        """Tokens of a domain, separators included."""
        return int(self.document_lengths[self.documents_of(domain)].sum())

    def documents_of(self, domain: str) -> np.ndarray:
        """Indices of the documents of a domain, in order."""
        return np.flatnonzero(self._domain_of_document == self._domain_numbers[domain])

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, ending with its separator."""
        end = self.document_starts[index + 1] if index + 1 < len(self.document_starts) else self.num_tokens
        return self.tokens[self.document_starts[index] : end]


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
