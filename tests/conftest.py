"""What every test relies on."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_random_state() -> None:
    """A test that draws from torch's own generator draws the same numbers alone and in company."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` tests need a GPU and are skipped, and counted by pytest, where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
