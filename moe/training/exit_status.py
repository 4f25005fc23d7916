"""How `train.py` and `moe` end: the exit status that tells a script what went wrong (docs/run_folder.md)."""

from __future__ import annotations

import sys
from typing import NoReturn

from moe.config.errors import in_words
from moe.console import say

MISTAKE = 2  # the status that argparse and click give for a wrong command line
FAILED = 1  # what was asked for is possible and did not work: a full disk, a lost process, an error of ours
DIVERGED = 3  # training left finite numbers; the same command would only repeat it

# the system's errors that come from a path which the user gave; others, as a full disk, are failures
_OF_PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def exit_status(error: ValueError | OSError) -> int:
    """1, 2 or 3. A ValueError says which value, file or folder to change before the command can work."""
    own: int | None = getattr(error, "exit_status", None)  # moe.checkpoint.DivergedError's, whose package loads torch
    if own is not None:
        return own
    return MISTAKE if isinstance(error, (ValueError, *_OF_PATHS)) else FAILED


def end_with(error: ValueError | OSError) -> NoReturn:
    """Print `error: ...` on stderr and raise SystemExit with the error's status."""
    say(f"error: {in_words(error)}")
    sys.exit(exit_status(error))
