"""From text to token shards, done once: read, split, train the tokenizer, encode, measure the compressors, store.

    <cache>/<name>-<key>/  the tokenizer's files  compressors.json  vocabulary.json  train/  validation/  test/
                           (moe.data.shards)

The key is a hash of the settings and of everything the text depends on, so other text or settings get another folder.
It is written under a temporary name and renamed, so a folder with this name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from moe.config import DataConfig
from moe.config.data import MixtureConfig
from moe.data import (
    compressors,
    documents,
    hf_tokenizer,
    package_corpora,
    python_corpus,
    sampling,
    sentencepiece_tokenizer,
    text_files,
    text_format,
    vocabulary_report,
    vocabulary_sample,
    xglm_tokenizer,
)
from moe.data.code_hash import code_sha256
from moe.data.compressors import WINDOW_BYTES, measure
from moe.data.documents import SPLITS, Document, split_of
from moe.data.sampling import SourcePlan, plan
from moe.data.shards import FORMAT, ShardWriter, TokenShard
from moe.data.text_format import FairseqText, document_text
from moe.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer
from moe.data.vocabulary_report import Fit, VocabularyReport
from moe.data.vocabulary_sample import BalancedSample, EvenSample

TOKENIZER_SAMPLE_BYTES = 32 * 2**20  # of training text, sampled evenly over the corpus
# together with this file they decide the documents, the tokens and the measured figures
_DECIDING = (
    documents,
    python_corpus,
    package_corpora,
    text_files,
    text_format,
    sentencepiece_tokenizer,
    xglm_tokenizer,
    hf_tokenizer,
    vocabulary_sample,
    vocabulary_report,
    sampling,
    compressors,
)
_REMEMBERED_BYTES = 256 * 2**20  # smaller corpora are kept in memory between the two passes
_BATCH_DOCUMENTS = 64

# {"validation": {"docs": {"gzip": 2.4, "xz": 2.2, "xz_given_train": 1.9}}, "test": ...} in bits per byte
Compressors = dict[str, dict[str, dict[str, float]]]


class Source(NamedTuple):
    """A corpus that can be read more than once."""

    fingerprint: str
    read: Callable[[], Iterator[Document]]


class PreparedCorpus:
    """The three splits, their tokenizer, its fit to the text and the compressors' figures, opened and checked."""

    def __init__(self, path: Path, text_format: str = "plain") -> None:
        self.path = path
        self.tokenizer = open_tokenizer(path, text_format=text_format, allow_lossy=True)
        self.train, self.validation, self.test = (TokenShard(path / split) for split in SPLITS)
        self.compressors: Compressors = json.loads((path / "compressors.json").read_text())
        self.vocabulary: dict[str, Fit] = json.loads((path / "vocabulary.json").read_text())

    def mixture(self, config: MixtureConfig, total_tokens: int) -> list[SourcePlan]:
        """What a run of `total_tokens` reads of each domain; empty without data.mixture.alpha."""
        if config.alpha is None:
            return []
        return plan(config, {domain: self.train.tokens_of(domain) for domain in self.train.domains}, total_tokens)

    def identity(self) -> dict[str, str]:
        """What must be unchanged when a run resumes: the hashes of the tokenizer and of each split's tokens."""
        shards = {split: getattr(self, split).sha256 for split in SPLITS}
        return {"tokenizer": self.tokenizer.hash, **shards}


