"""XGLM's ids, against sentencepiece itself and the port in transformers, over declarations of human rights."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece

from moe.data.tokenizer import open_tokenizer, tokenizer_files
from moe.data.xglm_tokenizer import XGLMTokenizer
from tests.shared_data import shared_data

TEXT = "the cat sat on the mat. a model of experts; dense and sparse layers learn. " * 20


def train(lines: list[str], vocab_size: int, **changes: object) -> bytes:
    """A model as XGLM's: unigram, NFKC, sentencepiece's own special pieces."""
    model = io.BytesIO()
    settings = {"model_type": "unigram", "hard_vocab_limit": False, "minloglevel": 2} | changes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, **settings
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return train([TEXT], 80)


@pytest.fixture(scope="module")
def declarations() -> list[str]:
    """Lines in some 500 languages."""
    with gzip.open(shared_data("udhr") / "udhr.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return [line for text in texts for line in text.split("\n") if line.strip()]


@pytest.fixture(scope="module")
def multilingual_model(declarations: list[str]) -> bytes:
    return train(declarations[::20], 3000, character_coverage=0.999)


def test_ids_are_fairseqs(model: bytes) -> None:
    """Lin et al. 2021: four special tokens, the pieces from the fourth on, seven fillers."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = XGLMTokenizer(model)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.begin_id) == (0, 2, 3, 2)
    assert tokenizer.vocab_size == 4 + (pieces.vocab_size() - 3) + 7
    text = "the cat learn"
    names = [pieces.id_to_piece(number) for number in range(pieces.vocab_size())]
    dictionary = ["<s>", "<pad>", "</s>", "<unk>", *names[3:]]
    assert [dictionary[token] for token in tokenizer.encode(text)] == pieces.encode(text, out_type=str)
    assert tokenizer.encode("the 漢 cat")[-3:].count(3) + tokenizer.encode("the 漢 cat")[:-3].count(3) == 1


def test_special_words_are_text_and_decode_to_nothing(model: bytes) -> None:
    tokenizer = XGLMTokenizer(model)
    assert not {0, 1, 2}.intersection(tokenizer.encode("the </s> <s> <pad> cat"))
    tokens = tokenizer.encode("the cat")
    fillers = [tokenizer.vocab_size - 1, tokenizer.vocab_size - 7]
    assert tokenizer.decode([2, *tokens, 0, 1, *fillers, 2]) == "the cat"
    assert tokenizer.decode([tokenizer.vocab_size - 8]) != ""


def test_it_normalises(model: bytes, tmp_path: Path) -> None:
    tokenizer = XGLMTokenizer(model)
    assert not tokenizer.lossless
    assert tokenizer.encode(" the\ncat\tsat  on ") == tokenizer.encode("the cat sat on")
    assert tokenizer.encode("\uff54he") == tokenizer.encode("the")  # NFKC
    tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match="changes text"):
        open_tokenizer(tmp_path)


def test_it_is_saved_and_opened(model: bytes, tmp_path: Path) -> None:
    tokenizer = XGLMTokenizer(model)
    assert tokenizer.save(tmp_path) == [tmp_path / "sentencepiece.bpe.model"]
    assert tokenizer_files(tmp_path) == ["sentencepiece.bpe.model"]
    (tmp_path / "plain.model").write_bytes(model)
    for path in (tmp_path, tmp_path / "sentencepiece.bpe.model"):
        opened = open_tokenizer(path, allow_lossy=True)
        assert isinstance(opened, XGLMTokenizer)
        assert opened.hash == tokenizer.hash
    plain = open_tokenizer(tmp_path / "plain.model", allow_lossy=True)
    assert plain.hash != tokenizer.hash  # the same pieces under other ids


def test_models_of_others_are_refused(tmp_path: Path, model: bytes) -> None:
    (tmp_path / "sentencepiece.bpe.model").write_bytes(train([TEXT], 80, unk_id=1, bos_id=0))
    with pytest.raises(ValueError, match=r"special pieces .*'bos_id': 0.*must not be named"):
        open_tokenizer(tmp_path, allow_lossy=True)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    with pytest.raises(ValueError, match=r"belongs to a XLMRobertaTokenizer, whose ids differ from XGLM's"):
        open_tokenizer(tmp_path, allow_lossy=True)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"broken")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        open_tokenizer(tmp_path, allow_lossy=True)


def port(path: Path) -> Any:
    """transformers' XGLMTokenizer over the same model."""
    transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")
    convert = pytest.importorskip("transformers.convert_slow_tokenizer", reason="needs the extra 'hf'")
    pytest.importorskip("google.protobuf", reason="transformers reads sentencepiece models with protobuf")
    converter = convert.XGLMConverter(SimpleNamespace(vocab_file=str(path)))
    return transformers.XGLMTokenizer(
        vocab=converter.vocab(converter.proto),
        _spm_precompiled_charsmap=converter.proto.normalizer_spec.precompiled_charsmap,
    )


def test_it_equals_the_port_in_transformers(declarations: list[str], multilingual_model: bytes, tmp_path: Path) -> None:
    tokenizer = XGLMTokenizer(multilingual_model)
    (path,) = tokenizer.save(tmp_path)
    theirs = port(path)
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 2, 3)
    lines = declarations[::17]
    space = theirs.convert_tokens_to_ids("▁")
    for line, ours in zip(lines, tokenizer.encode_batch(lines, 1), strict=True):
        ids = theirs(line, add_special_tokens=False).input_ids
        # a line that ends in a space of any kind: sentencepiece drops it, the port makes a piece of it
        assert ours in (ids, ids[:-1] if ids[-1] == space else ids)
        assert ours == tokenizer.encode(line)
    assert len(lines) > 2000


def test_it_decodes_as_sentencepiece_does(declarations: list[str], multilingual_model: bytes) -> None:
    tokenizer = XGLMTokenizer(multilingual_model)
    original = sentencepiece.SentencePieceProcessor(model_proto=multilingual_model)
    for line in declarations[::101]:
        assert tokenizer.decode(tokenizer.encode(line)) == original.decode(original.encode(line))
        decoder = tokenizer.stream_decoder()
        pieces = [decoder.add(token) for token in tokenizer.encode(line)]
        assert "".join(pieces) + decoder.finish() == original.decode(original.encode(line))
