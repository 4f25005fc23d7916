"""The record that a diverged run leaves in its folder. Reading it needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "diverged.json"


def read_divergence(run_dir: Path, max_skipped_steps: int) -> dict[str, Any] | None:
    """What `moe.run_folder.record_divergence` wrote; None if there is nothing that the run would only repeat.

    It would not if more steps in a row may be skipped now (`max_skipped_steps`) than when it diverged. Raises
    ValueError if the record is damaged.
    """
    path = run_dir / FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict) or not {"step", "seconds", "max_skipped_steps", "reason"} <= record.keys():
        raise ValueError(f"{path} is damaged; it says that the run diverged: delete it to go on all the same")
    return record if max_skipped_steps <= record["max_skipped_steps"] else None
