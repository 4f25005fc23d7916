"""From records to findings: means, speedups, paired differences, fits and expert use, as plain JSON values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np

from moe.scaling.fits import FEWEST, fit_with_intervals
from moe.scaling.report.records import TASK, Cell, Found, Metric, Record, cells, dense_family
from moe.scaling.speedup import Point, Unbracketed, cost_to_reach, curve, interval, speedup

COSTS = {
    "flops": "training FLOPs",
    "seconds": "seconds of training",
    "peak_memory_bytes": "bytes of memory at the peak",
    "parameter_bytes": "bytes of parameters",
}
PERPLEXITY, LOG_PERPLEXITY, PLAIN = "perplexity", "log-perplexity", "as it is"
_SEED = 0
FEWEST_DOCUMENTS = 10  # resampling fewer says nothing about other text: one document has an interval of zero width
Rows = list[dict[str, Any]]


def analyse(found: Found, *, resamples: int = 1000) -> dict[str, Any]:
    """All of report.json."""
    models = cells(found)
    return {
        "name": found.name,
        "design": found.design,
        "statement": found.statement,
        "learning_rate_rule": found.learning_rate_rule,
        "tolerance": found.tolerance,
        "notes": list(found.notes),
        "corpus": found.corpus,
        "sweep": found.sweep,
        "pairs": list(found.pairs),
        "metrics": [metric._asdict() for metric in found.metrics],
        "missing": found.missing,
        "runs": [_run_row(record) for record in found.records],
        "models": [_model_row(cell, found.metrics) for cell in models],
        "speedups": _speedups(models, found.metrics, resamples),
        "curves": _curves(models, found.metrics),
        "pair_differences": _pair_differences(found, models, resamples),
        "fits": _fits(models, found.metrics, resamples),
        "experts": [row for cell in models if not cell.is_dense for row in _experts(cell)],
        "resamples": resamples,
    }


def spaces(metric: Metric) -> dict[str, Callable[[float], float]]:
    """The scales for the paper's interpolation: both, because the paper does not say which it used."""
    if metric.group == TASK:
        return {PLAIN: lambda value: value}
    return {PERPLEXITY: math.exp, LOG_PERPLEXITY: lambda value: value}


def points(family: Sequence[Cell], metric: str, cost: str, scale: Callable[[float], float]) -> list[Point]:
    """Models that have both the metric and the cost, with the metric averaged over seeds."""
    found = []
    for cell in family:
        spent, values = cell.cost(cost), cell.values(metric)
        if spent is not None and values:
            found.append(Point(spent, scale(mean(values)), cell.name))
    return found


def _speedups(models: list[Cell], metrics: Sequence[Metric], resamples: int) -> Rows:
    """For each sparse model: what dense models would have to spend for the same metric, divided by what it spent."""
    rows = []
    for sparse in (cell for cell in models if not cell.is_dense):
        family = dense_family(models, sparse)
        for metric in metrics:
            if not sparse.values(metric.key):
                continue
            for space, scale in spaces(metric).items():
                for cost in COSTS:
                    if sparse.cost(cost) is None:
                        continue
                    row = _speedup_row(sparse, family, metric, cost, space, scale)
                    if cost == "flops" and row["speedup"] is not None:
                        row["over_seeds"] = _over_seeds(sparse, family, metric, scale, resamples)
                        row["over_documents"] = _over_documents(sparse, family, metric, scale, resamples)
                    rows.append(row)
    return rows


def _speedup_row(
    sparse: Cell, family: list[Cell], metric: Metric, cost: str, space: str, scale: Callable[[float], float]
) -> dict[str, Any]:
    own = points([sparse], metric.key, cost, scale)[0]
    reached = cost_to_reach(own.metric, points(family, metric.key, cost, scale), lower_is_better=metric.lower_is_better)
    row: dict[str, Any] = {
        "size": sparse.size,
        "arm": sparse.arm,
        "tokens": sparse.tokens,
        "metric": metric.key,
        "group": metric.group,
        "cost": cost,
        "space": space,
        "value": own.metric,
        "sparse_cost": own.cost,
        "dense_cost": None,
        "speedup": None,
        "between": None,
        "why": None,
        "over_seeds": None,
        "over_documents": None,
    }
    if isinstance(reached, Unbracketed):
        row["why"] = reached.reason
    else:
        row |= {
            "dense_cost": reached.cost,
            "speedup": reached.cost / own.cost,
            "between": [reached.worse, reached.better],
        }
    return row


