from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.kernels.topk_routing import keep_within_capacity, top_k_experts, top_k_routing


@pytest.mark.parametrize("num_tokens", [13, 1025])  # few are sorted
@pytest.mark.parametrize("top_k", range(1, 9))
def test_the_best_experts_in_order(top_k: int, num_tokens: int) -> None:
    scores = torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(top_k))
    expected = scores.topk(top_k, dim=1).indices  # no ties in random numbers
    for backend in ("torch", "reference"):
        assert torch.equal(top_k_experts(scores, top_k, backend=backend), expected)


def test_of_equal_scores_the_lower_index_is_better() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 1.0], [3.0, -torch.inf, -torch.inf, 1.0]])
    expected = [[0, 1, 2], [1, 2, 3], [0, 3, 1]]
    for backend in ("torch", "reference"):
        assert top_k_experts(scores, 3, backend=backend).tolist() == expected
        assert top_k_experts(scores.repeat(400, 1), 3, backend=backend).tolist() == expected * 400


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(1, 3), st.integers(1, 5), st.integers(0, 6), st.integers(0, 2**31))
def test_capacity_agrees_with_the_token_by_token_rule(t: int, k: int, e: int, capacity: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(e, (t, k), generator=generator)
    valid = torch.rand(t, k, generator=generator) < 0.8
    fast, slow = (
        keep_within_capacity(indices, valid, e, capacity, backend=backend) for backend in ("torch", "reference")
    )
    assert torch.equal(fast, slow)


def test_first_choices_are_served_before_second_and_earlier_tokens_before_later() -> None:
    indices = torch.tensor([[1, 0], [0, 1], [0, 1]])
    valid = torch.ones_like(indices, dtype=torch.bool)
    for backend in ("torch", "reference"):
        kept = keep_within_capacity(indices, valid, 2, 2, backend=backend)
        # expert 0: first choices of tokens 1 and 2 fill it; expert 1: token 0, then the second choice of token 1
        assert kept.tolist() == [[True, False], [True, True], [True, False]]


def test_invalid_choices_take_no_room() -> None:
    indices = torch.zeros(3, 1, dtype=torch.int64)
    valid = torch.tensor([[False], [True], [True]])
    for backend in ("torch", "reference"):
        assert keep_within_capacity(indices, valid, 1, 1, backend=backend).tolist() == [[False], [True], [False]]


def test_bad_input_is_refused() -> None:
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"top_k \(4\) must be between 1 and the E"):
        top_k_experts(scores, 4)
    with pytest.raises(ValueError, match=r"capacity \(-1\) must not be negative"):
        keep_within_capacity(torch.zeros(2, 1).long(), torch.ones(2, 1).bool(), 2, -1)
    with pytest.raises(ValueError, match="must agree"):
        keep_within_capacity(torch.zeros(2, 1).long(), torch.ones(2, 2).bool(), 2, 1)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_scores_of_minus_infinity_are_chosen_last_and_once(backend: str) -> None:
    inf = torch.inf
    scores = torch.tensor([[0.0, -inf, -inf, -inf], [-inf, 1.0, -inf, 2.0], [3.0, 1.0, 2.0, -inf]])
    expected = [[0, 1, 2], [3, 1, 0], [0, 2, 1]]
    assert top_k_experts(scores, 3, backend=backend).tolist() == expected


def test_sums_of_weights_below_the_smallest_count_as_that() -> None:
    """Against sigmoid and division written out here."""
    logits = torch.tensor([[-40.0, -41.0], [0.0, 1.0]], dtype=torch.float64)
    p = 1 / (1 + (-logits).exp())
    for smallest, floor in ((None, torch.finfo(torch.float64).eps), (1e-20, 1e-20), (0.0, 0.0)):
        routing = top_k_routing(logits, 2, scores="sigmoid", smallest_sum=smallest, backend="torch")
        expected = p / p.sum(dim=1, keepdim=True).clamp_min(floor)
        expected[1] = expected[1].flip(0)  # best first
        torch.testing.assert_close(routing.expert_weights, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_normalised_in_float32(dtype: torch.dtype) -> None:
    """Two of 512 equal experts have 1/256 together, below bfloat16's epsilon of 1/128."""
    logits = torch.zeros(3, 512, dtype=dtype)
    routing = top_k_routing(logits, 2, weight_scale=2.5, backend="torch")
    assert routing.expert_weights.dtype == routing.probs.dtype == dtype
    assert routing.expert_weights.tolist() == [[1.25, 1.25]] * 3
