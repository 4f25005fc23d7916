"""Real public data sets, which lie beside a checkout or where $MOE_TEST_DATA says, and in no commit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("MOE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def shared_data(name: str) -> Path:
    """The folder or file `name` of the data sets; the test that asks is skipped on a machine without them."""
    if not FOLDER.is_dir():
        pytest.skip("needs the public data sets: set MOE_TEST_DATA to their folder")
    path = FOLDER / name
    assert path.exists(), f"{FOLDER} has no {name}"
    return path
