"""Documents: a text with its domain and its group. The group decides the split."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

SPLITS = ("train", "validation", "test")

# Chosen so that the held-out shares of the default corpus are close to the requested ones in bytes too, in both
# domains. A few modules hold much of the text, so other salts give anything from 1% to 15%.
_SALT = "moe"


class Document(NamedTuple):
    """One text. All documents of a group fall into the same split."""

    domain: str
    group: str
    text: str


def split_of(group: str, validation_fraction: float, test_fraction: float) -> str:
    """Return "train", "validation" or "test", from a hash of `group` alone, so that new documents move no old ones."""
    digest = hashlib.blake2b(f"{_SALT}/{group}".encode(errors="surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2.0**64
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"
