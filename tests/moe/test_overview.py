"""The table of a sweep; what `train.py -m` writes of it is tested with the command."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from moe.overview import overview, print_overview, write_overview


def leave(folder: Path, name: str, tree: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / name).write_text(json.dumps(tree))
    return folder


def test_rows_are_over_all_domains_and_kinds_of_run(tmp_path: Path) -> None:
    domains = {
        "a": {"cross_entropy": 2.0, "num_tokens": 10, "num_bytes": 30},
        "b": {"cross_entropy": 4.0, "num_tokens": 30, "num_bytes": 70},
    }
    common = {"steps": 5, "seconds": 1234.5}
    pretrained = common | {"splits": {"validation": {"domains": domains}}}
    blown = {"a": domains["a"] | {"cross_entropy": None}}
    tuned = common | {"validation": {"groups": {"all": {"cross_entropy": 1.5, "bits_per_byte": 0.5}}}}
    record = {"step": 3, "seconds": 2.0, "max_skipped_steps": 0, "reason": "it diverged"}
    folders = [
        leave(tmp_path / "w", "results.json", pretrained),
        leave(tmp_path / "x", "results.json", common | {"splits": {"validation": {"domains": blown}}}),
        leave(tmp_path / "y", "results.json", tuned),
        leave(tmp_path / "z", "diverged.json", record),
    ]
    rows = overview([["a=1", f"+moe={n}e", "seed=0"] for n in (1, 2, 3, 4)], folders)
    assert [next(iter(row)) for row in rows] == ["moe"] * 4
    assert [row["moe"] for row in rows] == ["1e", "2e", "3e", "4e"]
    assert [row["outcome"] for row in rows] == ["complete"] * 3 + ["diverged"]
    assert [row["validation_loss"] for row in rows] == [3.5, None, 1.5, None]
    assert math.isclose(rows[0]["bits_per_byte"], 140 / 100 / math.log(2)) and rows[2]["bits_per_byte"] == 0.5
    assert [row["steps"] for row in rows] == [5, 5, 5, 3]
    console = Console(file=io.StringIO(), width=160)
    print_overview(rows, Path("runs/sweep.csv"), console)
    shown = console.file.getvalue()
    assert "3.5000" in shown and "1,234" in shown and str(tmp_path / "z") in shown
    assert shown.rstrip().endswith("runs/sweep.csv")
    path = write_overview(rows)
    assert path is not None and path.parent == tmp_path and path.read_text().count("\n") == 5
    assert write_overview(rows) == path  # the same sweep again
    rows[0]["run_dir"] = "elsewhere/w"
    assert write_overview(rows) is None
