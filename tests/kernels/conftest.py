"""Comparison with a reference, and memory that betrays what was never written."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

# relative to the largest magnitude of the reference
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}

Compare = Callable[[Tensor, Tensor], None]


@pytest.fixture(scope="session")
def assert_equal_to_scale() -> Compare:
    """Every element within TOLERANCE of the reference's largest magnitude, by the dtype under test."""

    def compare(actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        error = float((actual.double() - expected.double()).abs().max()) if expected.numel() else 0.0
        assert error <= TOLERANCE[actual.dtype] * scale, f"error {error:.3g} at scale {scale:.3g} in {actual.dtype}"

    return compare


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty and its kin return NaN, so that an output that is not written is not a number."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _plain=plain, **kwargs: _poison(_plain(*args, **kwargs)))
    plain_method = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *args, **kwargs: _poison(plain_method(self, *args, **kwargs)))
    yield


def _poison(tensor: Tensor) -> Tensor:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-(2**31))
