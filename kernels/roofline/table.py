"""The roofline as Markdown: every kernel of four models, three loads and three GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .bounds import Bound, bound_of
from .devices import DEVICES, LAUNCH_SECONDS, Device
from .loads import LOADS, expert_rows
from .works import SHAPES, Shape, works

BEGIN, END = "<!-- roofline: begin -->", "<!-- roofline: end -->"

Columns = dict[str, Callable[[Bound], str]]


def page(targets: Sequence[str] = tuple(DEVICES), shapes: Sequence[Shape] = SHAPES) -> str:
    """All tables for the devices of `targets`, the first in detail. Raises ValueError for one without a data sheet."""
    if unknown := [target for target in targets if target not in DEVICES]:
        raise ValueError(f"targets ({', '.join(unknown)}) must be among those with a data sheet: {', '.join(DEVICES)}")
    devices = [DEVICES[target] for target in targets]
    if not devices:
        raise ValueError(f"targets must name at least one device of: {', '.join(DEVICES)}")
    parts = ["### Devices", _devices(devices), "### Tiles", _tiles(devices, shapes)]
    for shape in shapes:
        bounds = {
            (load, device.target): [bound_of(work, device) for work in works(shape, load)]
            for load in LOADS
            for device in (devices if load == LOADS[0] else devices[:1])
        }
        parts += [f"### {shape.name}", _sizes(shape), f"Even load on the {devices[0].name}:"]
        first = bounds[LOADS[0], devices[0].target]
        parts.append(_table(_KERNEL_COLUMNS, first))
        parts += [f"Three loads on the {devices[0].name}:", _loads(shape, devices[0], bounds)]
        if len(devices) > 1:
            parts += ["Even load, every device, µs (estimate):", _across(devices, bounds)]
    return "\n\n".join(parts) + "\n"


def write_page(text: str, path: Path) -> None:
    """Put `text` between the two markers of an existing page, or write a new page of it alone.

    Raises ValueError if the path is not Markdown or if the page exists without the markers.
    """
    if path.suffix != ".md":
        raise ValueError(f"out ({path}) must end in .md: the roofline is a page of Markdown tables")
    if path.exists():
        old = path.read_text(encoding="utf-8")
        if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(END) < old.index(BEGIN):
            raise ValueError(
                f"{path} must have one line {BEGIN} and, below it, one line {END}: the page is written between"
            )
        text = f"{old[: old.index(BEGIN)]}{BEGIN}\n\n{text}\n{old[old.index(END) :]}"
    path.write_text(text, encoding="utf-8")


def _figure(value: float) -> str:
    """Three digits, without an exponent."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _micro(seconds: float) -> str:
    return _figure(seconds * 1e6)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _of_peak(bound: Bound, seconds: float) -> str:
    return _percent(bound.peak_share(seconds)) if bound.work.useful_flops else ""


_KERNEL_COLUMNS: Columns = {
    "op": lambda b: b.work.op,
    "what": lambda b: b.work.name,
    "tile": lambda b: "" if b.work.tile is None else b.work.tile.size,
    "GFLOP": lambda b: _figure(b.work.useful_flops / 1e9),
    "executed": lambda b: _figure(b.work.executed_flops / 1e9),
    "MB": lambda b: _figure(b.work.compulsory_bytes / 1e6),
    "as tiled": lambda b: _figure(b.tiled_bytes / 1e6),
    "from L2": lambda b: _figure(b.work.requested_bytes / 1e6),
    "FLOP/byte": lambda b: _figure(b.work.intensity),
    "bound": lambda b: b.bound,
    "ideal µs": lambda b: _micro(b.ideal_seconds),
    "roofline µs": lambda b: _micro(b.seconds),
    "tile µs": lambda b: _micro(b.tile_seconds) if b.work.tile is not None else "",
    "L2 µs": lambda b: _micro(b.l2_seconds),
    "estimate µs": lambda b: _micro(b.estimate_seconds),
    "of peak": lambda b: _of_peak(b, b.estimate_seconds),
    "cautious": lambda b: _of_peak(b, b.cautious_seconds),
    "waves": lambda b: "" if b.waves is None else _figure(b.waves),
    "busy": lambda b: _percent(b.busy_share),
}


def _table(columns: Columns, bounds: Sequence[Bound]) -> str:
    return _rows(list(columns), [[text(bound) for text in columns.values()] for bound in bounds], left=3)


