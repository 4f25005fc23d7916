"""What docs/layers.md says of the layer in other model code: what works as with nn.Linear, and what does not."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moe.layers import MoE
from moe.layers.upcycle import upcycle

D, FF, E = 8, 12, 4
PAGE = (Path(__file__).parents[3] / "docs" / "layers.md").read_text(encoding="utf-8")


def layer() -> MoE:
    made = MoE(D, FF, E)
    made.reset_parameters(seed=0)
    return made


@pytest.mark.parametrize("num_tokens", [6, 9, 64])
def test_export_with_a_dynamic_number_of_tokens(num_tokens: int) -> None:
    made = layer().eval()
    exported = torch.export.export(made, (torch.randn(6, D),), dynamic_shapes=({0: torch.export.Dim("T", min=2)},))
    x = torch.randn(num_tokens, D)
    torch.testing.assert_close(exported.module()(x)[0], made(x)[0])


def test_copies_are_the_layer() -> None:
    made, x = layer(), torch.randn(5, D)
    made(x)[0].sum().backward()
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)
    buffer.seek(0)
    loaded = MoE(D, FF, E)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    averaged = torch.optim.swa_utils.AveragedModel(made)
    for same in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), loaded, averaged):
        assert torch.equal(same(x)[0], made(x)[0])


def test_a_parametrization_of_frozen_experts_learns() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.scale

    made, x = layer(), torch.randn(5, D)
    made.experts.requires_grad_(False)
    plain = made(x)[0]
    parametrize.register_parametrization(made.experts, "w_out", Doubled())
    torch.testing.assert_close(made(x)[0], 2.0 * plain)
    made(x)[0].sum().backward()
    torch.testing.assert_close(made.experts.parametrizations.w_out[0].scale.grad, plain.sum())


def test_what_the_page_says_does_not_work() -> None:
    made, x = layer(), torch.randn(3, 5, D)
    for call, words, error, message in (
        (lambda: torch.vmap(lambda part: made(part)[0])(x), "torch.vmap", RuntimeError, "data-dependent control flow"),
        (
            lambda: torch.func.jvp(lambda part: made(part)[0], (x,), (x,)),
            "torch.func.jvp",
            NotImplementedError,
            "jvp function",
        ),
        (lambda: torch.fx.symbolic_trace(made), "torch.fx.symbolic_trace", torch.fx.proxy.TraceError, "control flow"),
        (lambda: nn.Sequential(made, nn.LayerNorm(D))(x), "nn.Sequential", TypeError, "must be Tensor, not"),
    ):
        with pytest.raises(error, match=message):
            call()
        assert f"`{words}`" in PAGE


def test_upcycling_another_network_says_how() -> None:
    foreign: Any = nn.Sequential(nn.Linear(D, FF), nn.GELU(), nn.Linear(FF, D))
    with pytest.raises(TypeError, match=r"not a Sequential: build one .* w_in, w_gate and w_out \(docs/layers\.md\)"):
        upcycle(foreign, E)
