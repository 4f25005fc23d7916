"""From text to token shards, once: read, split, train the tokenizer, encode, measure the compressors, keep.

    <cache>/<name>-<key>/  tokenizer.model  compressors.json  train/  validation/  test/  (moe.data.shards)

The key is a hash of the settings and of what the text depends on, so another text or setting never meets this folder.
It is written aside and renamed, so a folder with this name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from moe.config import DataConfig
from moe.data import documents, package_corpora, python_corpus, text_files, tokenizer
from moe.data.compressors import WINDOW_BYTES, measure
from moe.data.documents import SPLITS, Document, split_of
from moe.data.shards import FORMAT, ShardWriter, TokenShard, file_sha256
from moe.data.tokenizer import Tokenizer, train_tokenizer

TOKENIZER_SAMPLE_BYTES = 32 * 2**20  # of training text, spread evenly over the corpus
_READERS = (documents, python_corpus, package_corpora, text_files, tokenizer)
_REMEMBERED_BYTES = 256 * 2**20  # a smaller corpus is kept in memory between the two passes
_BATCH_DOCUMENTS = 64

# {"validation": {"docs": {"gzip": 2.4, "xz": 2.2, "xz_given_train": 1.9}}, "test": ...} in bits per byte
Compressors = dict[str, dict[str, dict[str, float]]]


class Source(NamedTuple):
    """A corpus that can be read more than once."""

    fingerprint: str
    read: Callable[[], Iterator[Document]]


class PreparedCorpus:
    """The three splits, their tokenizer and the compressors' figures, opened and checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer = Tokenizer.load(path / "tokenizer.model")
        self.train, self.validation, self.test = (TokenShard(path / split) for split in SPLITS)
        self.compressors: Compressors = json.loads((path / "compressors.json").read_text())

    def identity(self) -> dict[str, str]:
        """What a run must find again to be continued: the tokenizer's hash and the tokens' of each split."""
        shards = {split: getattr(self, split).sha256 for split in SPLITS}
        return {"tokenizer": self.tokenizer.hash, **shards}


