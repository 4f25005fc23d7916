"""The report's files, and its page: read by a parser everywhere, by node and by Chromium where they are installed."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moe.scaling.report import build, plots, read
from moe.scaling.report.analysis import analyse
from moe.scaling.report.page import Value, number, page, table
from moe.scaling.report.page_parts import SCRIPT
from tests.moe.scaling.study_files import SPEEDUP, make_study

VOID = {"meta", "link", "input", "br", "img", "use", "path"}
FIGURES = ("loss_by_flops", "speedup", "speedup_by_metric", "domains", "loss_by_seconds", "tasks", "experts")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(HTMLParser):
    """What a browser would build: a tree that closes, its tables, and whatever it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._table: list[list[str]] | None = None
        self.errors: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag == "table":
            self._table = self.tables.setdefault(str(values["id"]), [])
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
        for name in ("src", "href", "xlink:href", "data", "action", "poster"):
            if name in values:
                (self.links if str(values[name]).startswith("#") else self.fetched).append(str(values[name]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()} closes nothing")
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        if self._table and self._table[-1] and self.open and self.open[-1] in ("td", "button"):
            self._table[-1][-1] += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_study(folder, spread=0.02)
    (folder / "runs/c-8e-t1M-s1/results.json").write_text("{")  # a study that is still running has a report too
    return build.write(read.study(folder), folder / "report", resamples=100)


@pytest.fixture(scope="module")
def parsed(report: Path) -> Page:
    return Page(report.read_text(encoding="utf-8"))


def test_all_files_are_there(report: Path) -> None:
    names = {path.name for path in report.parent.iterdir()}
    assert {"report.json", "runs.csv", "models.csv", "speedups.csv", "pairs.csv", "fits.csv", "experts.csv"} <= names
    for name in FIGURES:
        assert (report.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (report.parent / f"{name}.svg").read_text().startswith("<svg")
    assert not [name for name in names if name.endswith(".tmp")]
    with (report.parent / "speedups.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(json.loads((report.parent / "report.json").read_text())["speedups"])
    known = [line for line in lines if line["cost"] == "flops" and line["metric"] == "test/all" and line["size"] == "a"]
    assert {round(float(line["speedup"]), 6) for line in known} == {SPEEDUP}
    assert "over_seeds.low" in lines[0]


def test_the_page_is_well_formed_and_asks_for_nothing(report: Path, parsed: Page) -> None:
    assert parsed.errors == [] and parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.fetched == ["data:,"]  # the empty icon, or a browser would ask for one
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    text = report.read_text(encoding="utf-8")
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) <= namespaces
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest", text)
    assert all(f"#{reference}" for reference in re.findall(r"url\(#([^)]+)\)", text))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(parsed.ids)


def test_the_page_says_what_it_is(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "made up &lt;study&gt;" in text and "<study>" not in text
    for words in ("design: frontier", "Same-shape twins.", "13 runs complete", "1 not", "not bracketed", "No sweep."):
        assert words in text, words
    assert text.count("<svg") == len([name for name in report.parent.glob("*.svg")])
    assert "<b>8e</b> on test/all: dense models need 4.00 to 4.00 times its FLOPs to be as good" in text


def test_the_tables_hold_the_figures(report: Path, parsed: Page) -> None:
    tree = json.loads((report.parent / "report.json").read_text())
    head, *lines = parsed.tables["table-speedups"]
    assert len(lines) == len([r for r in tree["speedups"] if r["cost"] == "flops" and r["space"] != "log-perplexity"])
    assert all(len(line) == len(head) for line in lines)
    row = next(line for line in lines if line[:2] == ["a", "8e"] and line[3] == "test/all")
    assert row[head.index("speedup")] == "4" and row[head.index("between")] == "b dense"
    assert row[head.index("in seconds")] == "0.5"
    runs = parsed.tables["table-runs"]
    assert len(runs) == 1 + 13 and all("c0ffee" in line for line in runs[1:])
    assert parsed.tables["table-missing"][1][0] == "c-8e-t1M-s1"


def test_equal_findings_give_equal_figures(tmp_path: Path) -> None:
    make_study(tmp_path, seeds=(0,), documents=False)
    tree = analyse(read.study(tmp_path), resamples=100)
    drawn = [plots.svg(plots._speedups(tree, ["test/all"]), "speedup") for _ in range(2)]
    assert drawn[0] == drawn[1] and "in log-perplexity" in drawn[0]


def test_text_is_not_markup() -> None:
    made = table("x", ["<b>"], [["<script>alert(1)</script>"], [Value("5", 5.0)], [number(None)]])
    assert "<script>" not in made and "&lt;script&gt;" in made and "<b>" not in made
    assert 'data-value="5.0"' in made and 'data-value="inf"' in made
    tree = analyse(read.published(), resamples=100) | {"name": "</title><script>"}
    assert "</title><script>" not in page(tree, [])


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
def test_sorting_in_node() -> None:
    """The script's own functions on a table of two columns, numbers with a dash and names."""
    program = (
        SCRIPT
        + r"""
    const cell = (text, value) => ({ textContent: text, getAttribute: () => value });
    const content = [["b10", "2.5"], ["a", "inf"], ["b9", "10.0"], ["c", "-1.0"]];
    const rows = content.map(([t, v]) => ({ cells: [cell(t, null), cell(v, v)] }));
    const heads = [0, 1].map(() => ({ setAttribute(name, value) { this[name] = value; } }));
    const body = { rows: rows, out: [], appendChild(row) { this.out.push(row); } };
    const table = { tBodies: [body], tHead: { rows: [{ cells: heads }] } };
    const names = (column, falling) => {
      body.out = []; sortTable(table, column, falling);
      return body.out.map((row) => row.cells[0].textContent).join(" ");
    };
    const found = [names(1, false), names(1, true), names(0, false), names(0, true)];
    console.log(JSON.stringify([...found, heads.map((head) => head["aria-sort"])]));
    """
    )
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rising, falling, names, reverse, marks = json.loads(done.stdout)
    assert rising == "c b10 b9 a" and falling == "b9 b10 c a"  # what is not known is last either way
    assert names == "a b9 b10 c" and reverse == "c b10 b9 a"
    assert marks == ["descending", "none"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_in_chromium(report: Path) -> None:
    """It renders without a network, and opens sorted where its address says so."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    orders = []
    for column in ("4", "-4"):
        address = f"{report.resolve().as_uri()}#sort=models:{column}"
        done = subprocess.run(
            [str(CHROMIUM), *options, "--dump-dom", address], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        made = Page(done.stdout)
        assert done.stdout.count("<svg") == len(list(report.parent.glob("*.svg")))
        orders.append([float(line[3].replace(",", "")) for line in made.tables["table-models"][1:]])
    assert orders[0] == sorted(orders[0]) and orders[1] == sorted(orders[0], reverse=True)
    picture = report.parent / "page.png"
    shot = [str(CHROMIUM), *options, f"--screenshot={picture}", "--window-size=1280,2400", report.resolve().as_uri()]
    subprocess.run(shot, check=True, timeout=120, capture_output=True)
    assert picture.stat().st_size > 30_000
