"""Encodes the examples of a benchmark once and caches them: format, encode, fit into the context.

    <cache>/examples-<key>/{train,validation}/      moe.instruct.examples
                           dropped.json             the number of dropped examples per task

The key is a hash of the benchmark, the tokenizer and everything else that determines the tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from moe.config import TuneConfig
from moe.data.code_hash import code_sha256
from moe.data.tokenizer import Tokenizer
from moe.instruct import encoding, formatting
from moe.instruct.benchmark import Benchmark, TaskEntry, file_sha256
from moe.instruct.encoding import EncodedExample, TargetTooLongError, counted_text, encode_formatted, fit
from moe.instruct.examples import FORMAT, ExampleStore, ExampleWriter, TaskInfo
from moe.instruct.formatting import Layout, draw_layout, format_record
from moe.instruct.records import Record


class EncodedBenchmark:
    """The encoded examples that a run trains on and is validated on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train = ExampleStore(folder / "train")
        self.validation = ExampleStore(folder / "validation")
        # by task, over both splits: the number of examples whose target did not fit
        self.dropped: dict[str, int] = json.loads((folder / "dropped.json").read_text())


def encode_benchmark(
    benchmark: Benchmark,
    tasks: Sequence[str],
    tokenizer: Tokenizer,
    tune: TuneConfig,
    *,
    seq_len: int,
    seed: int,
    cache: Path,
) -> EncodedBenchmark:
    """Open the encoded training examples of `tasks` and the whole validation split. Encodes them first if needed.

    Raises ValueError for an empty target, and for one longer than the context unless tune.long_targets is "drop".
    """
    form = [tune.loss_on, tune.truncation, tune.long_targets, tune.leading_separator, tune.vary_layout]
    shown = [tune.demonstrations_zipf, tune.max_demonstrations, tune.separator]
    manifests = [file_sha256(benchmark.folder / split / "manifest.json") for split in ("train", "validation")]
    code = code_sha256((sys.modules[__name__], formatting, encoding))  # these modules determine the tokens
    settings = [
        FORMAT,
        manifests,
        list(tasks),
        tokenizer.hash,
        tokenizer.begin_id,
        _text_format(tokenizer),
        form,
        shown,
        seq_len,
        seed,
        code,
    ]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        encoder = RecordEncoder(tokenizer, tune, seq_len=seq_len, seed=seed)
        wanted = set(tasks)
        train = [entry for entry in benchmark.tasks("train") if entry.task in wanted]
        encoder.write(folder / "train", benchmark, "train", train)
        encoder.write(folder / "validation", benchmark, "validation", benchmark.tasks("validation"))
        (folder / "dropped.json").write_text(json.dumps(encoder.dropped, indent=1))

    return EncodedBenchmark(make_once(cache / f"examples-{key}", write))


def make_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return `folder`. If it does not exist, write it under another name and rename it, so that it is complete."""
    if folder.is_dir():
        return folder
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        write(scratch)
        if not folder.is_dir():  # another process may have been faster
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


class RecordEncoder:
    """Encodes records. The random choices for a record depend only on the seed and the record."""

    def __init__(self, tokenizer: Tokenizer, tune: TuneConfig, *, seq_len: int, seed: int) -> None:
        self.tokenizer = tokenizer
        self.tune = tune
        self.seq_len = seq_len
        self.seed = seed
        self.dropped: dict[str, int] = {}

    def write(self, folder: Path, benchmark: Benchmark, split: str, entries: Sequence[TaskEntry]) -> None:
        """Encode tasks into a new store. Only training examples get demonstrations, which are of the same task."""
        writer = ExampleWriter(folder, vocab_size=self.tokenizer.vocab_size)
        for entry in entries:
            writer.start_task(TaskInfo(entry.task, entry.benchmark, entry.category, entry.level_name))
            records: Sequence[Record] | Iterator[Record] = benchmark.records(split, entry.task)
            with_demonstrations = split == "train" and self.tune.demonstrations_zipf is not None
            pool = list(records) if with_demonstrations else []
            for record in pool or records:
                encoded = self._encode(record, pool)
                if encoded is not None:
                    writer.add(*encoded)
        writer.finish()

    def encode(self, record: Record, pool: Sequence[Record] = ()) -> EncodedExample | None:
        """Encode a record after as many of its drawn demonstrations as fit. Returns None if the record is dropped."""
        encoded = self._encode(record, pool)
        return None if encoded is None else encoded[0]

    def _encode(self, record: Record, pool: Sequence[Record]) -> tuple[EncodedExample, int] | None:
        """As `encode`, with the UTF-8 bytes of the counted text."""
        tune = self.tune
        random = self._random(record)
        layout = draw_layout(random) if tune.vary_layout else Layout()
        demonstrations = self._demonstrations(record, pool, random)
        if demonstrations:
            layout = layout._replace(separator=tune.separator)
        while True:
            formatted = format_record(record, layout, demonstrations)
            example = encode_formatted(
                self.tokenizer, formatted, leading_separator=tune.leading_separator, loss_on=tune.loss_on
            )
            if example.positions <= self.seq_len or not demonstrations:
                break
            demonstrations = demonstrations[:-1]  # so all demonstrations after the first that does not fit are left out
        try:
            cut = fit(example, self.seq_len, truncation=tune.truncation, leading_separator=tune.leading_separator)
        except TargetTooLongError as error:
            if tune.long_targets == "drop":
                self.dropped[record.task] = self.dropped.get(record.task, 0) + 1
                return None
            raise TargetTooLongError(f"a record of {record.task} (example {record.example!r}): {error}") from error
        text = counted_text(formatted, tune.loss_on)
        if cut.num_counted < example.num_counted:
            end = -1 if tune.truncation == "left" else None  # the separator, which "right" has cut off
            text = self.tokenizer.decode(cut.tokens[max(cut.first_counted, 1) : end])
        return cut, len(text.encode("utf-8", "replace"))

    def _demonstrations(self, record: Record, pool: Sequence[Record], random: np.random.Generator) -> list[Record]:
        """Draw other examples of the task. Their number follows Zipf's law."""
        if not pool or self.tune.demonstrations_zipf is None:
            return []
        shares = demonstration_shares(self.tune.demonstrations_zipf, self.tune.max_demonstrations)
        count = int(random.choice(len(shares), p=shares))
        shown: list[Record] = []
        used = {record.example}
        for index in random.choice(len(pool), min(len(pool), 4 * count + 4), replace=False).tolist():
            if len(shown) < count and pool[index].example not in used:  # not another wording of one already used
                used.add(pool[index].example)
                shown.append(pool[index])
        return shown

    def _random(self, record: Record) -> np.random.Generator:
        text = f"{self.seed}/layout/{record.task}/{record.template}/{record.example}/{record.input}"
        digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def demonstration_shares(exponent: float, most: int) -> np.ndarray:
    """The shares of examples with 0, 1, ... `most` demonstrations: (k + 1)^-exponent, normalised; (most + 1,).

    For at most five demonstrations and the exponents 4 and 2, the shares without any are the paper's 92.5% and 67.1%.
    """
    weights = np.arange(1, most + 2, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def _text_format(tokenizer: Tokenizer) -> str:
    """Distinguishes text formats: the same tokenizer has one hash whether or not line breaks are separators."""
    return json.dumps(tokenizer.encode("a\nb"))
