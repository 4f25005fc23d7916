"""Choosing experts on the GPU path, in Triton's interpreter, against the reference. Started by test_triton.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe.kernels.permute import triton_impl as sorting
from moe.kernels.topk_routing import (
    NonFiniteScoresError,
    keep_within_capacity,
    op,
    top_k_experts,
    triton_impl,
)

Compare = Callable[[Tensor, Tensor], None]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens and of slots at sizes that an interpreter can afford."""
    monkeypatch.setattr(triton_impl, "BLOCK_BYTES", 256)
    monkeypatch.setattr(sorting, "BLOCK_SLOTS", 32)
    monkeypatch.setattr(sorting, "CHUNK_SLOTS", 16)


@pytest.mark.parametrize("top_k", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_best_experts_in_order(top_k: int, dtype: torch.dtype, poisoned_memory: None) -> None:
    """Rounded so that many scores are equal: of these the lower index comes first."""
    scores = (3 * torch.randn(13, 11, generator=torch.Generator().manual_seed(top_k))).round().to(dtype)
    expected = top_k_experts(scores, top_k, backend="reference")
    assert torch.equal(top_k_experts(scores, top_k, backend="triton"), expected)
    pairs = (scores[:, :, None] == scores[:, None, :]).sum() - scores.numel()
    assert pairs > scores.numel() / 2


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 1000), (5, 16)])
def test_sizes(shape: tuple[int, int]) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for top_k in {1, min(shape[1], 16)}:
        expected = top_k_experts(scores, top_k, backend="reference")
        assert torch.equal(top_k_experts(scores, top_k, backend="triton"), expected)


def test_scores_of_minus_infinity_come_last_and_none_twice() -> None:
    inf = float("inf")
    scores = torch.tensor([[-inf, 1.0, -inf, 2.0], [0.0, -inf, -inf, -inf]])
    assert top_k_experts(scores, 4, backend="triton").tolist() == [[3, 1, 0, 2], [0, 1, 2, 3]]


def test_scores_that_are_no_numbers_are_reported_unless_masked() -> None:
    scores = torch.tensor([[0.0, float("nan")], [1.0, 2.0]])
    with pytest.raises(NonFiniteScoresError, match="for 1 of 2 tokens, first for token 0"):
        top_k_experts(scores, 1, backend="triton")
    valid = torch.tensor([False, True])
    assert top_k_experts(scores, 1, valid=valid, backend="triton").tolist() == [[1], [1]]


@pytest.mark.parametrize("t", [0, 1, 9, 40])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("capacity", [0, 1, 4])
def test_capacity_agrees_with_the_token_by_token_rule(t: int, k: int, capacity: int, poisoned_memory: None) -> None:
    generator = torch.Generator().manual_seed(t + k)
    indices = torch.randint(5, (t, k), generator=generator)
    valid = torch.rand(t, k, generator=generator) < 0.8
    fast, slow = (
        keep_within_capacity(indices, valid, 5, capacity, backend=backend) for backend in ("triton", "reference")
    )
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("t", "e", "top_k", "normalize", "masked"),
    [
        (9, 6, 2, True, True),
        (5, 20, 8, True, False),
        (7, 5, 1, False, True),
        (6, 16, 3, False, False),
        (0, 4, 2, True, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_router_and_its_gradient(
    scores: str,
    t: int,
    e: int,
    top_k: int,
    normalize: bool,
    masked: bool,
    dtype: torch.dtype,
    assert_equal_to_scale: Compare,
    poisoned_memory: None,
) -> None:
    generator = torch.Generator().manual_seed(t + e)
    logits = torch.randn(t, e, generator=generator, dtype=torch.float64)
    valid = torch.rand(t, generator=generator) < 0.7 if masked else None
    upstream = torch.randn(t, e, generator=generator, dtype=torch.float64)
    results = []
    for backend, wide in (("triton", dtype), ("reference", torch.float64)):
        leaf = logits.to(wide).requires_grad_()
        routing = op.top_k_routing(
            leaf, top_k, scores=scores, normalize=normalize, weight_scale=2.5, valid=valid, backend=backend
        )
        combined = (routing.probs * upstream.to(wide)).sum() + (routing.expert_weights * upstream[:, :top_k]).sum()
        results.append((routing, torch.autograd.grad(combined, leaf)[0]))
    (fast, fast_grad), (slow, slow_grad) = results
    assert torch.equal(fast.expert_indices, slow.expert_indices)
    assert torch.equal(fast.tokens_per_expert, slow.tokens_per_expert)
    for actual, expected in ((fast.probs, slow.probs), (fast.expert_weights, slow.expert_weights)):
        assert_equal_to_scale(actual.detach(), expected.detach())
    assert_equal_to_scale(fast_grad, slow_grad)


def test_a_gradient_of_one_output_alone() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    for name in ("probs", "expert_weights"):
        gradients = []
        for backend in ("triton", "torch"):
            leaf = logits.clone().requires_grad_()
            output = getattr(op.top_k_routing(leaf, 2, backend=backend), name)
            gradients.append(torch.autograd.grad(output[:, 0].sum(), leaf)[0])
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_weights_too_small_to_normalise() -> None:
    """Sigmoid scores below the clamp: divided by it, as torch does, forward and backward."""
    gradients = []
    for backend in ("triton", "torch"):
        leaf = torch.full((2, 4), -40.0, dtype=torch.float64).requires_grad_()
        weights = op.top_k_routing(leaf, 2, scores="sigmoid", backend=backend).expert_weights
        gradients.append(torch.cat([weights.detach(), *torch.autograd.grad(weights[:, 0].sum(), leaf)], dim=1))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-30)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scores \('tanh'\) must be one of"):
        op.top_k_routing(torch.zeros(2, 3), 1, scores="tanh")
    with pytest.raises(ValueError, match=r"top_k \(4\) must be between 1 and the E"):
        op.top_k_routing(torch.zeros(2, 3), 4, backend="triton")


def test_a_compiler_sees_opaque_ops() -> None:
    logits = torch.randn(5, 6)
    valid = torch.tensor([True, False, True, True, True])

    def run(leaf: Tensor) -> tuple[Tensor, Tensor]:
        routing = op._top_k_routing(leaf, valid, 2, True, True, 1.0)
        kept = op._keep_within_capacity(routing[1], valid[:, None].expand(5, 2), 6, torch.tensor(1), "triton")
        return (routing[0].square().sum() + (routing[2] * kept).square().sum()), op._top_k_experts(
            leaf, 3, valid, "triton"
        )

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        value, chosen = function(leaf)
        results.append([value.detach(), chosen, *torch.autograd.grad(value, leaf)])
    assert all(map(torch.equal, *results))


def test_the_composition_is_a_loop_over_tokens() -> None:
    """What the other backends run, against softmax and division written out here."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, -1.0]], dtype=torch.float64)
    routing = op.top_k_routing(logits, 2, weight_scale=0.1, valid=torch.tensor([True, False]), backend="torch")
    e = logits.exp()
    torch.testing.assert_close(routing.probs, e / e.sum(dim=1, keepdim=True), rtol=1e-12, atol=0)
    assert routing.expert_indices.tolist() == [[1, 2], [0, 1]]
    share = float(e[0, 1] / (e[0, 1] + e[0, 2]))
    expected = torch.tensor([[0.1 * share, 0.1 * (1 - share)], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(routing.expert_weights, expected, rtol=1e-12, atol=0)
    assert routing.tokens_per_expert.tolist() == [0, 1, 1]
