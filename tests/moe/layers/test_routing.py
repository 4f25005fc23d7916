"""Routings on disk and back, and replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe.layers import MoE, Routing, load_routings, save_routings
from moe.layers.initialization import WeightInit
from moe.layers.routing import count_assignments, detach_routings, valid_choices

D, FF, E = 6, 8, 5


def layer(**options: object) -> MoE:
    made = MoE(D, FF, E, dtype=torch.float64, **options)
    made.reset_parameters(seed=0, init=WeightInit(std=0.7))
    return made


def inputs(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 4, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equal(a: Routing, b: Routing) -> bool:
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y) and x.dtype == y.dtype)
        for x, y in zip(a, b, strict=True)
    )


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    masked = layer(capacity_factor=0.7)(inputs(), token_mask=torch.arange(12).view(3, 4) % 3 != 0)[1]
    flat = layer()(inputs()[0])[1]
    assert masked.sequence_ids is not None
    assert flat.sequence_ids is None
    save_routings(tmp_path / "routings.safetensors", (masked, flat))
    loaded = load_routings(tmp_path / "routings.safetensors")
    assert isinstance(loaded, tuple)
    assert [equal(a, b) for a, b in zip(loaded, (masked, flat), strict=True)] == [True, True]


def test_none_are_none(tmp_path: Path) -> None:
    save_routings(tmp_path / "dense.safetensors", ())
    assert load_routings(tmp_path / "dense.safetensors") == ()


def test_replay_from_a_file_gives_the_layer_again(tmp_path: Path) -> None:
    made = layer(capacity_factor=0.7, shared_d_ff=4)
    y, routing = made(inputs())
    save_routings(tmp_path / "r", [routing])
    (recorded,) = load_routings(tmp_path / "r")
    assert torch.equal(made(inputs(), routing=recorded)[0], y)
    assert torch.equal(made(inputs(), routing=recorded, recorded_weights=True)[0], y)


def test_recorded_weights_are_taken_and_computed_ones_are_not() -> None:
    made = layer()
    _, recorded = made(inputs())
    moved = inputs(seed=1).requires_grad_()
    y, routing = made(moved, routing=recorded, recorded_weights=True)
    assert equal(detach_routings([routing])[0], detach_routings([recorded])[0])
    again, anew = made(moved, routing=recorded)
    assert torch.equal(anew.expert_indices, recorded.expert_indices)
    assert not torch.allclose(anew.expert_weights, recorded.expert_weights)
    assert not torch.allclose(y, again)
    # a detached recording leaves the router out of the graph
    made(moved, routing=detach_routings([recorded])[0], recorded_weights=True)[0].sum().backward()
    assert made.router.weight.grad is None


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    made = layer()
    _, recorded = made(inputs())
    other = MoE(D, FF, E + 1, dtype=torch.float64)
    (tmp_path / "torn").write_bytes(b"\x10\x00")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    save_routings(tmp_path / "whole", [recorded])
    for call, message in (
        (lambda: made(inputs(), recorded_weights=True), "recorded_weights=True needs"),
        (lambda: made(inputs()[:2], routing=recorded), "12 tokens, but x has 8"),
        (lambda: other(inputs(), routing=recorded), "5 experts, but this layer has 6"),
        (lambda: load_routings(tmp_path / "torn"), "not a complete safetensors file"),
        (lambda: load_routings(tmp_path / "other"), "holds no routings in this version's format"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    fields = {f"0.{name}": field for name, field in recorded._asdict().items() if field is not None and name != "kept"}
    metadata = {"format": "moe.routings", "version": "1", "count": "1"}
    save_file({k: v.detach().contiguous() for k, v in fields.items()}, tmp_path / "partial", metadata)
    with pytest.raises(ValueError, match="lacks kept of routing 0"):
        load_routings(tmp_path / "partial")


def test_assignments_are_counted_where_chosen() -> None:
    indices = torch.tensor([[0, 1], [1, 2], [1, 0]])
    chosen = torch.tensor([[True, True], [True, False], [True, True]])
    assert count_assignments(indices, chosen, 4).tolist() == [2, 3, 0, 0]
    assert valid_choices(indices, None).all()
    assert valid_choices(indices, torch.tensor([True, False, True])).tolist() == [[True] * 2, [False] * 2, [True] * 2]
