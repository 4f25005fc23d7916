from __future__ import annotations

from collections import Counter

from moe.data.documents import SPLITS, split_of


def test_shares_follow_the_fractions() -> None:
    counts = Counter(split_of(f"group {i}", 0.1, 0.2) for i in range(20_000))
    assert set(counts) == set(SPLITS)
    assert abs(counts["validation"] / 20_000 - 0.1) < 0.01
    assert abs(counts["test"] / 20_000 - 0.2) < 0.01


def test_the_split_depends_on_the_group_alone() -> None:
    assert split_of("json", 0.05, 0.05) == split_of("json", 0.05, 0.05)
    assert {split_of("a", 1e-9, 0.0), split_of("b", 1e-9, 0.0)} == {"train"}


def test_raising_the_validation_share_moves_nothing_out_of_it() -> None:
    groups = [f"group {i}" for i in range(500)]
    small = {g for g in groups if split_of(g, 0.05, 0.05) == "validation"}
    assert small <= {g for g in groups if split_of(g, 0.1, 0.05) == "validation"}
