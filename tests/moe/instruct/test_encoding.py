from __future__ import annotations

import pytest

from moe.instruct.encoding import EncodedExample, TargetTooLongError, encode_formatted, fit
from moe.instruct.formatting import Formatted
from tests.moe.instruct.toy_tokenizer import ToyTokenizer


def encoded(source: str, target: str, **options: object) -> EncodedExample:
    return encode_formatted(ToyTokenizer(), Formatted(source, target, len(source)), **options)


class Merging(ToyTokenizer):
    """Characters, but a colon and the space behind it are one token: a source alone is no prefix then."""

    def encode(self, text: str) -> list[int]:
        return [self._id(piece) for piece in text.replace(": ", "\0")]


def test_source_and_target_are_one_text_and_the_separator_is_counted() -> None:
    tokenizer = ToyTokenizer()
    example = encode_formatted(tokenizer, Formatted("Is it? A:  ", "yes \n", 9))
    assert tokenizer.pieces(example.tokens) == ["<eos>", "Is", " it", "?", " A", ":", " yes", "<eos>"]
    assert (example.first_target, example.first_counted, example.num_counted, example.positions) == (6, 6, 2, 7)


def test_without_the_leading_separator_it_is_the_papers_encoding() -> None:
    example = encoded("Is it? A:", "yes", leading_separator=False)
    assert example.tokens[-1] == 0
    assert 0 not in example.tokens[:-1]
    assert (example.first_counted, example.positions) == (5, 6)


@pytest.mark.parametrize(
    "source", ["Is it?\nAnswer:", "a:\n", "a:\n\n", "two  spaces A:", "don't:", "(x) Output:", "漢字 A:"]
)
def test_a_source_is_the_beginning_of_the_joint_encoding_with_gpt2s_kind_of_tokenizer(source: str) -> None:
    """The space between is part of the target's first piece (Iyer et al. 2022), so the boundary is exact."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["Is it an answer? Answer: yes Output: no.\n\n two  spaces"] * 9, trainer)

    class GPT2(ToyTokenizer):
        eos_id = 329

        def encode(self, text: str) -> list[int]:
            return made.encode(text).ids

    for target in ("yes", "Yes, it is.", "漢", "- no"):
        example = encode_formatted(GPT2(), Formatted(source, target, len(source)))
        assert example.first_target == 1 + len(GPT2().encode(source))
        assert made.decode(example.tokens[example.first_target : -1]) == f" {target}"


def test_an_empty_source_makes_every_token_a_target() -> None:
    with_separator, without = encoded("", "a b c"), encoded("", "a b c", leading_separator=False)
    assert with_separator.num_counted == 4
    assert without.num_counted == 3  # its first token has nothing before it


def test_a_piece_that_spans_the_boundary_is_a_target() -> None:
    example = encode_formatted(Merging(), Formatted("Q:", "yes", 2))
    assert example.tokens[1:3] == [1, 2]
    assert example.first_target == 2  # the piece of ": " holds the space of the target


@pytest.mark.parametrize("loss_on", ["target", "all"])
def test_left_truncation_cuts_the_source_behind_the_leading_separator(loss_on: str) -> None:
    whole = encoded("a b c d e f A:", "yes", loss_on=loss_on)  # eos, 8 of source, 1 of target, eos
    cut = fit(whole, 6)
    assert cut.tokens == [0, *whole.tokens[5:]]
    assert cut.positions == 6
    assert cut.num_counted == (2 if loss_on == "target" else 6)
    assert fit(whole, 10) is whole


def test_right_truncation_cuts_the_end() -> None:
    whole = encoded("a b A:", "one two three four")
    cut = fit(whole, 7, truncation="right")
    assert cut.tokens == whole.tokens[:8]
    assert cut.num_counted == 3
    with pytest.raises(TargetTooLongError, match="leaves no target"):
        fit(encoded("a b c d e A:", "yes"), 5, truncation="right")


@pytest.mark.parametrize("leading", [True, False])
def test_a_target_longer_than_the_context_is_refused(leading: bool) -> None:
    example = encoded("a A:", "one two three four", leading_separator=leading)  # 4 targets and the separator
    room = 5
    assert fit(example, room, leading_separator=leading).num_counted == 5
    with pytest.raises(TargetTooLongError, match="its target of 5 tokens is longer than the context of 4 positions"):
        fit(example, room - 1, leading_separator=leading)


def test_a_document_may_be_cut_on_either_side() -> None:
    document = encoded("", "a b c d e f")
    left, right = fit(document, 4), fit(document, 4, truncation="right")
    assert left.tokens == [0, *document.tokens[4:]]
    assert right.tokens == document.tokens[:5]
    assert left.num_counted == right.num_counted == 4


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loss_on .* must be one of: target, suffix, all"):
        encoded("a", "b", loss_on="source")
    with pytest.raises(ValueError, match=r"truncation .* must be one of: left, right"):
        fit(encoded("a", "b"), 1, truncation="middle")
