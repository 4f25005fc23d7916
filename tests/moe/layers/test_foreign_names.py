"""Other libraries' names get an answer that says ours."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

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
            refuse_foreign_names(MoE.__init__, [foreign])
    refuse_foreign_names(MoE.__init__, ["d_model", "backend"])


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


class Forwarding(MoE):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Wider(MoE):
    def __init__(self, width: int, num_experts: int = 4, *, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(width, 2 * width, num_experts, **kwargs)
        self.scale = scale


def test_a_subclass_may_have_a_constructor_of_its_own() -> None:
    assert Forwarding(d_model=8, d_ff=16, num_experts=4, gated=True).experts.w_in.shape == (4, 16, 8)
    wider = Wider(width=8, scale=2.0, top_k=1)
    assert (wider.scale, wider.router.top_k) == (2.0, 1)
    assert copy.deepcopy(wider)(torch.zeros(3, 8))[0].shape == (3, 8)
    with pytest.raises(TypeError, match="MoE has no argument 'hidden_size'; it is called d_model here"):
        Forwarding(hidden_size=8, d_ff=16, num_experts=4)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'num_experts'"):
        MoE(d_model=8, d_ff=16)


def test_the_signature_says_what_there_is() -> None:
    parameters = inspect.signature(MoE).parameters
    assert [*parameters][:4] == ["d_model", "d_ff", "num_experts", "top_k"]
    assert parameters["top_k"].default == 2
    assert parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    assert [*inspect.signature(Wider).parameters] == ["width", "num_experts", "scale", "kwargs"]
