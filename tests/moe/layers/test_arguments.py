"""Numbers that do not fit and misspelt choices are refused where a layer is built, by one ValueError that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moe.layers import ExpertChoiceRouter, Experts, FeedForward, GShardRouter, MoE, TopKRouter
from moe.layers.attention import Attention
from moe.layers.initialization import WeightInit
from moe.layers.norm import make_norm
from moe.layers.transformer_layer import TransformerLayer

COUNT = "must be an integer of at least 1"


def sparse(**changes: Any) -> MoE:
    return MoE(**({"d_model": 8, "d_ff": 16, "num_experts": 4} | changes))


@pytest.mark.parametrize("bad", [0, -8, 8.0, True, "8", np.float64(8), None])
@pytest.mark.parametrize("name", ["d_model", "d_ff", "num_experts", "top_k", "shared_d_ff"])
def test_a_size_is_an_integer_of_at_least_one(name: str, bad: object) -> None:
    if (name, bad) == ("shared_d_ff", None):
        return
    with pytest.raises(ValueError) as error:
        sparse(**{name: bad})
    assert str(error.value) == f"{name} ({bad!r}) {COUNT}"


def test_numpys_integers_are_integers() -> None:
    one = np.int64
    layer = sparse(d_model=one(8), d_ff=one(16), num_experts=one(4), top_k=one(2), shared_d_ff=one(3))
    assert type(layer.router.top_k) is int
    assert layer(torch.zeros(5, 8))[0].shape == (5, 8)
    given = sparse(num_experts=one(4), router=GShardRouter(8, one(4)))
    assert given.router.num_experts == 4


@pytest.mark.parametrize(
    "make",
    [
        sparse,
        lambda **o: sparse(router=TopKRouter(8, 4), **o),
        lambda **o: Experts(8, 16, 4, **o),
        lambda **o: FeedForward(8, 16, **o),
        lambda **o: Attention(8, 2, **o),
        lambda **o: TransformerLayer(Attention(8, 2), FeedForward(8, 16), 8, **o),
    ],
)
@pytest.mark.parametrize("bad", [1.5, 1.0, -0.5, torch.nan])
def test_dropout_is_a_probability(make: Callable[..., Any], bad: float) -> None:
    with pytest.raises(ValueError, match=rf"dropout \({bad}\) must be at least 0 and below 1"):
        make(dropout=bad)


@pytest.mark.parametrize(
    "make",
    [
        sparse,
        lambda **o: TopKRouter(8, 4, **o),
        lambda **o: GShardRouter(8, 4, **o),
        lambda **o: ExpertChoiceRouter(8, 4, **o),
        lambda **o: Experts(8, 16, 4, **o),
    ],
)
def test_a_backend_is_one_of_those_there_are(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"backend \('tirton'\) must be one of: auto, triton, torch, reference"):
        make(backend="tirton")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_norm("LayerNorm", 8, 1e-5), r"norm \('LayerNorm'\) must be one of: layernorm, rmsnorm"),
        (
            lambda: TransformerLayer(Attention(8, 2), FeedForward(8, 16), 8, norm_position="Pre"),
            r"norm_position \('Pre'\) must be one of: pre, post",
        ),
        (lambda: Attention(8, 2, qk_norm="heads"), r"qk_norm \('heads'\) must be one of: head, full"),
        (lambda: Attention(10, 3), r"d_model \(10\) must be divisible by num_heads \(3\); or set head_dim"),
        (lambda: Attention(8, 4, num_kv_heads=3), r"num_heads \(4\) must be divisible by num_kv_heads \(3\)"),
        (lambda: Attention(8, 0), rf"num_heads \(0\) {COUNT}"),
        (lambda: Attention(8, 2, head_dim=-4), rf"head_dim \(-4\) {COUNT}"),
        (lambda: Attention(8, 2, num_kv_heads=0), rf"num_kv_heads \(0\) {COUNT}"),
        (lambda: Attention(True, 1), rf"d_model \(True\) {COUNT}"),
        (lambda: WeightInit("fairsq"), r"kind \('fairsq'\) must be one of: normal, fairseq"),
        (lambda: TopKRouter(0, 4), rf"d_model \(0\) {COUNT}"),
        (lambda: TopKRouter(8, 4, 2.0), rf"top_k \(2\.0\) {COUNT}"),
        (lambda: TopKRouter(8, 4, weight_scale=torch.nan), r"weight_scale \(nan\) must be above 0"),
        (lambda: FeedForward(8, 0), rf"d_ff \(0\) {COUNT}"),
        (lambda: Experts(8, 16, 0), rf"num_experts \(0\) {COUNT}"),
    ],
)
def test_choices_and_numbers_of_other_layers(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_stated_width_of_heads_needs_no_division() -> None:
    assert Attention(10, 3, head_dim=4)(torch.zeros(1, 2, 10)).shape == (1, 2, 10)
