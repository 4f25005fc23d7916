"""Text that is generated: stop strings never leak, a stream never shows half a character, beams and batches agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe.config import ModelConfig
from moe.data.tokenizer import Tokenizer, train_tokenizer
from moe.generation import StoppedText, beam_search, continue_texts, encode_prompt, generate, stream_text
from moe.model import Transformer

TEXTS = ["the expert reads a token and the gate routes every second word to it", "ab abc abcd naïve café 漢字 🙂"] * 20
PROMPTS = ["the gate", "", "a token and"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    config = ModelConfig("test", 12, 20, 2, 3, 64, vocab_size=tokenizer.vocab_size, position="rope")
    model = Transformer(replace(config, tie_embeddings=False), dtype=torch.float64)
    model.reset_parameters(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # drawn anew, for a model that says something else at each place, and no end at first
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        model.head.weight[tokenizer.eos_id] = 0.0
    return model


def cut(text: str, stops: list[str]) -> str:
    """What is left of `text` read character by character until it ends with a stop string."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def pieces(tokenizer: Tokenizer, tokens: list[int], stops: list[str]) -> Iterator[str]:
    text = StoppedText(tokenizer, stops)
    for token in tokens:
        yield text.add(token)
    yield text.finish()


@settings(max_examples=200, deadline=None)
@given(st.text("abcd é漢🙂\n", max_size=30), st.lists(st.text("abcd é漢🙂\n", min_size=1, max_size=4), max_size=3))
@example("xabc", ["abc", "b"])
@example("aab", ["ab"])
@example("ab 🙂", ["🙂"])
def test_stop_strings_never_leak(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    expected = cut(text, stops)
    for tokens in (tokenizer.encode(text), [t for c in text for t in tokenizer.encode(c)]):
        shown = ""
        for piece in pieces(tokenizer, tokens, stops):
            shown += piece
            assert expected.startswith(shown)  # at no time more than the truth, nor half a character
        assert shown == expected


def test_what_cannot_be_a_stop_string_is_shown_at_once(tokenizer: Tokenizer) -> None:
    found = list(pieces(tokenizer, tokenizer.encode("a") + tokenizer.encode("b") + tokenizer.encode("d"), ["abc"]))
    assert found == ["", "", "abd", ""]
    assert next(pieces(tokenizer, tokenizer.encode("d"), ["abc"])) == "d"


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="holds an empty string"):
        StoppedText(tokenizer, ["a", ""])
    with pytest.raises(ValueError, match=r"stop \('ab'\) must be a list of strings"):
        StoppedText(tokenizer, "ab")


def test_generated_text_ends_before_the_stop_string(model: Transformer, tokenizer: Tokenizer) -> None:
    whole = continue_texts(model, tokenizer, PROMPTS, 20)
    assert all(len(text) > 5 for text in whole)
    stop = [whole[0][3:5], whole[2][4:6]]
    expected = [cut(text, stop) for text in whole]
    assert expected != whole
    assert continue_texts(model, tokenizer, PROMPTS, 20, stop=stop) == expected
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert "".join(stream_text(model, tokenizer, prompt, 20, stop=stop)) == text


def test_a_stopped_prompt_takes_no_more_steps(model: Transformer, tokenizer: Tokenizer) -> None:
    tokens = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    whole = generate(model, tokens, 12)
    asked: list[tuple[int, int]] = []

    def ended(row: int, token: int) -> bool:
        asked.append((row, token))
        return sum(r == row for r, _ in asked) == row + 2

    assert generate(model, tokens, 12, ended=ended) == [row[: i + 2] for i, row in enumerate(whole)]
    assert len(asked) == 2 + 3 + 4  # and nobody is asked about a row that has ended


def test_beams_as_text(model: Transformer, tokenizer: Tokenizer) -> None:
    tokens = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    best = [beams[0].tokens for beams in beam_search(model, tokens, 10, num_beams=3, eos_id=tokenizer.eos_id)]
    texts = continue_texts(model, tokenizer, PROMPTS, 10, num_beams=3)
    assert texts == [tokenizer.decode(row) for row in best]
    stop = [texts[0][2:4]]
    for text in continue_texts(model, tokenizer, PROMPTS, 10, num_beams=3, stop=stop):
        assert stop[0] not in text


def test_ids_without_a_piece_are_no_text(model: Transformer, tokenizer: Tokenizer) -> None:
    """An embedding is often wider than its vocabulary; what a model writes with the rows beyond is no text."""
    wide = replace(model.config, vocab_size=tokenizer.vocab_size + 40)
    padded = Transformer(wide, dtype=torch.float64)
    padded.reset_parameters(seed=0)
    tokens = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    options = {"temperature": 50.0, "seed": 1}
    rows = generate(padded, tokens, 20, eos_id=tokenizer.eos_id, **options)
    known = [[token for token in row if token < tokenizer.vocab_size] for row in rows]
    assert any(len(row) < len(all_) for row, all_ in zip(known, rows, strict=True))
    texts = continue_texts(padded, tokenizer, PROMPTS, 20, **options)
    assert texts == ["".join(pieces(tokenizer, row, [])) for row in known]
    assert "".join(stream_text(padded, tokenizer, PROMPTS[0], 20, **options)) == texts[0]
    with torch.no_grad():
        padded.head.weight[: tokenizer.vocab_size] = 0.0
    assert continue_texts(padded, tokenizer, PROMPTS, 3, num_beams=2) == [""] * 3


def test_beams_and_draws_exclude_each_other(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"num_beams \(2\) asks for beam search, and temperature \(0.5\)"):
        continue_texts(model, tokenizer, PROMPTS, 2, num_beams=2, temperature=0.5)
    with pytest.raises(ValueError, match=r"num_beams \(0\)"):
        continue_texts(model, tokenizer, PROMPTS, 2, num_beams=0)
