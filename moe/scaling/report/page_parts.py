"""Style and script of report.html."""

STYLE = """
:root { --ink: #20242c; --quiet: #667085; --line: #d9dde5; --paper: #ffffff; --band: #f5f7fa; --mark: #d1603d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --quiet: #98a2b3; --line: #3a404c; --paper: #16191f; --band: #1f242d; --mark: #e98a6b; }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
header, main { max-width: 1180px; margin: 0 auto; padding: 0 1.25rem; }
h1 { font-size: 1.9rem; margin: 2rem 0 .5rem; } h2 { font-size: 1.25rem; margin: 0 0 .75rem; } h3 { font-size: 1rem; }
header p { max-width: 76ch; margin: .4rem 0; }
.quiet { color: var(--quiet); }
.badge { border: 1px solid var(--mark); color: var(--mark); border-radius: 1em; padding: .05em .6em; }
nav { position: sticky; top: 0; z-index: 2; background: var(--paper); border-bottom: 1px solid var(--line);
  padding: .5rem 1.25rem; display: flex; gap: .2rem 1rem; overflow-x: auto; white-space: nowrap; margin-top: 1rem; }
nav a { color: var(--quiet); text-decoration: none; font-size: .85rem; } nav a:hover { color: var(--mark); }
section { padding: 1.6rem 0 .4rem; scroll-margin-top: 2rem; }
section p { max-width: 80ch; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; }
figure svg { width: 100%; height: auto; max-height: 90vh; display: block; }
.scroll { overflow: auto; max-height: 70vh; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: var(--band); text-align: left; padding: 0; }
th button { all: unset; cursor: pointer; display: block; padding: .45rem .7rem; font-weight: 600; white-space: nowrap; }
th button:focus-visible { outline: 2px solid var(--mark); }
th[aria-sort="ascending"] button::after { content: " \\2191"; }
th[aria-sort="descending"] button::after { content: " \\2193"; }
td { padding: .3rem .7rem; border-top: 1px solid var(--line); white-space: nowrap; } td.n { text-align: right; }
tbody tr:hover { background: var(--band); }
input[type="search"] { margin: 0 0 .5rem; padding: .3rem .6rem; border: 1px solid var(--line); border-radius: .4rem;
  background: var(--paper); color: var(--ink); font: inherit; font-size: .85rem; }
@media print { nav, input { display: none; } .scroll { max-height: none; overflow: visible; } }
"""

# `order` compares two cells: numbers by value and before text; equal cells keep their order (sort is stable). An
# address ending in #sort=NAME:COLUMN, or :-COLUMN for descending, counted from 1, opens the page sorted.
SCRIPT = """
"use strict";
function order(a, b) {
  const x = a.value, y = b.value;
  if (x !== null && y !== null) return x === y ? 0 : x < y ? -1 : 1;
  if (x !== null || y !== null) return x !== null ? -1 : 1;
  return a.text.localeCompare(b.text, "en", { numeric: true });
}
function key(cell) {
  const raw = cell.getAttribute("data-value");
  const value = raw === null ? null : raw === "inf" ? Infinity : Number(raw);
  return { value: value, text: cell.textContent };
}
function sortTable(table, column, falling) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows).map((row) => ({ row: row, key: key(row.cells[column]) }));
  rows.sort((a, b) => {
    const last = (k) => k.value === Infinity;
    if (last(a.key) !== last(b.key)) return last(a.key) ? 1 : -1;
    return falling ? order(b.key, a.key) : order(a.key, b.key);
  });
  for (const each of rows) body.appendChild(each.row);
  Array.from(table.tHead.rows[0].cells).forEach((head, place) => {
    head.setAttribute("aria-sort", place !== column ? "none" : falling ? "descending" : "ascending");
  });
}
if (typeof document !== "undefined") {
  for (const table of document.querySelectorAll("table")) {
    Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        sortTable(table, column, head.getAttribute("aria-sort") === "ascending");
      });
    });
  }
  for (const input of document.querySelectorAll("input[data-filter]")) {
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\\s+/).filter(Boolean);
      const table = document.getElementById("table-" + input.getAttribute("data-filter"));
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
  }
  const wanted = /^#sort=([a-z-]+):(-?)(\\d+)$/.exec(window.location.hash);
  const table = wanted && document.getElementById("table-" + wanted[1]);
  if (table) sortTable(table, Number(wanted[3]) - 1, wanted[2] === "-");
}
"""
