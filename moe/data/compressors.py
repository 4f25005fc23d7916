"""Compression of the held-out text by general-purpose compressors: the yardstick for bits per byte."""

from __future__ import annotations

import gzip
import lzma
from typing import NamedTuple

# xz -9 looks back 64 MiB. Longer held-out text is truncated, and of the training text only the last part can be
# referenced.
WINDOW_BYTES = 64 * 2**20


class CompressedBits(NamedTuple):
    """Bits per byte of one held-out text."""

    gzip: float  # gzip -9 of the text alone
    xz: float  # xz -9 of the text alone
    xz_given_train: float  # xz -9 of training text + held-out text, minus xz -9 of the training text


def measure(train: bytes, held_out: bytes) -> CompressedBits:
    """Compress `held_out` alone and after `train`, the training text of the same domain.

    A model has read the training text before the held-out text, so only the last figure is a fair comparison.
    """
    held_out = held_out[:WINDOW_BYTES]
    train = train[max(0, len(train) + len(held_out) - WINDOW_BYTES) :]
    alone = _xz(held_out)
    given_train = _xz(train + held_out) - _xz(train) if train else alone
    sizes = (len(gzip.compress(held_out, compresslevel=9, mtime=0)), alone, given_train)
    return CompressedBits(*(8.0 * size / len(held_out) for size in sizes))


def _xz(text: bytes) -> int:
    return len(lzma.compress(text, preset=9))
