from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moe.config import DataConfig
from moe.data import prepare as prepare_module
from moe.data.documents import SPLITS
from moe.data.prepare import PreparedCorpus, prepare
from moe.data.tokenizer import Tokenizer


def write(folder: Path, count: int = 200) -> Path:
    path = folder / "stories.jsonl"
    with path.open("w") as file:
        for number in range(count):
            text = f"Story {number}: the cat number {number} sat on mat {number % 7}.\n" * 3
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(
        name="text",
        path=[str(write(tmp_path))],
        vocab_size=310,
        validation_fraction=0.1,
        test_fraction=0.1,
        cache_dir=str(tmp_path / "cache"),
    )


def text_of(corpus: PreparedCorpus, split: str) -> list[str]:
    shard = getattr(corpus, split)
    return [corpus.tokenizer.decode(shard.document(i).tolist()[:-1]) for i in range(len(shard.document_starts))]


def test_all_text_is_in_one_of_the_splits(config: DataConfig) -> None:
    corpus = prepare(config)
    expected = [json.loads(line)["text"] for line in Path(config.path[0]).read_text().splitlines()]
    found = [text for split in SPLITS for text in text_of(corpus, split)]
    assert sorted(found) == sorted(expected)
    for split in SPLITS:
        shard = getattr(corpus, split)
        assert shard.domains == ["stories"]
        assert shard.num_bytes == sum(len(text.encode()) for text in text_of(corpus, split))
        ends = [int(shard.document(i)[-1]) for i in range(len(shard.document_starts))]
        assert set(ends) == {corpus.tokenizer.eos_id}
    assert corpus.compressors.keys() == {"validation", "test"}
    assert corpus.compressors["test"]["stories"].keys() == {"gzip", "xz", "xz_given_train"}


def test_the_second_time_nothing_is_read(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config)
    monkeypatch.setattr(prepare_module.text_files, "read", lambda *_: pytest.fail("read again"))
    again = prepare(config)
    assert again.path == first.path
    assert again.identity() == first.identity()


def test_one_or_two_passes_and_any_number_of_workers_give_the_same(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(config)
    monkeypatch.setattr(prepare_module, "_REMEMBERED_BYTES", 100)
    config.cache_dir, config.num_workers = str(tmp_path / "other"), 1
    assert prepare(config).identity() == first.identity()


def test_changed_text_or_settings_are_prepared_anew(config: DataConfig, tmp_path: Path) -> None:
    first = prepare(config)
    config.vocab_size = 311
    assert prepare(config).path != first.path
    config.vocab_size = 310
    write(tmp_path, count=201)
    changed = prepare(config)
    assert changed.path != first.path
    assert changed.train.num_tokens + changed.test.num_tokens + changed.validation.num_tokens > 0


def test_a_given_tokenizer_is_used(config: DataConfig, tmp_path: Path) -> None:
    first = prepare(config)
    first.tokenizer.save(tmp_path / "given.model")
    config.tokenizer, config.validation_fraction = str(tmp_path / "given.model"), 0.2
    corpus = prepare(config)
    assert corpus.tokenizer.hash == Tokenizer.load(tmp_path / "given.model").hash
    assert corpus.path != first.path


def test_the_tokenizer_sees_training_text_alone(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    plain = prepare_module.train_tokenizer
    monkeypatch.setattr(
        prepare_module, "train_tokenizer", lambda texts, *args: (seen.extend(texts), plain(texts, *args))[1]
    )
    corpus = prepare(config)
    assert sorted(seen) == sorted(text_of(corpus, "train"))


def test_an_interrupted_preparation_leaves_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "train_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert list(Path(config.cache_dir).iterdir()) == []


def test_a_flipped_bit_is_found_when_the_corpus_is_opened(config: DataConfig) -> None:
    corpus = prepare(config)
    tokens = np.memmap(corpus.path / "train" / "tokens.bin", dtype=np.uint8, mode="r+")
    tokens[17] ^= 1
    tokens.flush()
    with pytest.raises(ValueError, match=r"tokens\.bin is damaged"):
        prepare(config)


def test_an_empty_corpus_is_refused(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "stories.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"the corpus .*stories\.jsonl.* is empty: 0 documents, no text"):
        prepare(config)


def test_an_empty_split_is_refused(config: DataConfig, tmp_path: Path) -> None:
    write(tmp_path, count=1)
    with pytest.raises(ValueError, match=r"no text falls into the (train|validation) split: .* has 1 documents"):
        prepare(config)


def test_the_sample_is_spread_over_the_corpus() -> None:
    sample = prepare_module._EvenSample(budget=1000)
    for number in range(5000):
        sample.add(f"{number:04d}", 4)
    numbers = [int(text) for text in sample.texts()]
    assert 100 < len(numbers) <= 250
    steps = {b - a for a, b in pairwise(numbers)}
    assert len(steps) == 1
    assert numbers[-1] > 4900
