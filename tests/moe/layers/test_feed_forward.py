from __future__ import annotations

import pytest
import torch

from moe.layers import Experts, FeedForward
from moe.layers.initialization import WeightInit


@pytest.mark.parametrize(
    ("gated", "bias", "activation"), [(False, True, "gelu"), (True, False, "silu"), (True, True, "relu")]
)
def test_a_single_expert_is_the_dense_network(gated: bool, bias: bool, activation: str) -> None:
    options = {"gated": gated, "bias": bias, "activation": activation, "dtype": torch.float64}
    dense, experts = FeedForward(5, 7, **options), Experts(5, 7, 1, **options)
    with torch.no_grad():
        for (name, parameter), (other, stacked) in zip(
            dense.named_parameters(), experts.named_parameters(), strict=True
        ):
            assert name == other
            parameter.normal_()
            stacked.copy_(parameter[None])
    x = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(experts(x, torch.tensor([0, 6])), dense(x), rtol=1e-12, atol=1e-12)


def test_seeded_weights_depend_on_the_expert_alone() -> None:
    """Four of eight experts have the weights they have among eight; no two experts are equal."""
    small, large = Experts(5, 7, 4, bias=True), Experts(5, 7, 8, bias=True)
    for experts in (small, large):
        experts.reset_parameters(seed=1, layer=2)
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        assert torch.equal(a, b[:4])
    assert not torch.equal(large.w_in[0], large.w_in[1])
    before = large.w_in.clone()
    large.reset_parameters(seed=1, layer=3)
    assert not torch.equal(before, large.w_in)


@pytest.mark.parametrize("kind", [FeedForward, Experts])
def test_initialisations_have_their_scale(kind: type) -> None:
    module = kind(64, 256, bias=True) if kind is FeedForward else kind(64, 256, 3, bias=True)
    module.reset_parameters(seed=0, init=WeightInit(std=0.05, output_scale=0.5))
    assert float(module.w_in.detach().std()) == pytest.approx(0.05, rel=0.05)
    assert float(module.w_out.detach().std()) == pytest.approx(0.025, rel=0.05)
    assert not module.b_in.any()
    module.reset_parameters(seed=0, init=WeightInit("fairseq"))
    assert float(module.w_in.detach().abs().max()) == pytest.approx(64**-0.5, rel=0.02)
    assert float(module.w_out.detach().abs().max()) == pytest.approx(256**-0.5, rel=0.02)
    assert float(module.b_out.detach().abs().max()) <= 256**-0.5


def test_dropout_is_for_training() -> None:
    module = FeedForward(8, 16, dropout=0.5)
    module.reset_parameters(seed=0, init=WeightInit(std=1.0))
    x = torch.ones(40, 8)
    share = float((module(x) == 0).float().mean())
    assert 0.3 < share < 0.7
    assert not (module.eval()(x) == 0).any()


def test_unknown_activations_are_refused() -> None:
    for kind, sizes in ((FeedForward, (4, 4)), (Experts, (4, 4, 2))):
        with pytest.raises(ValueError, match=r"activation \('tanh'\) must be one of: gelu, relu, silu"):
            kind(*sizes, activation="tanh")
