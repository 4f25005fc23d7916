"""The page of the roofline: written by the command, equal to the committed one, and honest about what it is."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe.cli import app
from moe.kernels.roofline import DEVICES, SHAPES, page, tiles, works, write_page
from moe.kernels.roofline.table import BEGIN, END

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "roofline.md"


def between(text: str) -> str:
    return text.split(BEGIN)[1].split(END)[0].strip()


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["kernels", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_committed_page_is_what_the_command_writes(tmp_path: Path) -> None:
    """A change of a kernel's resources, a tile or the model shows here; the command of the page writes it anew."""
    committed = PAGE.read_text(encoding="utf-8")
    copy = tmp_path / "roofline.md"
    copy.write_text(committed.replace("| H100 SXM |", "| H200 |"), encoding="utf-8")
    printed = invoke("--roofline", "--out", copy)
    assert copy.read_text(encoding="utf-8") == committed
    assert printed.strip() == between(committed)


def test_every_table_is_rectangular_and_complete() -> None:
    text = page()
    for table in text.split("\n\n"):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1
    for shape in SHAPES:
        assert text.count(f"### {shape.name}\n") == 1
    for shape in SHAPES:
        section = text.split(f"### {shape.name}\n")[1].split("###")[0]
        for work in works(shape):
            loads = work.tile is not None and work.op != "linear_cross_entropy"  # its time depends on the load
            assert section.count(f"| {work.op} | {work.name} |") == 2 + loads, work.name
    for device in DEVICES.values():
        assert device.source in text


def test_one_device_stands_alone() -> None:
    text = invoke("--roofline", "--target", "gfx942")
    assert "MI300X" in text and "H100" not in text and "every device" not in text


def test_other_resources_give_another_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiles.COSTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["kernel"] == "product_kernel" and row["target"] == "sm_90":
            row["programs_per_processor"] = "1"
    costs = tmp_path / "costs.csv"
    with costs.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    before = page(["sm_90"])
    monkeypatch.setattr(tiles, "COSTS", costs)
    tiles._costs.cache_clear()
    try:
        assert page(["sm_90"]) != before
    finally:
        tiles._costs.cache_clear()


def test_a_page_is_written_between_its_markers_alone(tmp_path: Path) -> None:
    new, old = tmp_path / "new.md", tmp_path / "old.md"
    write_page("tables\n", new)
    assert new.read_text() == "tables\n"
    old.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    write_page("tables\n", old)
    assert old.read_text() == f"before\n{BEGIN}\n\ntables\n\n{END}\nafter\n"
    for text in ("no markers", f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"):
        old.write_text(text)
        with pytest.raises(ValueError, match="the page is written between"):
            write_page("tables\n", old)
        assert old.read_text() == text
    with pytest.raises(ValueError, match=r"costs.csv\) must end in .md"):
        write_page("tables\n", tmp_path / "costs.csv")


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"targets \(sm_100\) must be among those with a data sheet: sm_90, sm_80, gfx942"
    ):
        invoke("--roofline", "--target", "sm_100")
    with pytest.raises(ValueError, match="targets must name at least one device"):
        page([])
    with pytest.raises(ValueError, match="--one-each has no meaning"):
        invoke("--roofline", "--one-each")


def test_the_page_says_what_it_is() -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert "No GPU has run these kernels" in text
    assert "arithmetic from data sheets and from compiled resources" in text
