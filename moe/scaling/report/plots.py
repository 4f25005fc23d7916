"""The figures, drawn by matplotlib: SVG for the page, PNG and SVG for a paper. Equal findings give identical bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

_COLOURS = ("#4c566a", "#d1603d", "#2a7f9e", "#7a9e3a", "#8a5a9e", "#c79a1e", "#3d6fd1", "#9e2a4f")
_MARKERS = "osD^vP*X"
_LABELS = {
    "flops": "training FLOPs",
    "seconds": "seconds of training",
    "peak_memory_bytes": "bytes of memory at the peak",
    "parameter_bytes": "bytes of parameters",
}
Tree = dict[str, Any]


def figures(tree: Tree) -> dict[str, tuple[str, Any]]:
    """Title and matplotlib figure of everything in the findings, in page order."""
    made: dict[str, tuple[str, Any]] = {}
    losses = [metric["key"] for metric in tree["metrics"] if metric["group"] != "task"]
    tasks = [metric["key"] for metric in tree["metrics"] if metric["group"] == "task"]
    totals = [key for key in losses if key.endswith("/all")]
    if totals:
        made["loss_by_flops"] = "Loss against training FLOPs", _scatter(tree, totals, "flops")
    if any(curve["speedup"] for curve in tree["curves"]):
        made["speedup"] = "Speedup against what dense models spend", _speedups(tree, totals or tasks)
    if _by_metric(tree):
        made["speedup_by_metric"] = "Speedup in FLOPs by domain and task", _bars(tree)
    domains = [key for key in losses if key not in totals]
    if domains:
        made["domains"] = "Loss against training FLOPs, by domain", _scatter(tree, domains, "flops")
    for cost in ("seconds", "peak_memory_bytes", "parameter_bytes"):
        if totals and any(model.get(cost) for model in tree["models"]):
            made[f"loss_by_{cost}"] = f"Loss against {_LABELS[cost]}", _scatter(tree, totals, cost)
    if tasks:
        made["tasks"] = "Tasks against training FLOPs", _scatter(tree, tasks, "flops")
    if tree["experts"]:
        made["experts"] = "Use of the experts on the test split", _experts(tree)
    return made


def svg(figure: Any, name: str) -> str:
    """One <svg> element to embed in a page: no header, text as text, unique identifiers."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)  # contains web addresses
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'xlink:href="#{name}-')
    return text.strip()


