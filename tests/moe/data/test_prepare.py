from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from moe.config import DataConfig
from moe.config.data import MixtureConfig
from moe.data import prepare as prepare_module
from moe.data.documents import SPLITS
from moe.data.prepare import PreparedCorpus, prepare
from moe.data.tokenizer import open_tokenizer
from moe.data.vocabulary_sample import EvenSample


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
    (tmp_path / "given").mkdir()
    first.tokenizer.save(tmp_path / "given")
    config.tokenizer, config.validation_fraction = str(tmp_path / "given"), 0.2
    corpus = prepare(config)
    assert corpus.tokenizer.hash == open_tokenizer(tmp_path / "given").hash
    assert corpus.path != first.path


def test_the_tokenizer_sees_training_text_alone(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    plain = prepare_module.train_tokenizer
    monkeypatch.setattr(
        prepare_module,
        "train_tokenizer",
        lambda texts, *args, **more: (seen.extend(texts), plain(texts, *args, **more))[1],
    )
    corpus = prepare(config)
    assert sorted(seen) == sorted(text_of(corpus, "train"))


def test_an_interrupted_preparation_leaves_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "train_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert list(Path(config.cache_dir).iterdir()) == []


def test_what_a_killed_preparation_left_is_removed(config: DataConfig) -> None:
    cache, host = Path(config.cache_dir), socket.gethostname()
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    gone, alive = process.pid, os.getppid()
    kept = [f".text-{'0' * 16}.{host}.{alive}", f".text-{'0' * 16}.other-{host}.{gone}", f".mine.{host}.{gone}"]
    for name in (*kept, f".text-{'0' * 16}.{host}.{gone}"):
        (cache / name / "train").mkdir(parents=True)
    corpus = prepare(config)
    assert sorted(path.name for path in cache.iterdir()) == sorted([*kept, corpus.path.name])


def test_a_flipped_bit_is_found_when_the_corpus_is_opened(config: DataConfig) -> None:
    corpus = prepare(config)
    tokens = np.memmap(corpus.path / "train" / "tokens.bin", dtype=np.uint8, mode="r+")
    tokens[17] ^= 1
    tokens.flush()
    with pytest.raises(ValueError, match=r"tokens\.bin is damaged"):
        prepare(config)


def test_an_empty_corpus_is_refused(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "stories.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"the corpus .*stories\.jsonl.* has no text: 0 documents, 0 bytes"):
        prepare(config)


def test_an_empty_split_is_refused(config: DataConfig, tmp_path: Path) -> None:
    write(tmp_path, count=1)
    with pytest.raises(ValueError, match=r"no text falls into the (train|validation) split: .* has 1 documents"):
        prepare(config)


def languages(folder: Path) -> Path:
    """Per-language files of a paragraph a line, one language with far more text."""
    for name, words, count in (("en", "the cat sat on a mat", 400), ("ru", "кошка сидела на коврике", 60)):
        paragraphs = [f"{words} {number}, {words[: number % 9 + 3]}." for number in range(count)]
        (folder / f"{name}.txt").write_text("\n\n".join(paragraphs))
    return folder


def multilingual(tmp_path: Path, **changes: object) -> DataConfig:
    settings = {
        "path": [f"{languages(tmp_path)}/@domain.txt"],
        "text_format": "fairseq",
        "piece_bytes": 200,
        "vocab_size": 310,
        "tokenizer_type": "unigram",
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
        "cache_dir": str(tmp_path / "cache"),
    }
    return DataConfig(name="text", **(settings | changes))


def test_the_papers_document_format(tmp_path: Path) -> None:
    """A separator for each paragraph, one more for the document; bytes are those of the text as it was."""
    corpus = prepare(multilingual(tmp_path))
    end = corpus.tokenizer.eos_id
    size = (tmp_path / "en.txt").stat().st_size + (tmp_path / "ru.txt").stat().st_size
    assert sum(getattr(corpus, split).num_bytes for split in SPLITS) == size
    for split in SPLITS:
        shard = getattr(corpus, split)
        assert shard.domains == ["en", "ru"]
        for index in range(len(shard.document_starts)):
            tokens = shard.document(index).tolist()
            assert tokens[-2:] == [end, end]
            text = corpus.tokenizer.decode(tokens[:-1])
            assert text.endswith(".\n")
            assert "\n\n" not in text
            assert tokens.count(end) == text.count("\n") + 1
    pieces = set(range(corpus.tokenizer.vocab_size)) - corpus.tokenizer.fallback_ids - {end}
    assert not [token for token in pieces if "\n" in corpus.tokenizer.decode([token])]  # none is spent on line breaks
    assert prepare(multilingual(tmp_path, text_format="plain")).path != corpus.path


def test_a_joint_vocabulary_is_trained_on_a_balanced_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[float | None, list[str]] = {}
    plain = prepare_module.train_tokenizer
    for alpha in (None, 0.0):
        texts: list[str] = []
        monkeypatch.setattr(
            prepare_module,
            "train_tokenizer",
            lambda given, *args, texts=texts, **more: (texts.extend(given), plain(given, *args, **more))[1],
        )
        corpus = prepare(multilingual(tmp_path, vocabulary_alpha=alpha))
        seen[alpha] = texts
        if alpha is None:
            proportional = corpus
    english = {alpha: sum(len(t.encode()) for t in texts if "cat" in t) for alpha, texts in seen.items()}
    total = {alpha: sum(len(t.encode()) for t in texts) for alpha, texts in seen.items()}
    assert english[None] / total[None] > 0.65
    assert english[0.0] / total[0.0] == pytest.approx(0.5, abs=0.02)
    assert total[0.0] == pytest.approx(total[None], rel=0.02)
    # what it is for: fewer tokens for the language with less text
    assert corpus.vocabulary["ru"]["tokens_per_word"] < proportional.vocabulary["ru"]["tokens_per_word"]


def test_the_fit_of_the_vocabulary_is_kept(tmp_path: Path) -> None:
    corpus = prepare(multilingual(tmp_path))
    assert corpus.vocabulary == json.loads((corpus.path / "vocabulary.json").read_text())
    assert corpus.vocabulary.keys() == {"en", "ru"}
    ends = sum(len(getattr(corpus, split).document_starts) for split in SPLITS)
    tokens = sum(getattr(corpus, split).num_tokens for split in SPLITS)
    assert sum(fit["tokens"] for fit in corpus.vocabulary.values()) == tokens - ends


def test_a_lossy_tokenizer_must_be_asked_for(tmp_path: Path) -> None:
    model = io.BytesIO()
    text = (languages(tmp_path) / "en.txt").read_text()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    given = tmp_path / "sentencepiece.bpe.model"
    given.write_bytes(model.getvalue())
    config = multilingual(tmp_path, tokenizer=str(given))
    with pytest.raises(ValueError, match=r"changes text .*data\.allow_lossy_tokenizer=true"):
        prepare(config)
    config.allow_lossy_tokenizer = True
    corpus = prepare(config)
    assert (corpus.path / "sentencepiece.bpe.model").read_bytes() == model.getvalue()
    size = (tmp_path / "en.txt").stat().st_size + (tmp_path / "ru.txt").stat().st_size
    assert sum(getattr(corpus, split).num_bytes for split in SPLITS) == size  # of the text, not of what is left of it
    assert corpus.vocabulary["ru"]["coverage"] < 0.5 < corpus.vocabulary["en"]["coverage"]


def test_shares_are_of_the_training_tokens(tmp_path: Path) -> None:
    corpus = prepare(multilingual(tmp_path))
    assert corpus.mixture(MixtureConfig(), 1000) == []
    rows = {row.name: row for row in corpus.mixture(MixtureConfig(alpha=1.0), 1000)}
    assert sum(row.size for row in rows.values()) == corpus.train.num_tokens
    assert rows["ru"].share == rows["ru"].size / corpus.train.num_tokens
    held = corpus.train.documents_of("ru")
    assert rows["ru"].size == sum(len(corpus.train.document(int(index))) for index in held)


def test_the_sample_is_spread_over_the_corpus() -> None:
    sample = EvenSample(budget=1000)
    for number in range(5000):
        sample.add(f"{number:04d}", 4)
    numbers = [int(text) for text in sample.texts()]
    assert 100 < len(numbers) <= 250
    steps = {b - a for a, b in pairwise(numbers)}
    assert len(steps) == 1
    assert numbers[-1] > 4900


def test_documents_begin_as_prompts_do(config: DataConfig, tmp_path: Path) -> None:
    """A tokenizer whose makers put a token before a text has it before every document, and a corpus of its own."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    made.train_from_iterator([], trainer)
    corpora = []
    for add_bos_token in (False, True):
        folder = tmp_path / str(add_bos_token)
        folder.mkdir()
        made.save(str(folder / "tokenizer.json"))
        settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add_bos_token}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        corpora.append(prepare(replace(config, tokenizer=str(folder))))
    plain, begun = corpora
    assert begun.path != plain.path
    assert (begun.tokenizer.begin_id, begun.tokenizer.eos_id) == (0, 1)
    for split in SPLITS:
        shard, expected = getattr(begun, split), getattr(plain, split)
        assert shard.num_bytes == expected.num_bytes
        for index in range(len(expected.document_starts)):
            assert shard.document(index).tolist() == [0, *expected.document(index).tolist()]
            assert expected.document(index)[0] != 0