def prepare(config: DataConfig) -> PreparedCorpus:
    """Open the prepared corpus of `config`, making it first where there is none. Shows its progress on stderr.

    Raises ValueError for text that cannot be read, a split without text, or a damaged shard.
    """
    source = _source(config)
    given = None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
    folder = _cache_dir(config) / f"{config.name}-{_key(config, source, given)}"
    if not folder.is_dir():
        scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir(parents=True)
            _Preparation(config, source, given, scratch).run()
            if folder.is_dir():  # another process was faster; its text and settings are the same
                shutil.rmtree(scratch)
            else:
                scratch.rename(folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return PreparedCorpus(folder)


class _Preparation:
    """The two passes over the documents: the first for the tokenizer and the raw text, the second for the tokens."""

    def __init__(self, config: DataConfig, source: Source, given: Tokenizer | None, folder: Path) -> None:
        self.config = config
        self.source = source
        self.given = given
        self.folder = folder
        self.num_threads = _num_threads() if config.num_workers is None else config.num_workers

    def run(self) -> None:
        remembered, sample, held = self._first_pass()
        chosen = self.given
        if chosen is None:
            kind, size = self.config.tokenizer_type, self.config.vocab_size
            sys.stderr.write(f"training a {kind} tokenizer of {size} tokens\n")
            chosen = train_tokenizer(sample, size, kind)
        chosen.save(self.folder / "tokenizer.model")
        with ThreadPoolExecutor(self.num_threads) as pool:  # both compressors release the interpreter lock
            pending = {
                (split, domain): pool.submit(measure, bytes(held["train", domain]), bytes(text))
                for (split, domain), text in held.items()
                if split != "train"
            }
            self._second_pass(self.source.read() if remembered is None else iter(remembered), chosen)
            compressors: Compressors = {split: {} for split in SPLITS[1:]}
            for split, domain in tqdm(pending, desc="gzip and xz", unit="text", file=sys.stderr, disable=None):
                compressors[split][domain] = pending[split, domain].result()._asdict()
        (self.folder / "compressors.json").write_text(json.dumps(compressors, indent=1))

    def _first_pass(self) -> tuple[list[Document] | None, list[str], dict[tuple[str, str], bytearray]]:
        """The documents, if they are few enough to remember; text for the tokenizer; text for the compressors."""
        remembered: list[Document] | None = []
        sample = _EvenSample(TOKENIZER_SAMPLE_BYTES)
        held: dict[tuple[str, str], bytearray] = {}
        num_bytes = num_documents = 0
        for document in tqdm(self.source.read(), desc="reading", unit="doc", file=sys.stderr, disable=None):
            content = document.text.encode()
            num_documents += 1
            num_bytes += len(content)
            split = self._split(document)
            text = held.setdefault((split, document.domain), bytearray())
            text += content
            if split == "train":
                sample.add(document.text, len(content))
                del text[:-WINDOW_BYTES]  # xz sees no further back
            else:
                del text[WINDOW_BYTES:]
            if remembered is not None:
                remembered.append(document)
                if num_bytes > _REMEMBERED_BYTES:
                    remembered = None
        self._refuse_empty(num_documents, num_bytes, held)
        for _, domain in list(held):
            held.setdefault(("train", domain), bytearray())
        return remembered, sample.texts(), held

    def _refuse_empty(self, num_documents: int, num_bytes: int, held: dict[tuple[str, str], bytearray]) -> None:
        where = self.config.path if self.config.name == "text" else f"data={self.config.name}"
        if num_bytes == 0:
            raise ValueError(f"the corpus {where} is empty: {num_documents} documents, no text")
        for split in SPLITS:
            if not any(name == split for name, _ in held):
                raise ValueError(
                    f"no text falls into the {split} split: the corpus {where} has {num_documents} documents "
                    f"({num_bytes} bytes); give more, or raise data.validation_fraction and data.test_fraction"
                )

    def _second_pass(self, stream: Iterator[Document], trained: Tokenizer) -> None:
        writers = {
            split: ShardWriter(self.folder / split, vocab_size=trained.vocab_size, tokenizer_hash=trained.hash)
            for split in SPLITS
        }
        with tqdm(desc="encoding", unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar:
            while batch := list(islice(stream, _BATCH_DOCUMENTS)):
                encoded = trained.encode_batch([document.text for document in batch], self.num_threads)
                for document, tokens in zip(batch, encoded, strict=True):
                    num_bytes = len(document.text.encode())
                    writers[self._split(document)].add(document.domain, [*tokens, trained.eos_id], num_bytes)
                    bar.update(num_bytes)
        for writer in writers.values():
            writer.finish()

    def _split(self, document: Document) -> str:
        return split_of(document.group, self.config.validation_fraction, self.config.test_fraction)


class _EvenSample:
    """Texts of at most `budget` bytes, spread evenly: when they are too many, every second one is let go."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._texts: list[tuple[str, int]] = []
        self._size = self._seen = 0
        self._stride = 1

    def add(self, text: str, num_bytes: int) -> None:
        if self._seen % self._stride == 0:
            self._texts.append((text, num_bytes))
            self._size += num_bytes
        self._seen += 1
        while self._size > self._budget and len(self._texts) > 1:
            self._texts = self._texts[::2]
            self._stride *= 2
            self._size = sum(size for _, size in self._texts)

    def texts(self) -> list[str]:
        return [text for text, _ in self._texts]


def _source(config: DataConfig) -> Source:
    if config.name == "python":
        return Source(python_corpus.fingerprint(), python_corpus.read)
    if config.name == "packages":
        return Source(package_corpora.fingerprint(), package_corpora.read)
    files = text_files.find_files(config.path)
    return Source(text_files.fingerprint(files, config.text_field), lambda: text_files.read(files, config.text_field))


def _key(config: DataConfig, source: Source, given: Tokenizer | None) -> str:
    vocabulary = [config.tokenizer_type, config.vocab_size] if given is None else [given.hash]
    # the code that reads is part of what was read: a corpus prepared by another version is not used by this one
    readers = [file_sha256(Path(str(module.__file__))) for module in _READERS]
    settings = [FORMAT, source.fingerprint, readers, config.validation_fraction, config.test_fraction, vocabulary]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _cache_dir(config: DataConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "moe"


def _num_threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
