"""Other libraries' names get an answer that says ours."""

from __future__ import annotations

import pytest

from moe.layers import FeedForward, MoE
from moe.layers.foreign_names import OURS, refuse_foreign_names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 8, "d_ff": 8, "num_experts": 2}, "no argument 'hidden_size'; it is called d_model here"),
        ({"d_model": 8, "intermediate_size": 8, "num_experts": 2}, "it is called d_ff here"),
        ({"d_model": 8, "d_ff": 8, "num_local_experts": 2}, "it is called num_experts here"),
        ({"d_model": 8, "d_ff": 8, "num_experts": 4, "num_experts_per_tok": 2}, "it is called top_k here"),
        ({"d_model": 8, "d_ff": 8, "num_experts": 4, "capacity_facto": 2}, "it is called capacity_factor here"),
        ({"d_model": 8, "d_ff": 8, "num_experts": 4, "zzz": 2}, "there are: d_model, d_ff, num_experts"),
    ],
)
def test_the_error_names_ours(options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        MoE(**options)


def test_every_translation_leads_to_an_argument() -> None:
    for foreign, ours in OURS.items():
        with pytest.raises(TypeError, match=f"it is called {ours} here"):
            refuse_foreign_names(MoE, [foreign])
    refuse_foreign_names(MoE, ["d_model", "backend"])


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("gleu", "did you mean 'gelu'"),
        ("swiglu", "swiglu is activation='silu' with gated=True"),
        ("Silu", "did you mean 'silu'"),
        ("xyz", "must be one of: gelu, relu, silu, gelu_tanh$"),
    ],
)
def test_the_nearest_activation_is_suggested(activation: str, message: str) -> None:
    for make in (lambda: FeedForward(8, 8, activation=activation), lambda: MoE(8, 8, 2, activation=activation)):
        with pytest.raises(ValueError, match=message):
            make()