def _rows(heads: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table: the first `left` columns hold text, the others numbers."""
    lines = [heads, ["---"] * left + ["---:"] * (len(heads) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _devices(devices: Sequence[Device]) -> str:
    heads = ["device", "target", "TFLOP/s", "TB/s", "FLOP/byte", "L2 MiB", "L2 B/cycle", "last cache MiB"]
    heads += ["processors", "GHz"]
    rows = [
        [d.name, d.target, _figure(d.flops_per_second / 1e12), _figure(d.bytes_per_second / 1e12), _figure(d.ridge),
         _figure(d.l2_bytes / 2**20), str(d.l2_bytes_per_cycle), _figure(d.cache_bytes / 2**20), str(d.processors),
         f"{d.clock_hz / 1e9:g}"]
        for d in devices
    ]  # fmt: skip
    sources = "\n".join(f"- {d.name}: {d.source}." for d in devices)
    launch = f"- Launch: {_micro(LAUNCH_SECONDS)} µs from one kernel to the next, assumed."
    return f"{_rows(heads, rows, left=2)}\n\n{sources}\n{launch}"


def _tiles(devices: Sequence[Device], shapes: Sequence[Shape]) -> str:
    """Each tile of each kernel that the shapes use, once."""
    heads = ["op", "kernel", "tile", "blocks", "device", "instruction", "programs", "issue", "read", "fill", "limit"]
    heads.append("with fill")
    found: dict[tuple[str, ...], list[str]] = {}
    for bound in (bound_of(work, device) for shape in shapes for work in works(shape) for device in devices):
        if bound.step is None or bound.compiled is None:
            continue
        work, step = bound.work, bound.step
        assert work.tile is not None  # since it has steps
        key = (work.compiled_op, work.kernel, work.tile.size, str(work.matrices), bound.device.name)
        limit = "both" if step.issue == step.read else "issue" if step.issue > step.read else "reading"
        found[(*key, work.configuration)] = [
            *key, bound.compiled.instruction, str(bound.resident), _figure(step.issue), _figure(step.read),
            _figure(step.fill), limit, _percent(step.issue / step.one_path_cycles),
        ]  # fmt: skip
    return _rows(heads, list({tuple(row): row for row in found.values()}.values()), left=6)


def _sizes(shape: Shape) -> str:
    names = {"T": shape.num_tokens, "D": shape.d_model, "F": shape.d_ff, "E": shape.num_experts, "K": shape.top_k}
    sizes = ", ".join(f"{name}={value}" for name, value in (names | {"V": shape.vocab_size}).items())
    return f"{sizes}, {shape.activation}, {'two matrices into F' if shape.gated else 'one matrix into F'}, bfloat16."


def _loads(shape: Shape, device: Device, bounds: dict[tuple[str, str], list[Bound]]) -> str:
    """For the kernels whose time depends on the load: executed over useful FLOPs, the bound and the time."""
    heads = ["op", "what"]
    for load in LOADS:
        rows = expert_rows(load, shape.num_tokens, shape.num_experts, shape.top_k)
        heads += [f"{load} (most {max(rows)}): executed/useful", "bound", "estimate µs"]
    table = []
    for same in zip(*(bounds[load, device.target] for load in LOADS), strict=True):
        if same[0].work.tile is None or same[0].work.op == "linear_cross_entropy":
            continue
        line = [same[0].work.op, same[0].work.name]
        for bound in same:
            padded = bound.work.executed_flops / bound.work.flops
            line += [f"{padded:.2f}", bound.bound, _micro(bound.estimate_seconds)]
        table.append(line)
    return _rows(heads, table, left=2)


def _across(devices: Sequence[Device], bounds: dict[tuple[str, str], list[Bound]]) -> str:
    heads = ["op", "what"] + [head for device in devices for head in (device.name, "bound", "of peak", "cautious")]
    table = []
    for same in zip(*(bounds[LOADS[0], device.target] for device in devices), strict=True):
        line = [same[0].work.op, same[0].work.name]
        for bound in same:
            shares = [_of_peak(bound, seconds) for seconds in (bound.estimate_seconds, bound.cautious_seconds)]
            line += [_micro(bound.estimate_seconds), bound.bound, *shares]
        table.append(line)
    return _rows(heads, table, left=2)