def png(figure: Any) -> bytes:
    """For places that do not accept vector graphics."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _figure(panels: int, height: float = 3.4) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # a second of imports, only for reports; no global state

    columns = min(panels, 3) if panels > 2 else panels
    rows = -(-panels // columns)
    figure = Figure(figsize=(min(11.0, 4.6 * columns), height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_axis_off()
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:panels]


def _arms(tree: Tree) -> dict[str, str]:
    """Colour of each arm; dense arms share the first."""
    names = sorted({model["arm"] for model in tree["models"] if not model["arm"].startswith("dense")}, key=_number)
    return {name: _COLOURS[1 + place % (len(_COLOURS) - 1)] for place, name in enumerate(names)}


def _number(arm: str) -> tuple[int, str]:
    digits = re.match(r"\d+", arm)
    return (int(digits[0]) if digits else 0), arm


def _scatter(tree: Tree, metrics: list[str], cost: str) -> Any:
    """One panel per metric, one line per arm, seeds as faint points and their spread as bars."""
    figure, axes = _figure(len(metrics))
    colours = _arms(tree)
    budgets = sorted({model["tokens"] for model in tree["models"]})
    for axis, metric in zip(axes, metrics, strict=True):
        for arm in ["dense", *colours]:
            for style, tokens in zip(("-", "--", ":", "-.") * len(budgets), budgets, strict=False):
                chosen = [
                    model
                    for model in tree["models"]
                    if (model["arm"] == arm or (arm == "dense" and model["arm"].startswith("dense")))
                    and model["tokens"] == tokens
                    and model.get(cost)
                    and metric in model["metrics"]
                ]
                if not chosen:
                    continue
                chosen.sort(key=lambda model: float(model[cost]))
                label = arm if len(budgets) == 1 else f"{arm}, {tokens:.3g} tokens"
                axis.errorbar(
                    [model[cost] for model in chosen],
                    [model["metrics"][metric]["mean"] for model in chosen],
                    yerr=[model["metrics"][metric]["standard_deviation"] or 0.0 for model in chosen],
                    color=colours.get(arm, _COLOURS[0]),
                    marker=_MARKERS[(["dense", *colours].index(arm)) % len(_MARKERS)],
                    linestyle=style,
                    markersize=4,
                    linewidth=1.2,
                    capsize=2,
                    label=label,
                )
        axis.set_xscale("log")
        axis.set_title(metric, fontsize=9)
        axis.set_xlabel(_LABELS[cost], fontsize=8)
        axis.set_ylabel("accuracy or score" if metric.startswith("task/") else "nats per token", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.tick_params(axis="x", which="minor", labelsize=5, rotation=45)  # the only ticks within one decade
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def _speedups(tree: Tree, metrics: list[str]) -> Any:
    figure, axes = _figure(len(metrics))
    colours = _arms(tree)
    budgets = sorted({curve["tokens"] for curve in tree["curves"]})
    for axis, metric in zip(axes, metrics, strict=True):
        for curve in tree["curves"]:
            if curve["metric"] != metric or not curve["speedup"]:
                continue
            name = curve["arm"] if len(budgets) == 1 else f"{curve['arm']}, {curve['tokens']:.3g} tokens"
            style = "--" if curve["space"] == "log-perplexity" else "-"
            label = name if curve["space"] != "log-perplexity" else f"{name}, in log-perplexity"
            axis.plot(
                curve["dense_cost"], curve["speedup"], style, color=colours[curve["arm"]], linewidth=1.4, label=label
            )
        axis.axhline(1.0, color=_COLOURS[0], linewidth=0.8)
        axis.set_xscale("log")
        axis.set_title(metric, fontsize=9)
        axis.set_xlabel("FLOPs that dense models spend", fontsize=8)
        axis.set_ylabel("speedup", fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6, frameon=False)
        else:
            axis.text(0.5, 0.5, "not bracketed", ha="center", transform=axis.transAxes)
    return figure


def _by_metric(tree: Tree) -> list[Tree]:
    return [
        row
        for row in tree["speedups"]
        if row["cost"] == "flops" and row["speedup"] is not None and row["space"] != "log-perplexity"
    ]


def _bars(tree: Tree) -> Any:
    rows = _by_metric(tree)
    metrics = [metric["key"] for metric in tree["metrics"] if any(row["metric"] == metric["key"] for row in rows)]
    figure, (axis,) = _figure(1, height=1.2 + 0.22 * len(rows))
    figure.set_figwidth(9)
    colours, place, ticks = _arms(tree), 0, []
    for metric in metrics:
        for row in [row for row in rows if row["metric"] == metric]:
            interval = row["over_seeds"] or {}
            axis.barh(place, row["speedup"], color=colours[row["arm"]], height=0.75)
            if interval.get("low") is not None and interval["fewest_seeds"] > 1:
                axis.plot([interval["low"], interval["high"]], [place, place], color="black", linewidth=1)
            ticks.append((place, f"{metric}: {row['size']} {row['arm']}"))
            place += 1
        place += 1
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("speedup in FLOPs; lines: bootstrap over seeds", fontsize=8)
    return figure


def _experts(tree: Tree) -> Any:
    figures: tuple[tuple[str, str, Callable[[Tree], float]], ...] = (
        ("experts without a token", "share", lambda row: row["dead"] / row["experts"]),
        ("busiest expert over the mean", "ratio", lambda row: row["max_over_mean"]),
        ("entropy of use over its maximum", "share", lambda row: row["entropy_share"]),
    )
    figure, axes = _figure(len(figures))
    colours = _arms(tree)
    models = list(dict.fromkeys((row["size"], row["arm"], row["tokens"]) for row in tree["experts"]))
    for axis, (title, unit, value) in zip(axes, figures, strict=True):
        for place, model in enumerate(models):
            rows = [row for row in tree["experts"] if (row["size"], row["arm"], row["tokens"]) == model]
            axis.plot([place] * len(rows), [value(row) for row in rows], "o", color=colours[model[1]], markersize=4)
        axis.set_xticks(range(len(models)), [f"{size} {arm}" for size, arm, _ in models], rotation=90, fontsize=6)
        axis.set_title(f"{title}, by layer", fontsize=9)
        axis.set_ylabel(unit, fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
    return figure
