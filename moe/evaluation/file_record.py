"""What results.json records about each data file read."""

from __future__ import annotations

import hashlib
from typing import Any

from moe.evaluation.datasets import Source


def describe(source: Source, num_rows: int) -> dict[str, Any]:
    """Path, SHA-256, number of rows, and the note on what a mirror's form lacks."""
    digest = hashlib.sha256(source.path.read_bytes()).hexdigest()
    return {"path": str(source.path), "sha256": digest, "rows": num_rows, "note": source.note}