def _over_seeds(
    sparse: Cell, family: list[Cell], metric: Metric, scale: Callable[[float], float], resamples: int
) -> dict[str, Any]:
    """Percentiles over resampled seeds; twins with the same seeds read the same batches, so they share the draws."""
    generator = np.random.default_rng(_SEED)
    involved = [cell for cell in [*family, sparse] if cell.values(metric.key) and cell.cost("flops") is not None]
    draws = []
    for _ in range(resamples):
        picks: dict[tuple[object, ...], np.ndarray] = {}
        drawn = {}
        for cell in involved:
            values = np.asarray(cell.values(metric.key))
            key = (cell.size, cell.seeds, len(values))
            if key not in picks:
                picks[key] = generator.integers(0, len(values), len(values))
            drawn[cell.name] = scale(float(values[picks[key]].mean()))
        draws.append(_drawn_speedup(sparse, involved, drawn, metric))
    fewest = min(len(cell.values(metric.key)) for cell in involved)
    return {**interval(draws)._asdict(), "kind": "bootstrap over seeds", "fewest_seeds": fewest}


def _over_documents(
    sparse: Cell, family: list[Cell], metric: Metric, scale: Callable[[float], float], resamples: int
) -> dict[str, Any] | None:
    """Percentiles over resampled documents, the same for every model; None without a document table."""
    involved = [cell for cell in [*family, sparse] if cell.values(metric.key) and cell.cost("flops") is not None]
    tables = {cell.name: _document_table(cell, metric.key) for cell in involved}
    if any(table is None for table in tables.values()):
        return None
    known = {name: table for name, table in tables.items() if table is not None}
    tokens = known[sparse.name][1]
    _require_same_documents(metric.key, [table[1] for table in known.values()])
    generator = np.random.default_rng(_SEED)
    draws = []
    for _ in range(resamples):
        rows = generator.integers(0, len(tokens), len(tokens))
        drawn = {name: scale(float(nats[rows].sum() / tokens[rows].sum())) for name, (nats, _) in known.items()}
        draws.append(_drawn_speedup(sparse, involved, drawn, metric))
    return {**interval(draws)._asdict(), "kind": "paired bootstrap over documents", "documents": len(tokens)}


def _drawn_speedup(sparse: Cell, involved: list[Cell], drawn: dict[str, float], metric: Metric) -> float | Unbracketed:
    made = {cell.name: Point(cell.cost("flops") or 0.0, drawn[cell.name], cell.name) for cell in involved}
    dense = [made[cell.name] for cell in involved if cell.is_dense]
    own = made[sparse.name]
    return speedup(own.metric, dense, [own], lower_is_better=metric.lower_is_better)


