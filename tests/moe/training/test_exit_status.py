from __future__ import annotations

import errno

import pytest

from moe.checkpoint import DivergedError
from moe.training.exit_status import exit_status


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a value"), 2),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (OSError("checkpoint x could not be written"), 1),
        (TimeoutError("rank 0 waited for rank 1"), 1),
        (DivergedError("3 updates in a row were skipped"), 3),
    ],
)
def test_the_status_says_whose_turn_it_is(error: ValueError | OSError, status: int) -> None:
    assert exit_status(error) == status
