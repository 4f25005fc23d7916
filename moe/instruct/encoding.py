"""Turns a formatted example into token ids and finds where its loss begins (Iyer et al. 2022).

    encode(source + " " + target) + [separator]       the separator is in the loss

Source and target are encoded together, because a token may span the space between them. The first target token is the
first token that differs from the encoding of the source alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moe.data.tokenizer import Tokenizer
from moe.instruct.formatting import Formatted, join


class EncodedExample(NamedTuple):
    """An encoded example. All tokens but the first are predicted; the loss counts those from `first_counted` on."""

    tokens: list[int]
    first_target: int  # index of the first token of the target
    first_counted: int  # index of the first token whose loss counts

    @property
    def positions(self) -> int:
        """Positions that the example takes in a sequence. The last token is only predicted."""
        return len(self.tokens) - 1

    @property
    def num_counted(self) -> int:
        return len(self.tokens) - max(self.first_counted, 1)


class TargetTooLongError(ValueError):
    """The context has no room for the target of an example."""


def encode_formatted(
    tokenizer: Tokenizer, example: Formatted, *, leading_separator: bool = True, loss_on: str = "target"
) -> EncodedExample:
    """Encode one example and mark where its target and its loss begin.

    leading_separator: begin with `tokenizer.begin_id`, as documents do in pretraining and prompts in evaluation; the
    paper's code does not. loss_on: "target", "suffix" (from the first demonstration's answer on) or "all". If the
    source is empty, every token belongs to the target.
    """
    if loss_on not in ("target", "suffix", "all"):
        raise ValueError(f"loss_on ({loss_on!r}) must be one of: target, suffix, all")
    source = example.source.rstrip(" ")
    tokens = tokenizer.encode(join(source, example.target))
    first_target = _common_prefix(tokens, tokenizer.encode(source)) if source else 0
    counted = 0 if loss_on == "all" else first_target
    if loss_on == "suffix" and example.first_label_end < len(source):
        counted = _common_prefix(tokens, tokenizer.encode(source[: example.first_label_end].rstrip(" ")))
    front = [tokenizer.begin_id] if leading_separator else []
    return EncodedExample([*front, *tokens, tokenizer.eos_id], len(front) + first_target, len(front) + counted)


def counted_text(example: Formatted, loss_on: str) -> str:
    """The text of the tokens whose loss counts in `encode_formatted`, for figures per byte."""
    source = example.source.rstrip(" ")
    begin = {"target": len(source), "suffix": min(example.first_label_end, len(source)), "all": 0}[loss_on]
    text = join(source, example.target)[begin:]
    return text.removeprefix(" ") if begin > 0 else text


def fit(
    example: EncodedExample, seq_len: int, *, truncation: str = "left", leading_separator: bool = True
) -> EncodedExample:
    """Cut the example to at most `seq_len` positions.

    truncation: "left" (the paper) cuts the source after the leading separator; "right" (its public code) cuts the end,
    so the target first. Raises TargetTooLongError if "left" would have to cut into a target that has a source, or if
    "right" would leave nothing of the target. An example without a source can always be cut.
    """
    if truncation not in ("left", "right"):
        raise ValueError(f"truncation ({truncation!r}) must be one of: left, right")
    excess = example.positions - seq_len
    if excess <= 0:
        return example
    front = 1 if leading_separator else 0
    if truncation == "right":
        if example.first_target > seq_len:
            raise TargetTooLongError(
                f"its source alone has {example.first_target} tokens, and cutting the end to {seq_len} positions "
                f"leaves no target: set tune.truncation=left, raise data.seq_len or set tune.long_targets=drop"
            )
        return example._replace(tokens=example.tokens[: seq_len + 1])
    whole = example.first_target <= front  # no source
    if not whole and example.first_target - excess < 1:
        raise TargetTooLongError(
            f"its target of {len(example.tokens) - example.first_target} tokens is longer than the context of "
            f"{seq_len} positions: raise data.seq_len, or leave such examples out with tune.long_targets=drop"
        )
    return EncodedExample(
        example.tokens[:front] + example.tokens[front + excess :],
        max(front, example.first_target - excess),
        max(front, example.first_counted - excess),
    )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