def prepare(config: DataConfig) -> PreparedCorpus:
    """Open the prepared corpus of `config`, preparing it first if necessary. Shows progress on stderr.

    Raises ValueError for unreadable text, a split without text, or a damaged shard.
    """
    source = _source(config)
    given = None
    if config.tokenizer is not None:
        given = open_tokenizer(
            config.tokenizer, text_format=config.text_format, allow_lossy=config.allow_lossy_tokenizer
        )
    folder = cache_dir(config) / f"{config.name}-{_key(config, source, given)}"
    if not folder.is_dir():
        scratch = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
        shutil.rmtree(scratch, ignore_errors=True)
        _remove_abandoned(folder.parent)
        try:
            scratch.mkdir(parents=True)
            _Preparation(config, source, given, scratch).run()
            if folder.is_dir():  # another process was faster, with the same text and settings
                shutil.rmtree(scratch)
            else:
                scratch.rename(folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return PreparedCorpus(folder, config.text_format)


def _remove_abandoned(cache: Path) -> None:
    """Remove the leftovers of killed preparations from the cache: those of this host whose process no longer exists."""
    if sys.platform == "win32":  # os.kill(pid, 0) would end the process
        return
    name = re.compile(rf"\.(?:python|packages|text)-[0-9a-f]{{16}}\.{re.escape(socket.gethostname())}\.(\d+)")
    for path in cache.glob(".*"):
        match = name.fullmatch(path.name)
        if match is not None and not _is_alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # belongs to another user
    return True


class _Preparation:
    """Two passes over the documents: the first collects text for tokenizer and compressors, the second encodes."""

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
            chosen = self._train(sample)
        chosen.save(self.folder)
        with ThreadPoolExecutor(self.num_threads) as pool:  # both compressors release the GIL
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

    def _train(self, sample: list[str]) -> Tokenizer:
        kind, size = self.config.tokenizer_type, self.config.vocab_size
        sys.stderr.write(f"training a {kind} tokenizer of {size} tokens\n")
        coverage = self.config.character_coverage
        if self.config.text_format == "plain":
            return train_tokenizer(sample, size, kind, character_coverage=coverage)
        return FairseqText(train_tokenizer(sample, size, kind, line_starts=False, character_coverage=coverage))

    def _first_pass(self) -> tuple[list[Document] | None, list[str], dict[tuple[str, str], bytearray]]:
        """The documents, if few enough to keep in memory; text for the tokenizer; text for the compressors."""
        remembered: list[Document] | None = []
        alpha = self.config.vocabulary_alpha
        even, balanced = EvenSample(TOKENIZER_SAMPLE_BYTES), BalancedSample(TOKENIZER_SAMPLE_BYTES, alpha or 0.0)
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
                if alpha is None:
                    even.add(document.text, len(content))
                else:
                    balanced.add(document.domain, document.text, len(content))
                del text[:-WINDOW_BYTES]  # xz looks no further back
            else:
                del text[WINDOW_BYTES:]
            if remembered is not None:
                remembered.append(document)
                if num_bytes > _REMEMBERED_BYTES:
                    remembered = None
        self._refuse_empty(num_documents, num_bytes, held)
        for _, domain in list(held):
            held.setdefault(("train", domain), bytearray())
        return remembered, even.texts() if alpha is None else balanced.texts(), held

    def _refuse_empty(self, num_documents: int, num_bytes: int, held: dict[tuple[str, str], bytearray]) -> None:
        where = [*self.config.path, *self.config.sources] if self.config.name == "text" else f"data={self.config.name}"
        if num_bytes == 0:
            raise ValueError(
                f"the corpus {where} has no text: {num_documents} documents, 0 bytes; give files with text"
            )
        for split in SPLITS:
            if not any(name == split for name, _ in held):
                raise ValueError(
                    f"no text falls into the {split} split: the corpus {where} has {num_documents} documents "
                    f"({num_bytes} bytes); give more text, or raise data.validation_fraction and data.test_fraction"
                )
            without = sorted({domain for _, domain in held} - {domain for name, domain in held if name == split})
            if without:
                sys.stderr.write(f"no text of {', '.join(without)} falls into the {split} split\n")

    def _second_pass(self, stream: Iterator[Document], trained: Tokenizer) -> None:
        writers = {
            split: ShardWriter(self.folder / split, vocab_size=trained.vocab_size, tokenizer_hash=trained.hash)
            for split in SPLITS
        }
        report = VocabularyReport(trained)
        # if prompts start with a token other than the separator, so do training documents
        start = [] if trained.begin_id == trained.eos_id else [trained.begin_id]
        with tqdm(desc="encoding", unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar:
            while batch := list(islice(stream, _BATCH_DOCUMENTS)):
                texts = [document_text(document.text, self.config.text_format) for document in batch]
                encoded = trained.encode_batch(texts, self.num_threads)
                for document, tokens in zip(batch, encoded, strict=True):
                    num_bytes = len(document.text.encode())  # of the text itself, even if the tokenizer changes it
                    report.add(document.domain, document.text, len(tokens))
                    writers[self._split(document)].add(document.domain, [*start, *tokens, trained.eos_id], num_bytes)
                    bar.update(num_bytes)
        for writer in writers.values():
            writer.finish()
        (self.folder / "vocabulary.json").write_text(json.dumps(report.figures(), indent=1))

    def _split(self, document: Document) -> str:
        return split_of(document.group, self.config.validation_fraction, self.config.test_fraction)


def _source(config: DataConfig) -> Source:
    if config.name == "python":
        return Source(python_corpus.fingerprint(), python_corpus.read)
    if config.name == "packages":
        return Source(package_corpora.fingerprint(), package_corpora.read)
    files = text_files.find_files(config.path, config.sources)
    how = text_files.Reading(
        config.text_field, config.piece_bytes, lines_are_paragraphs=config.text_format == "fairseq"
    )
    return Source(text_files.fingerprint(files, how), lambda: text_files.read(files, how))


def _key(config: DataConfig, source: Source, given: Tokenizer | None) -> str:
    vocabulary: list[object] = [config.text_format]
    if given is None:
        vocabulary += [config.tokenizer_type, config.vocab_size, config.character_coverage, config.vocabulary_alpha]
    else:
        vocabulary += [given.hash, given.begin_id]
    # a corpus that was prepared by other code is not reused
    code = code_sha256((*_DECIDING, sys.modules[__name__]))
    settings = [FORMAT, source.fingerprint, code, config.validation_fraction, config.test_fraction, vocabulary]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def cache_dir(config: DataConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "moe"


def _num_threads() -> int:
    """Cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
