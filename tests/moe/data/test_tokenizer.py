from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_files, train_tokenizer

WORDS = "model expert router token layer gate batch train learn dense sparse switch capacity balance"
TEXT = "def f(x):\n    return x  # twice\n\n\nclass A:\n        pass\n" * 30 + f"the cat sat on the mat. {WORDS} " * 30


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer([TEXT], 306, request.param)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_text_comes_back(text: str) -> None:
    tokenizer = _shared()
    assert tokenizer.decode(tokenizer.encode(text)) == text


_cache: list[Tokenizer] = []


def _shared() -> Tokenizer:
    if not _cache:
        _cache.append(train_tokenizer([TEXT], 306))
    return _cache[0]


AWKWARD = [
    "",
    " ",
    "\n",
    "  two  spaces ",
    "\ttab",
    "a\r\nb",
    "▁",
    "a▁ ▁b",
    "漢字",
    "🙂",
    "\x00",
    "</s>",
    "<0x41>",
    "<unk>",
]


@pytest.mark.parametrize("text", AWKWARD, ids=repr)
def test_awkward_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_id not in tokenizer.encode(text)


def test_ids_beyond_the_vocabulary_are_no_text(tokenizer: Tokenizer) -> None:
    """An embedding is often wider than its vocabulary, and a model may write the ids of the rows beyond."""
    tokens = tokenizer.encode("a word")
    beyond = tokenizer.vocab_size
    assert tokenizer.decode([beyond, *tokens, beyond + 7]) == "a word"
    decoder = tokenizer.stream_decoder()
    assert "".join(decoder.add(token) for token in [beyond, *tokens, beyond]) + decoder.finish() == "a word"


def test_batches_are_encoded_as_one_by_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(AWKWARD, 2) == [tokenizer.encode(text) for text in AWKWARD]


def test_training_repeats() -> None:
    assert train_tokenizer([TEXT], 306).hash == train_tokenizer([TEXT], 306).hash
    assert train_tokenizer([TEXT], 306, "unigram").hash == train_tokenizer([TEXT], 306, "unigram").hash
    assert train_tokenizer([TEXT], 306).hash != train_tokenizer([TEXT], 307).hash


def test_a_line_break_and_its_indentation_are_one_token(tokenizer: Tokenizer) -> None:
    word = len(tokenizer.encode("pass"))
    for start in ("\n", "\n    ", "\n        ", "\n\n", "\n\n    "):
        assert len(tokenizer.encode(f"{start}pass")) == 1 + word


