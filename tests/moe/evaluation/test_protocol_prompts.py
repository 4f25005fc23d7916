from __future__ import annotations

import numpy as np
import pytest

from moe.evaluation.protocols.prompts import RESERVED, build_prompt, draw_demonstrations, encode, shuffled


class Bytes:
    """A token for each byte; 0 separates."""

    eos_id = begin_id = 0

    def encode(self, text: str) -> list[int]:
        return [1 + byte for byte in text.encode()]


TOKENIZER = Bytes()


def test_the_separator_ends_lines_and_no_line_break_is_left() -> None:
    tokens = encode(TOKENIZER, "\nab\n \n\nc\u2028d\n")
    assert tokens == [*TOKENIZER.encode("ab"), 0, *TOKENIZER.encode("c\u2028d")]
    assert encode(TOKENIZER, "\n") == []


def test_separators_stand_before_demonstrations_and_query() -> None:
    prompt = build_prompt(TOKENIZER, [[7, 8], [7, 9, 9]], [[5], [6, 6]], 20)
    assert prompt.sequences == [[0, 5, 0, 6, 6, 0, 7, 8], [0, 5, 0, 6, 6, 0, 7, 9, 9]]
    assert (prompt.num_shots, prompt.cut) == (2, False)
    assert build_prompt(TOKENIZER, [[7], [8]], [], 20).sequences == [[0, 7], [0, 8]]


def test_demonstrations_stop_at_the_first_that_does_not_fit() -> None:
    queries = [[7, 8], [7, 9, 9]]
    exact = RESERVED + 3 + 2 + 3  # the longest query, and [5] and [6, 6] with their separators
    assert build_prompt(TOKENIZER, queries, [[5], [6, 6]], exact).num_shots == 2
    assert build_prompt(TOKENIZER, queries, [[5], [6, 6]], exact - 1).num_shots == 1
    assert build_prompt(TOKENIZER, queries, [[6, 6, 6], [5]], exact - 1).sequences[0] == [0, 6, 6, 6, 0, 7, 8]
    assert build_prompt(TOKENIZER, queries, [[6] * 9, [5]], exact).num_shots == 0  # [5] would fit


def test_a_long_query_loses_its_first_tokens_in_all_candidates() -> None:
    queries = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7]]
    prompt = build_prompt(TOKENIZER, queries, [[5]], RESERVED + 4)
    assert prompt.sequences == [[0, 3, 4, 5, 6], [0, 3, 4, 7]]
    assert (prompt.num_shots, prompt.cut) == (0, True)
    assert not build_prompt(TOKENIZER, queries, [[5]], RESERVED + 6).cut


def test_a_candidate_longer_than_the_room_keeps_its_end() -> None:
    prompt = build_prompt(TOKENIZER, [[1, 2, 3, 4, 5, 6], [1, 9, 9]], [], RESERVED + 3)
    assert prompt.sequences == [[0, 4, 5, 6], [0, 9, 9]]
    with pytest.raises(ValueError, match=r"model.max_seq_len \(2\) leaves no room"):
        build_prompt(TOKENIZER, [[1], [2]], [], RESERVED)


def test_draws_are_numpys_and_without_replacement() -> None:
    drawn = draw_demonstrations(10, 4, 3, own_row=False)
    assert drawn == np.random.RandomState(3).choice(10, 4, replace=False).tolist()
    assert drawn != draw_demonstrations(10, 4, 4, own_row=False)
    assert len(draw_demonstrations(10, 4, 3, own_row=True)) == 5
    assert sorted(draw_demonstrations(10, 10, 0, own_row=False)) == list(range(10))
    with pytest.raises(ValueError, match=r"num_shots \(4\) needs 5 examples to show, .* has 4"):
        draw_demonstrations(4, 4, 0, own_row=True)


def test_each_query_has_an_order_of_its_own() -> None:
    orders = list(shuffled([3, 1, 4, 5], 4, 20, own_row=False))
    assert all(sorted(order) == [1, 3, 4, 5] for order in orders)
    assert len({tuple(order) for order in orders}) > 5
    assert orders[:7] == list(shuffled([3, 1, 4, 5], 4, 7, own_row=False))
    assert list(shuffled([], 0, 2, own_row=False)) == [[], []]


def test_a_query_is_not_among_its_own_demonstrations() -> None:
    for query, order in enumerate(shuffled([3, 1, 4, 0], 3, 8, own_row=True)):
        assert len(order) == len(set(order)) == 3
        assert query not in order
