"""What the user is told while a program works. Its results go to stdout."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(f"{text}\n")
