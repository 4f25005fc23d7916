"""The report on instruction-tuned models: what is above chance, what tuning gained, and which model gained more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe.evaluation.results import CONFIDENCE, Estimate
from moe.instruct.evaluation.aggregation import level_name, verdict
from moe.instruct.evaluation.comparison import Arm, Comparison, Difference, Key, Source

_METRICS = ("score", "accuracy", "rouge_l", "exact_match", "loss")
_KINDS = ("level", "category", "task")
_TITLES = {
    "score": "score",
    "accuracy": "accuracy",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
    "loss": "loss of target tokens (nats)",
}
_MOST_LISTED = 30  # names per line of findings


def write_report(comparison: Comparison, sources: Sequence[Source], folder: Path) -> Path:
    """Write report.md, levels.png and, with tuned models, gains.png into a new or empty folder; return report.md.

    Raises ValueError for a folder that holds a report.
    """
    path = folder / "report.md"
    if path.exists():
        raise ValueError(f"{folder} holds a report; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    plots = [_plot_levels(comparison.arms, folder / "levels.png")]
    if comparison.gains:
        plots.append(_plot_gains(comparison.gains, folder / "gains.png"))
    lines = ["# Evaluation after instruction tuning", "", *_origin(sources, comparison.notes)]
    lines += ["", "## Findings", "", *findings(comparison)]
    lines += ["", *[f"![{plot.stem}]({plot.name})" for plot in plots]]
    for kind, title in zip(_KINDS, ("Levels", "Categories", "Tasks"), strict=True):
        lines += ["", f"## {title}", "", *_figures_table(comparison.arms, kind)]
    for title, differences in (
        ("Gains of tuning", comparison.gains),
        ("Gains beside the first model's", comparison.gain_differences),
        ("Models beside the first", comparison.differences),
    ):
        if differences:
            lines += ["", f"## {title}", "", *_differences_table(differences)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def results_table(results: Mapping[str, Any]) -> str:
    """One evaluation in Markdown: levels and categories, then sub-tasks with their counts."""
    lines = [
        "| level | group | shots | metric | value | 95% interval | chance | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = ("kind", "level", "category", "name", "num_fewshot")
    for group in sorted(results["groups"], key=lambda group: _order(tuple(group[name] for name in names))):
        for metric in _METRICS:
            if metric in group["metrics"] and (group["kind"], metric) != ("task", "score"):
                estimate = Estimate(**group["metrics"][metric])
                name = "all" if group["kind"] == "level" else f"{group['kind']} {group['name']}"
                shots = "mean" if group["num_fewshot"] is None else str(group["num_fewshot"])
                cells = [level_name(group["level"]), name, shots, _TITLES[metric], f"{estimate.value:.3f}"]
                cells += [f"{estimate.low:.3f} to {estimate.high:.3f}", _number(group["chance"][metric])]
                lines.append(f"| {' | '.join(cells)} | {_against(group['against_chance'][metric])} |")
    lines += ["", "| sub-task | shots | ranked | left out | cut | ties | unfinished | mean shots |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for entry in results["tasks"].values():
        counts = entry["details"]
        cells = [entry["task"], str(entry["num_fewshot"]), f"{counts['num_ranked']} of {counts['num_records']}"]
        cells += [str(counts[name]) for name in ("num_too_long", "num_cut", "num_ties", "num_unfinished")]
        lines.append(f"| {' | '.join(cells)} | {counts['mean_shots']:.2f} |")
    return "\n".join(lines)


def _against(found: str) -> str:
    return f"{found} chance" if found else ""


def _origin(sources: Sequence[Source], notes: Sequence[str]) -> list[str]:
    results = sources[0].results
    benchmark = results.get("benchmark", {})
    some = " (exact match in some categories)" if results["protocol"].get("exact_match_categories") else ""
    settings = ", ".join(f"{name} {value}" for name, value in benchmark.items() if name != "manifest_sha256")
    lines = [
        f"Protocol {results['protocol']['name']}, benchmark: {settings}. Intervals: {round(100 * CONFIDENCE)} %, by "
        f"bootstrap over raw examples, copies in several benchmarks drawn together, the tasks being taken as given; "
        f"with several seeds of a model, over those too. "
        f"The score of a task is accuracy where answers are ranked, else "
        f"{_TITLES[results['protocol']['primary']]}{some}. Chance: candidates drawn evenly, or the answer to another "
        f"question of the task. The best constant answer knows all references.",
        "",
        "| model | evaluation | weights |",
        "|---|---|---|",
    ]
    lines += [f"| {source.label} | {source.path} | {source.results.get('model', '')} |" for source in sources]
    return [*lines, "", *[f"- Note: {note}." for note in notes]]


def findings(comparison: Comparison) -> list[str]:
    """Sentences on what the intervals support and what they do not."""
    lines = []
    for arm in comparison.arms:
        for num_shots in _shots(arm):
            lines += _above_chance(arm, num_shots)
    for difference in _headline(comparison.gains):
        lines.append(f"- {difference.name} over {difference.than}, {_where(difference)}: {_judged(difference)}.")
    for difference in _headline(comparison.gain_differences):
        words = {"more": "is larger", "less": "is smaller", "no difference": "is not shown to differ"}[difference.says]
        than = f"from {difference.than}'s" if difference.says == "no difference" else f"than {difference.than}'s"
        lines.append(
            f"- **The gain of {difference.name} {words} {than}**, {_where(difference)}: by "
            f"{_signed(difference.estimate)}."
        )
    for difference in _headline(comparison.differences):
        lines.append(f"- {difference.name} over {difference.than}, {_where(difference)}: {_judged(difference)}.")
    count = len(comparison.gains) + len(comparison.gain_differences) + len(comparison.differences)
    if count:
        lines.append(
            f"- {count} differences are in the tables; of intervals around no difference at all, one in "
            f"{round(1 / (1 - CONFIDENCE))} would leave out 0."
        )
    return lines


def _headline(differences: Sequence[Difference]) -> list[Difference]:
    """Score and loss of the levels, in table order."""
    found = [each for each in differences if each.key[0] == "level" and each.metric in ("score", "loss")]
    return sorted(found, key=lambda each: (_METRICS.index(each.metric), _order(each.key)))


def _above_chance(arm: Arm, num_shots: int | None) -> list[str]:
    """Which levels and tasks are above chance and which are not."""
    lines: list[str] = []
    if num_shots is None:
        return lines  # shown in the tables
    for kind, what in (("level", "levels"), ("task", "tasks")):
        found: dict[str, list[str]] = {"above": [], "not above": [], "below": [], "": []}
        for key, figures in arm.groups.items():
            if key[0] == kind and key[4] == num_shots and "score" in figures:
                figure = figures["score"]
                found[verdict(figure)].append(key[3])
        total = sum(map(len, found.values()))
        parts = [f"{len(found['above'])} of {total} {what} are above chance"]
        for words, names in (("not above", found["not above"]), ("below", found["below"])):
            if names:
                more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
                parts.append(f"{words}: {', '.join(names[:_MOST_LISTED])}{more}")
        lines.append(f"- {arm.label}, {_shots_name(num_shots)}: {'; '.join(parts)}.")
    return lines


def _shots(arm: Arm) -> list[int | None]:
    return list(dict.fromkeys(key[4] for key in arm.groups))


def _shots_name(num_shots: int | None) -> str:
    return "mean over shots" if num_shots is None else f"{num_shots}-shot"


def _where(difference: Difference) -> str:
    return f"{difference.key[3]}, {_shots_name(difference.key[4])}, {_TITLES[difference.metric]}"


def _judged(difference: Difference) -> str:
    words = {"more": "better by", "less": "worse by", "no difference": "no difference shown,"}[difference.says]
    return f"{words} {_signed(difference.estimate)}"


def _figures_table(arms: Sequence[Arm], kind: str) -> list[str]:
    """One line per group and metric, with all models side by side."""
    first = arms[0]
    head = ["level", *([kind] if kind != "level" else []), "shots", "metric", "chance", "constant"]
    lines = [f"| {' | '.join([*head, *[arm.label for arm in arms]])} |", "|" + "---|" * (len(head) + len(arms))]
    for key in sorted((key for key in first.groups if key[0] == kind), key=_order):
        for metric in _METRICS:
            if metric not in first.groups[key] or (kind, metric) == ("task", "score"):  # shown as another metric
                continue
            figure = first.groups[key][metric]
            cells = [level_name(key[1]), *([key[3]] if kind != "level" else [])]
            cells += ["mean" if key[4] is None else str(key[4]), _TITLES[metric]]
            cells += [_number(figure.chance), _number(figure.constant)]
            cells += [_cell(arm, key, metric) for arm in arms]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(arm: Arm, key: Key, metric: str) -> str:
    figure = arm.groups[key][metric]
    estimate = figure.estimate()
    mark = {"above": " ▲", "below": " ▼"}.get(verdict(figure), "")
    seeds = ""
    if arm.num_seeds > 1:
        low, high = arm.spread[key][metric]
        seeds = f", seeds {low:.3f} to {high:.3f}"
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f}{seeds}){mark}"


def _differences_table(differences: Sequence[Difference]) -> list[str]:
    lines = ["| | over | level | group | shots | metric | better by | says |", "|---|---|---|---|---|---|---|---|"]
    for each in sorted(differences, key=lambda each: (_order(each.key), each.name, _METRICS.index(each.metric))):
        kind, level, _, name, num_shots = each.key
        if (kind, each.metric) == ("task", "score"):
            continue
        shots = "mean" if num_shots is None else str(num_shots)
        cells = [each.name, each.than, level_name(level), f"{kind} {name}" if kind != "level" else "all", shots]
        lines.append(f"| {' | '.join([*cells, _TITLES[each.metric], _signed(each.estimate), each.says])} |")
    return lines


def _order(key: Key) -> tuple[int, int, str, str, int]:
    kind, level, category, name, num_shots = key
    return _KINDS.index(kind), 9 if level is None else level, category, name, 99 if num_shots is None else num_shots


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _plot_levels(arms: Sequence[Arm], path: Path) -> Path:
    """Score and loss by level and shots, for each model with its interval; a line marks chance."""
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    keys = sorted((key for key in arms[0].groups if key[0] == "level"), key=_order)
    metrics = [metric for metric in ("score", "loss") if all(metric in arms[0].groups[key] for key in keys)]
    figure, axes = pyplot.subplots(1, len(metrics), figsize=(5.5 * len(metrics), 3.8), squeeze=False)
    width = 0.8 / len(arms)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for number, arm in enumerate(arms):
            estimates = [arm.groups[key][metric].estimate() for key in keys]
            places = np.arange(len(keys)) + (number - (len(arms) - 1) / 2) * width
            heights = [each.value for each in estimates]
            if metric == "score":
                axis.bar(places, heights, width, yerr=_errors(estimates), capsize=2, label=arm.label, alpha=0.8)
            else:  # far from 0, where bars would all look alike
                axis.errorbar(places, heights, yerr=_errors(estimates), fmt="o", capsize=2, label=arm.label)
        for place, key in enumerate(keys):
            chance = arms[0].groups[key][metric].chance
            if chance is not None:
                axis.hlines(chance, place - 0.45, place + 0.45, colors="black", linestyles="dashed", linewidth=1)
        names = [f"{key[3]}\n{_shots_name(key[4])}" for key in keys]
        axis.set_xticks(range(len(keys)), names, fontsize=7, rotation=0 if len(keys) < 5 else 45)
        axis.set_ylabel(_TITLES[metric] + (", dashed: chance" if metric == "score" else ""))
    axes[0, 0].legend(fontsize=7)
    return _save(figure, path)


def _plot_gains(gains: Sequence[Difference], path: Path) -> Path:
    """Each model's gain in score from tuning, by level and shots."""
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    shown = [each for each in gains if each.key[0] == "level" and each.metric == "score"]
    keys = sorted({each.key for each in shown}, key=_order)
    names = list(dict.fromkeys(each.name for each in shown))
    figure, axis = pyplot.subplots(figsize=(6.5, 1.2 + 0.35 * len(shown)))
    for number, name in enumerate(names):
        by_key = {each.key: each.estimate for each in shown if each.name == name}
        estimates = [by_key[key] for key in keys]
        places = np.arange(len(keys)) + (number - (len(names) - 1) / 2) * 0.8 / len(names)
        values = [each.value for each in estimates]
        axis.errorbar(values, places, xerr=_errors(estimates), fmt="o", capsize=3, label=name)
    axis.axvline(0.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(keys)), [f"{key[3]}, {_shots_name(key[4])}" for key in keys], fontsize=8)
    axis.set_ylim(len(keys) - 0.4, -0.6)
    axis.set_xlabel("gain in score")
    axis.legend(fontsize=8)
    return _save(figure, path)


def _errors(estimates: Sequence[Estimate]) -> np.ndarray:
    """Distances to both ends (2, N); with few examples a percentile interval may exclude the value itself."""
    return np.array([[max(0.0, e.value - e.low), max(0.0, e.high - e.value)] for e in estimates]).T


def _save(figure: object, path: Path) -> Path:
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return path
