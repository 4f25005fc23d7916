"""Norms against torch's own."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from moe.layers.norm import make_norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_narrow_input_is_normalised_as_by_torch_and_without_its_warning(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 24, generator=generator).to(dtype).requires_grad_()
    g = torch.randn(7, 24, generator=generator).to(dtype)
    norm = make_norm("rmsnorm", 24, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(24, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = F.rms_norm(x, (24,), norm.weight, 1e-5)
    expected_grads = torch.autograd.grad(expected, (x, norm.weight), g)
    torch.set_warn_always(True)  # else torch warns once per process, here or not
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual = norm(x)
    finally:
        torch.set_warn_always(False)
    assert actual.dtype == dtype
    assert not caught or dtype == torch.float64  # a wider input is left as it is
    assert torch.equal(actual, expected)
    for found, wanted in zip(torch.autograd.grad(actual, (x, norm.weight), g), expected_grads, strict=True):
        assert torch.equal(found, wanted)
