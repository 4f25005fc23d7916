"""data.text_format=fairseq: separators for line breaks, as in the papers' corpora and prompts."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece

from moe.compose import compose
from moe.data.text_format import FairseqText, document_text
from moe.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer
from moe.data.xglm_tokenizer import XGLMTokenizer

TEXT = "the cat sat on the mat. a model of experts\n" * 30


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return train_tokenizer([TEXT], 290)


@pytest.fixture(scope="module")
def fairseq(plain: Tokenizer) -> FairseqText:
    return FairseqText(plain)


def test_line_breaks_are_separators(plain: Tokenizer, fairseq: FairseqText) -> None:
    cat, mat = plain.encode("the cat"), plain.encode("  mat")
    assert fairseq.encode("the cat\n  mat") == [*cat, plain.eos_id, *mat]
    assert fairseq.encode("\nthe cat\n\n") == [plain.eos_id, *cat, plain.eos_id, plain.eos_id]
    assert fairseq.encode("the cat") == cat
    assert fairseq.encode("") == []


@pytest.mark.parametrize("text", ["", "\n", "a\nb", "\n\na\r\nb\n", "a\u2028b\u0085c\x0bd"])
def test_it_comes_back_with_its_breaks(fairseq: FairseqText, text: str) -> None:
    """splitlines() would also split at U+2028, U+0085 and others, which are text (Artetxe et al. 2021)."""
    assert fairseq.decode(fairseq.encode(text)) == text
    assert fairseq.encode(text).count(fairseq.eos_id) == text.count("\n")
    decoder = fairseq.stream_decoder()
    assert "".join([*map(decoder.add, fairseq.encode(text)), decoder.finish()]) == text


def test_batches_are_encoded_as_one_by_one(fairseq: FairseqText) -> None:
    texts = ["a\nb", "", "\n", "the cat\n\nsat", "x"]
    assert fairseq.encode_batch(texts, 2) == [fairseq.encode(text) for text in texts]
    assert fairseq.encode_batch([], 2) == []


def test_no_line_break_token_is_ever_seen(plain: Tokenizer, fairseq: FairseqText) -> None:
    breaks = {token for token in range(plain.vocab_size) if "\n" in plain.decode([token])}
    assert breaks.intersection(plain.encode(TEXT))
    assert not breaks.intersection(fairseq.encode(TEXT))


def test_a_normalising_model_loses_breaks_without_the_format() -> None:
    """Lin et al. 2021: XGLM's own model makes spaces of line breaks, so they vanish if nothing replaces them first."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT]), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    inner = XGLMTokenizer(model.getvalue())
    assert inner.encode("the cat\nthe mat") == inner.encode("the cat the mat")
    cat, mat = inner.encode("the cat"), inner.encode("the mat")
    assert FairseqText(inner).encode("the cat\nthe mat") == [*cat, inner.eos_id, *mat]
    assert FairseqText(inner).decode([*cat, inner.eos_id, *mat]) == "the cat\nthe mat"


def test_documents_are_a_paragraph_a_line() -> None:
    text = "One.\r\n\n \nTwo\u2028still two.\n\n\nThree"
    assert document_text(text, "fairseq") == "One.\nTwo\u2028still two.\nThree\n"
    assert document_text(text, "plain") == text
    assert document_text("\n \n", "fairseq") == ""


def test_the_misspelt_keyword_is_no_silent_wrong_answer(tmp_path: Path, plain: Tokenizer) -> None:
    """The documented `replace_newlines_with_eos` is swallowed in public code, and scores are wrong."""
    plain.save(tmp_path)
    opened = open_tokenizer(tmp_path, text_format="fairseq")
    assert opened.encode("a\nb") == [*plain.encode("a"), plain.eos_id, *plain.encode("b")]
    for keyword in ("replace_newlines_with_eos", "replace_newline_with_eos"):
        with pytest.raises(TypeError, match=keyword):
            open_tokenizer(tmp_path, **{keyword: True})
        with pytest.raises(ValueError, match=f"there is no key 'data.{keyword}'"):
            compose([f"+data.{keyword}=true"])
    with pytest.raises(ValueError, match=r"data\.text_format \('fairsq'\) must be one of: plain, fairseq"):
        open_tokenizer(tmp_path, text_format="fairsq")
    with pytest.raises(ValueError, match=r"data\.text_format \('fairsq'\) must be one of: plain, fairseq"):
        compose(["data.text_format=fairsq"])