def _document_table(
    cell: Cell, metric: str, seeds: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Nats per document, averaged over the given seeds or all, and token counts; None if missing or too few."""
    chosen = [record for record in cell.records if seeds is None or record.seed in seeds]
    of_seeds = [record.documents.get(metric) for record in chosen]
    known = [documents for documents in of_seeds if documents is not None]
    if len(known) < len(of_seeds) or min(len(documents.nats) for documents in known) < FEWEST_DOCUMENTS:
        return None
    _require_same_documents(metric, [np.asarray(documents.num_tokens) for documents in known])
    return np.mean([documents.nats for documents in known], axis=0), np.asarray(known[0].num_tokens)


def _require_same_documents(metric: str, counts: Sequence[np.ndarray]) -> None:
    if any(not np.array_equal(each, counts[0]) for each in counts):
        raise ValueError(f"the runs scored different documents of {metric}: a paired bootstrap needs the same ones")


def _curves(models: list[Cell], metrics: Sequence[Metric]) -> Rows:
    """Speedup against dense FLOPs for each sparse arm: the paper's figure 1."""
    rows = []
    arms = sorted({(cell.arm, cell.tokens) for cell in models if not cell.is_dense}, key=lambda arm: (arm[1], arm[0]))
    for arm, tokens in arms:
        sparse = [cell for cell in models if cell.arm == arm and cell.tokens == tokens]
        family = dense_family(models, sparse[0])
        for metric in metrics:
            for space, scale in spaces(metric).items():
                found = curve(
                    points(family, metric.key, "flops", scale),
                    points(sparse, metric.key, "flops", scale),
                    lower_is_better=metric.lower_is_better,
                )
                rows.append({"arm": arm, "tokens": tokens, "metric": metric.key, "space": space, **found._asdict()})
    return rows


def _pair_differences(found: Found, models: list[Cell], resamples: int) -> Rows:
    """Sparse minus dense loss of each pair, over their common seeds, seed by seed and document by document."""
    rows = []
    for pair in found.pairs:
        for sparse in [cell for cell in models if (cell.size, cell.arm) == (pair["size"], pair["sparse"])]:
            twins = [
                cell
                for cell in models
                if (cell.size, cell.arm, cell.tokens) == (sparse.size, pair["dense"], sparse.tokens)
            ]
            for metric in found.metrics if twins else ():
                row = _pair_row(twins[0], sparse, metric, resamples)
                if row is not None:
                    rows.append({"size": sparse.size, "dense": pair["dense"], "sparse": sparse.arm, **row})
    return rows


def _pair_row(dense: Cell, sparse: Cell, metric: Metric, resamples: int) -> dict[str, Any] | None:
    of_dense = {record.seed: record.metrics[metric.key] for record in dense.records if metric.key in record.metrics}
    of_sparse = {record.seed: record.metrics[metric.key] for record in sparse.records if metric.key in record.metrics}
    shared = sorted(of_dense.keys() & of_sparse.keys())
    if not shared:
        return None
    differences = [of_sparse[seed] - of_dense[seed] for seed in shared]
    row: dict[str, Any] = {
        "tokens": sparse.tokens,
        "metric": metric.key,
        "difference": mean(differences),
        "seeds": shared,
        "standard_deviation_over_seeds": stdev(differences) if len(differences) > 1 else None,
        "over_documents": None,
    }
    tables = [_document_table(cell, metric.key, shared) for cell in (dense, sparse)]
    if tables[0] is not None and tables[1] is not None:
        _require_same_documents(metric.key, [tables[0][1], tables[1][1]])
        gaps, tokens = tables[1][0] - tables[0][0], tables[0][1]
        generator = np.random.default_rng(_SEED)
        rows = generator.integers(0, len(tokens), (resamples, len(tokens)))
        draws = gaps[rows].sum(axis=1) / tokens[rows].sum(axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        row["over_documents"] = {
            "low": float(low),
            "high": float(high),
            "kind": "paired bootstrap over documents",
            "documents": len(tokens),
        }
    return row


def _fits(models: list[Cell], metrics: Sequence[Metric], resamples: int) -> Rows:
    """Loss as a power law of FLOPs for each arm and budget with enough points."""
    rows = []
    families: dict[tuple[str, int], list[Cell]] = {}
    for cell in models:
        families.setdefault(("dense" if cell.is_dense else cell.arm, cell.tokens), []).append(cell)
    for (arm, tokens), family in families.items():
        for metric in metrics:
            if metric.group == TASK:
                continue
            pairs = [(cell.cost("flops"), cell.values(metric.key)) for cell in family]
            known = [(cost, values) for cost, values in pairs if cost is not None and values]
            for with_offset in (False, True):
                if len({cost for cost, _ in known}) < FEWEST[with_offset]:
                    continue
                fit = fit_with_intervals(
                    [cost for cost, _ in known],
                    [values for _, values in known],
                    with_offset=with_offset,
                    resamples=resamples if not with_offset else min(resamples, 200),
                )
                rows.append(
                    {
                        "arm": arm,
                        "tokens": tokens,
                        "metric": metric.key,
                        "with_offset": with_offset,
                        "points": len(known),
                        **fit.law._asdict(),
                        "exponent_interval": list(fit.exponent),
                        "offset_interval": list(fit.offset),
                        "resamples": fit.resamples,
                        "fewest_seeds": fit.fewest_seeds,
                    }
                )
    return rows


def _experts(cell: Cell) -> Rows:
    """How evenly each MoE layer's experts were used on the test split, averaged over seeds."""
    layers = [record.tokens_per_expert for record in cell.records if record.tokens_per_expert]
    rows = []
    for layer in range(len(layers[0]) if layers else 0):
        loads = [np.asarray(each[layer], dtype=np.float64) for each in layers]
        shares = [load / load.sum() for load in loads]
        entropies = [-float((s[s > 0] * np.log(s[s > 0])).sum()) / math.log(max(2, len(s))) for s in shares]
        rows.append(
            {
                "size": cell.size,
                "arm": cell.arm,
                "tokens": cell.tokens,
                "sparse_layer": layer,
                "experts": len(loads[0]),
                "dead": mean(float((load == 0).sum()) for load in loads),
                "max_over_mean": mean(float(load.max() / load.mean()) for load in loads),
                "coefficient_of_variation": mean(float(load.std() / load.mean()) for load in loads),
                "entropy_share": mean(entropies),
                "seeds": len(loads),
            }
        )
    return rows


def _run_row(record: Record) -> dict[str, Any]:
    return {
        "run": record.name,
        "size": record.size,
        "arm": record.arm,
        "tokens": record.tokens,
        "seed": record.seed,
        **record.costs,
        "metrics": record.metrics,
        **record.facts,
    }


def _model_row(cell: Cell, metrics: Sequence[Metric]) -> dict[str, Any]:
    figures = {}
    for metric in metrics:
        values = cell.values(metric.key)
        if values:
            spread = stdev(values) if len(values) > 1 else None
            figures[metric.key] = {"mean": mean(values), "standard_deviation": spread, "seeds": len(values)}
    costs = {name: cell.cost(name) for name in COSTS}
    first = cell.records[0].facts
    shape = {key: first.get(key) for key in ("total_params", "active_params", "d_model", "num_layers", "optim")}
    own = {"size": cell.size, "arm": cell.arm, "tokens": cell.tokens, "seeds": list(cell.seeds)}
    return {**own, **costs, **shape, "metrics": figures}