def test_streaming_joins_to_the_decoded_text(tokenizer: Tokenizer) -> None:
    text = "the cat 漢字 sat 🙂 on ▁ the mat"
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.add(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + decoder.finish() == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_streaming_does_not_wait_for_bytes_that_are_no_character(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    broken = tokenizer.encode("é")[:1]
    assert "\ufffd" in "".join(decoder.add(token) for token in broken * 6) + decoder.finish()


@given(st.lists(st.sampled_from(["a", " b", "é", "漢", "🙂", "broken"]), max_size=12))
def test_streaming_joins_to_the_decoded_text_with_broken_characters_in_it(
    tokenizer: Tokenizer, parts: list[str]
) -> None:
    tokens = [
        token
        for part in parts
        for token in (tokenizer.encode("🙂")[:2] if part == "broken" else tokenizer.encode(part))
    ]
    decoder = tokenizer.stream_decoder()
    assert "".join([decoder.add(token) for token in tokens] + [decoder.finish()]) == tokenizer.decode(tokens)


def test_a_long_line_is_not_dropped() -> None:
    """Sentencepiece's trainer skips lines beyond its limit; ours are cut before."""
    tokenizer = train_tokenizer(["zebra" * 40_000], 280)
    assert len(tokenizer.encode("zebra")) < 5


def test_it_is_saved_and_opened(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.save(tmp_path) == [tmp_path / "tokenizer.model"]
    assert tokenizer_files(tmp_path) == ["tokenizer.model"]
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        loaded = open_tokenizer(path)
        for name in ("hash", "vocab_size", "eos_id", "bos_id", "fallback_ids"):
            assert getattr(loaded, name) == getattr(tokenizer, name)
        assert loaded.lossless


def test_line_starts_are_left_out_where_text_has_no_line_breaks() -> None:
    with_breaks, without = (train_tokenizer([TEXT], 306, line_starts=asked) for asked in (True, False))
    broken = without.encode("\n    pass")
    assert without.decode(broken) == "\n    pass"
    assert without.encode("\n")[0] in without.fallback_ids
    assert with_breaks.encode("\n")[0] not in with_breaks.fallback_ids


def test_character_coverage_decides_what_goes_by_bytes() -> None:
    text = "aaaa bbbb " * 100 + "ж"
    rare, all_of_it = (train_tokenizer([text], 280, character_coverage=share) for share in (0.99, 1.0))
    assert rare.fallback_ids.issuperset(rare.encode("ж"))
    assert not all_of_it.fallback_ids.intersection(all_of_it.encode("ж"))


def test_too_small_and_too_large_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.vocab_size \(200\) must be at least 269"):
        train_tokenizer([TEXT], 200)
    with pytest.raises(ValueError, match=r"data\.vocab_size=9000 cannot be trained .*lower data\.vocab_size"):
        train_tokenizer([TEXT], 9000)


@pytest.fixture(scope="module")
def lossy_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def test_files_that_are_no_fitting_tokenizer_are_refused(tmp_path: Path, lossy_model: bytes) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        open_tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        open_tokenizer(tmp_path / "bad.model")
    with pytest.raises(ValueError, match=r"holds no tokenizer: none of tokenizer\.model, sentencepiece\.bpe\.model"):
        open_tokenizer(tmp_path)
    (tmp_path / "lossy.model").write_bytes(lossy_model)
    with pytest.raises(ValueError, match=r"lossy\.model changes text .*allow_lossy_tokenizer=true.*byte_fallback=true"):
        open_tokenizer(tmp_path / "lossy.model")


def test_a_lossy_one_is_opened_when_asked_for(tmp_path: Path, lossy_model: bytes) -> None:
    (tmp_path / "lossy.model").write_bytes(lossy_model)
    opened = open_tokenizer(tmp_path / "lossy.model", allow_lossy=True)
    original = sentencepiece.SentencePieceProcessor(model_proto=lossy_model)
    assert not opened.lossless
    assert (opened.eos_id, opened.bos_id) == (original.eos_id(), original.bos_id())
    assert opened.fallback_ids == {original.unk_id()}
    for text in ("the cat  sat", "a▁b", "漢字 model"):
        assert opened.encode(text) == original.encode(text)
        assert opened.encode_batch([text], 1) == [original.encode(text)]


def test_one_of_llamas_kind_has_its_makers_ids(tmp_path: Path) -> None:
    """Bytes for what it lacks, and a space before each text: U+2581 in a text is a space to it."""
    path = tmp_path / "llama.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.split("\n")),
            model_writer=file,
            model_type="bpe",
            vocab_size=300,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    opened, original = open_tokenizer(path, allow_lossy=True), sentencepiece.SentencePieceProcessor(str(path))
    assert not opened.lossless
    for text in ("a▁b", "▁", "the ▁▁cat", "漢字 model"):
        assert opened.encode(text) == original.encode(text)
        assert opened.encode_batch([text], 1) == [original.encode(text)]


def test_settings_say_whether_the_start_piece_begins_a_text(tmp_path: Path, lossy_model: bytes) -> None:
    """A sentencepiece model has a start piece by default; Llama's folders say that it is used."""
    (tmp_path / "tokenizer.model").write_bytes(lossy_model)
    alone = open_tokenizer(tmp_path, allow_lossy=True)
    assert alone.begin_id == alone.eos_id != alone.bos_id
    for wish, first in (("true", alone.bos_id), ("false", alone.eos_id)):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"add_bos_token": {wish}}}')
        opened = open_tokenizer(tmp_path, allow_lossy=True)
        assert (opened.begin_id, opened.hash) == (first, alone.hash)
        copy = tmp_path / wish
        copy.mkdir()
        assert sorted(path.name for path in opened.save(copy)) == ["tokenizer.model", "tokenizer_config.json"]
        assert open_tokenizer(copy, allow_lossy=True).begin_id == first
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        open_tokenizer(tmp_path, allow_lossy=True)


def test_streaming_keeps_the_spaces_of_a_model_that_drops_the_first(tmp_path: Path, lossy_model: bytes) -> None:
    (tmp_path / "lossy.model").write_bytes(lossy_model)
    opened = open_tokenizer(tmp_path / "lossy.model", allow_lossy=True)
    tokens = opened.encode("the cat sat on the mat")
    decoder = opened.stream_decoder()
    assert "".join([decoder.add(token) for token in tokens] + [decoder.finish()]) == "the cat sat on the mat"
