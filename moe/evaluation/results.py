"""The output of an evaluation: results.json with bootstrap intervals, a table and a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95
_PACKAGES = (
    "moe-lm",
    "torch",
    "lm-eval",
    "datasets",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "sacrebleu",
    "numpy",
)
_CHUNK = 1 << 22  # numbers per block of resampled indices


class Estimate(NamedTuple):
    """A task metric and its confidence interval over items of the same kind."""

    value: float
    low: float  # of the confidence interval
    high: float
    num_samples: int  # scored items
    interval: str = "bootstrap"  # or "wilson", if all items are right or all are wrong


def bootstrap(
    values: Sequence[Any],
    aggregate: Callable[[Sequence[Any]], float] | None = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """`aggregate` of the values, with its percentile interval over `resamples` draws with replacement (Efron 1979).

    values: one per item, in an order that does not depend on how they were computed. aggregate: from values to a
    number; None is the mean. Dependent items (the 3 genders of a sentence) should be one value. If all values are 0 or
    all are 1, every draw is the same and the interval would have no width, so Wilson's (1927) is used.
    """
    if not values:
        raise ValueError("bootstrap needs at least one value: no item was scored")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence ({confidence}) must be between 0 and 1")
    generator = np.random.default_rng(seed)
    if aggregate is None:
        numbers = np.asarray(values, dtype=np.float64)
        if _is_all_or_nothing(numbers):
            return _wilson(float(numbers[0]), len(values), len(values), confidence)
        value, draws = float(numbers.mean()), _means(numbers, resamples, generator)
    else:
        value = float(aggregate(values))
        rows = (generator.integers(0, len(values), len(values)) for _ in range(resamples))
        draws = np.array([float(aggregate([values[i] for i in row])) for row in rows])
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1.0 - tail]) if resamples else (value, value)
    return Estimate(value, float(low), float(high), len(values))


def bootstrap_crossed(
    values: Sequence[Sequence[float]],
    clusters: Sequence[str] | None = None,
    *,
    least: float = 0.0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """The mean of runs over the same items, with its percentile interval over both (Owen 2007).

    values: [run][item], with items in the same order. clusters: one per item; items of a cluster are dependent. A draw
    samples clusters with replacement, the same ones for every run, and runs with replacement, so the interval covers
    other items and other runs; with few runs it is too narrow. A single run of shares in which every item is its own
    cluster reduces to `bootstrap`; values that are all 0 or all 1 get Wilson's interval, as there. least: of a value
    that is at most 1: 0 for a share, -1 for the difference of two, which gets such an interval for -1 too. Raises
    ValueError for no items and for a confidence outside (0, 1).
    """
    if not values or not values[0]:
        raise ValueError("bootstrap needs at least one value: no item was scored")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence ({confidence}) must be between 0 and 1")
    names = list(map(str, range(len(values[0])))) if clusters is None else clusters
    places = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if len(values) == 1 and len(places) == len(names) and least == 0.0:
        return bootstrap(values[0], resamples=resamples, confidence=confidence, seed=seed)
    numbers = np.asarray(values, dtype=np.float64)  # (runs, items)
    num_runs, num_clusters = len(numbers), len(places)
    if _is_all_or_nothing(numbers, least):
        return _wilson(float(numbers[0, 0]), num_clusters, len(names), confidence, least)
    of_item = np.array([places[name] for name in names])
    sums = np.stack([np.bincount(of_item, run, num_clusters) for run in numbers])
    counts = np.bincount(of_item, minlength=num_clusters)
    generator = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        times = np.bincount(generator.integers(0, num_clusters, num_clusters), minlength=num_clusters)
        of_runs = np.bincount(generator.integers(0, num_runs, num_runs), minlength=num_runs)
        draws[i] = of_runs @ sums @ times / (num_runs * (counts @ times))
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return Estimate(float(numbers.mean()), float(low), float(high), len(names))


def _is_all_or_nothing(numbers: np.ndarray, least: float = 0.0) -> bool:
    return any(bool((numbers == value).all()) for value in (least, 0.0, 1.0))


def _wilson(value: float, num_independent: int, num_samples: int, confidence: float, least: float = 0.0) -> Estimate:
    """The interval of values that are all `value`, if a share of at most `other` has other values, from `least` to 1.

    `other` is the upper bound of Wilson's score interval for 0 of n, in its short form. With shares (least 0) the
    result is his interval for 0 of n or n of n.
    """
    z = NormalDist().inv_cdf((1.0 + confidence) / 2)
    other = z**2 / (num_independent + z**2)
    return Estimate(value, value - other * (value - least), value + other * (1.0 - value), num_samples, "wilson")


def _means(numbers: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Means of `resamples` draws; chunks bound the memory and do not change the result."""
    draws = []
    rows = max(1, _CHUNK // len(numbers))
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        draws.append(numbers[generator.integers(0, len(numbers), (count, len(numbers)))].mean(axis=1))
    return np.concatenate(draws) if draws else np.empty(0)


def versions() -> dict[str, str]:
    """Versions of Python and of every package that affects the numbers; packages not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def require_writable(folder: Path) -> None:
    """Raise ValueError if results cannot go into `folder`: it holds some, or a file is in its place. Call it first."""
    if (folder / "results.json").exists():
        raise ValueError(f"{folder} holds the results of an evaluation; choose another --out")
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{folder} cannot be made: {path} is a file; choose another --out")


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write results.json atomically. Raises for numbers that are not finite, since JSON has none."""
    scratch = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def read_results(path: Path) -> dict[str, Any]:
    """Read results.json, with metrics as `Estimate`s. Raises ValueError if the file is not an evaluation's."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if "tasks" not in results:
        raise ValueError(f"{path} has no field 'tasks': it is not the results.json of an evaluation")
    for task in results["tasks"].values():
        task["metrics"] = {name: Estimate(**figures) for name, figures in task["metrics"].items()}
    return results


def table(results: Mapping[str, Any]) -> str:
    """The metrics of `results["tasks"]` in Markdown, one line per task and metric.

    If demonstrations were drawn several times, the papers' interval over draws alone is added. If not all
    demonstrations fit, their mean number follows the requested one: 32 (8.1).
    """
    head = f"{round(100 * results.get('confidence', CONFIDENCE))}% interval"
    over = [task.get("interval_over_demonstrations") for task in results["tasks"].values()]
    extra = ["over demonstrations alone"] if any(over) else []
    names = ["task", "shots", "metric", "value", head, *extra, "items"]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for name, task in results["tasks"].items():
        for metric, figures in task["metrics"].items():
            figure = figures if isinstance(figures, Estimate) else Estimate(**figures)
            interval = f"{_short(figure.low)} to {_short(figure.high)}"
            interval += " (Wilson)" if figure.interval == "wilson" else ""
            cells = [name, _shots(task), metric, _short(figure.value), interval]
            if extra:
                low_high = task.get("interval_over_demonstrations") if metric == "accuracy" else None
                cells.append("" if low_high is None else " to ".join(map(_short, low_high)))
            lines.append(f"| {' | '.join(cells)} | {figure.num_samples} |")
    return "\n".join(lines)


def _shots(task: Mapping[str, Any]) -> str:
    """The requested number of demonstrations, followed by the mean number shown if that is lower."""
    asked, shown = task.get("num_fewshot", ""), task.get("mean_shots")
    return str(asked) if shown is None or shown >= asked else f"{asked} ({shown:.1f})"


def plot(results: Mapping[str, Any], path: Path) -> Path:
    """One bar with its interval per task, one panel per metric; the file's suffix sets the format."""
    import matplotlib  # takes half a second, so only for plots

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels: dict[str, list[tuple[str, Estimate]]] = {}
    for name, task in results["tasks"].items():
        for metric, figures in task["metrics"].items():
            figure = figures if isinstance(figures, Estimate) else Estimate(**figures)
            panels.setdefault(metric, []).append((name, figure))
    if not panels:
        raise ValueError("there is no task to plot")
    heights = [len(entries) for entries in panels.values()]
    figure_, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, 0.3 * sum(heights) + 0.9 * len(panels)), height_ratios=heights, squeeze=False
    )
    for axis, (metric, entries) in zip(axes[:, 0], panels.items(), strict=True):
        values = np.array([estimate.value for _, estimate in entries])
        # with few items a percentile interval may exclude the value itself
        errors = np.array([[max(0.0, e.value - e.low), max(0.0, e.high - e.value)] for _, e in entries]).T
        axis.barh(range(len(entries)), values, xerr=errors, height=0.7, color="tab:blue", alpha=0.7, capsize=2)
        axis.set_yticks(range(len(entries)), [name for name, _ in entries])
        axis.invert_yaxis()
        axis.set_xlabel(metric)
    figure_.tight_layout()
    figure_.savefig(path, dpi=150, metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(figure_)
    return path


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.5g}"
