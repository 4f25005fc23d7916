"""From study.json and the run folders to records. Reads files only; computes nothing that a run did not write.

<run>/results.json     from `moe train`: the test split's domains, cost, tokens per expert
<run>/diverged.json    in its place, if training diverged and gave up
<run>/corpus.json      which text and tokenizer: all runs must agree
<run>/documents.json   optional: {"test": {<domain>: {"nats": [...], "num_tokens": [...]}}}
<run>/<evaluation>     named in study.json: from `moe perplexity` ("domains", each optionally with "documents"
                       as above) or `moe eval` ("tasks")
"""

from __future__ import annotations

import json
import math
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from moe.scaling.report.records import DENSE, IN_DOMAIN, OUT_OF_DOMAIN, TASK, Documents, Found, Metric, Record

MANIFEST_FORMAT = 1
PARAMETER_BYTES = 4  # weights are stored in float32
SAME_LOSS = 1e-5  # relative: the same sum of float32 losses in another order
LARGEST_LOSS = math.log(sys.float_info.max)  # nats per token
_HIGHER = ("acc", "acc_norm", "accuracy", "exact_match", "em", "f1")
_LOWER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


class Incomplete(ValueError):
    """A run that is missing or incomplete."""


def study(folder: Path) -> Found:
    """Read the study in `folder`. Raises ValueError if nothing in it is complete or the texts differ."""
    manifest = _json(folder / "study.json")
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise ValueError(f"{folder / 'study.json'} is not the study.json of this version: run `moe scale run` again")
    planned = [run for run in manifest["runs"] if run["stage"] == "main"]
    if not planned:
        raise ValueError(f"the sweep of {folder} has not chosen yet: `moe scale run` goes on with it")
    records, missing = [], {}
    metrics: dict[str, Metric] = {}
    identities: dict[str, str] = {}
    for run in planned:
        try:
            record, measured = _record(folder, manifest, run, identities)
        except Incomplete as error:
            missing[run["name"]] = str(error)
            continue
        records.append(record)
        metrics |= {metric.key: metric for metric in measured}
    if not records:
        raise ValueError(f"no run of {folder} is complete: {next(iter(missing.values()))}")
    order = {IN_DOMAIN: 0, OUT_OF_DOMAIN: 1, TASK: 2}
    return Found(
        name=manifest["name"],
        design=manifest["design"],
        statement=manifest["statement"],
        learning_rate_rule=manifest["learning_rate_rule"],
        metrics=tuple(sorted(metrics.values(), key=lambda m: (order[m.group], not m.key.endswith("/all"), m.key))),
        records=tuple(records),
        missing=missing,
        pairs=tuple(manifest["pairs"]),
        tolerance=manifest["tolerance"],
        sweep=manifest["sweep"],
        corpus=manifest["corpus"],
    )


def published() -> Found:
    """The paper's own points (Artetxe et al. 2021), each with its confidence: recalled scores are no thresholds."""
    text = resources.files("moe.scaling").joinpath("published_points.json").read_text(encoding="utf-8")
    tree = json.loads(text)
    tasks = {key: Metric(f"task/{key}", TASK, lower_is_better=False) for key in tree["tasks"]}
    records, missing = [], {}
    for model in tree["models"]:
        if model["scores"] is None:
            missing[model["name"]] = "its scores are not known"
            continue
        records.append(
            Record(
                name=model["name"],
                size=model["twin"],
                arm=DENSE if model["num_experts"] is None else f"{model['num_experts']}e",
                num_experts=model["num_experts"],
                tokens=tree["tokens"],
                seed=1,
                costs={"flops": model["zettaflops"] * 1e21},
                metrics={tasks[key].key: score for key, score in model["scores"].items()},
                facts={"total_params": model["total_params"], "confidence": model["confidence"]},
            )
        )
    return Found(
        name=tree["name"],
        design="frontier",
        statement=tree["statement"],
        learning_rate_rule=tree["learning_rate_rule"],
        metrics=tuple(tasks.values()),
        records=tuple(records),
        missing=missing,
        notes=tuple(tree["notes"]),
    )


def read_starts(folder: Path, name: str) -> list[dict[str, Any]]:
    """The entries of started/<name>.json: each start of a run, with its commit. Empty if it was never recorded.

    Raises ValueError if the file is damaged: a run whose commit is lost is still a run, so it is not left out.
    """
    path = folder / "started" / f"{name}.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError:
        entries = None
    if not isinstance(entries, list) or not all(map(_is_start, entries)):
        raise ValueError(
            f"{path} is damaged or no list of starts; it says which commit computed the run, and nothing else depends "
            f"on it: restore it, or delete it, and the report will say that the commit is not known"
        )
    return entries


def _record(
    folder: Path, manifest: dict[str, Any], run: dict[str, Any], identities: dict[str, str]
) -> tuple[Record, list[Metric]]:
    run_dir = folder / run["run_dir"]
    if not (run_dir / "results.json").exists() and (run_dir / "diverged.json").exists():
        raise Incomplete(f"{run_dir} diverged and gave up: {_complete(run_dir / 'diverged.json', 'reason')['reason']}")
    results = _complete(run_dir / "results.json", "splits")
    _require_same_text(run_dir, identities)
    test = results["splits"].get("test")
    if not test or not test["domains"]:
        raise Incomplete(f"{run_dir / 'results.json'} has no domain of the test split: there is nothing to compare")
    values, measured = _losses(test["domains"], "test", IN_DOMAIN)
    documents = _documents(run_dir, values)
    for name in manifest["evaluations"]:
        found = _complete(run_dir / name, None)
        if "domains" in found:
            more = _of_domains(found, documents, name, identities)
        elif "tasks" in found:
            more = _of_tasks(found, name, identities)
        else:
            raise ValueError(f"{run_dir / name} has neither 'domains' nor 'tasks': it is no evaluation that is known")
        twice = sorted(values.keys() & more[0].keys())
        if twice:
            raise ValueError(
                f"{run_dir / name} measures {twice[0]}, as the test split or another evaluation does: leave "
                f"one of them out of evaluations, or give text another file name, as far/results.json"
            )
        values |= more[0]
        measured += more[1]
    bad = sorted(key for key, value in values.items() if not abs(value) < _bound(key))  # NaN fails every comparison
    if bad:
        raise Incomplete(f"{run_dir}: {', '.join(bad)} or the perplexity of it is not finite: the run diverged")
    costs = {
        "flops": run["flops_per_token"] * results["tokens"],
        "seconds": results["seconds"],
        "peak_memory_bytes": results["peak_memory_bytes"],
        "parameter_bytes": results["total_params"] * PARAMETER_BYTES,
    }
    facts = {key: run[key] for key in ("d_model", "num_layers", "d_ff", "expert_d_ff", "num_steps", "optim", "run_dir")}
    facts |= {key: results.get(key) for key in ("total_params", "active_params", "tokens_per_second", "num_threads")}
    facts |= _provenance(folder, run["name"])
    record = Record(
        name=run["name"],
        size=run["size"],
        arm=run["arm"],
        num_experts=run["num_experts"],
        tokens=run["tokens"],
        seed=run["seed"],
        costs={key: float(value) for key, value in costs.items()},
        metrics=values,
        facts=facts,
        documents=documents,
        tokens_per_expert=tuple(tuple(layer) for layer in test.get("tokens_per_expert") or ()),
    )
    return record, measured


def _losses(domains: dict[str, Any], prefix: str, group: str) -> tuple[dict[str, float], list[Metric]]:
    """Nats per token of each domain and overall: over all tokens in domain, each domain counting once out of domain."""
    values = {f"{prefix}/{name}": _nats(figures) for name, figures in domains.items()}
    weights = [figures["num_tokens"] if group == IN_DOMAIN else 1 for figures in domains.values()]
    total = sum(weight * value for weight, value in zip(weights, values.values(), strict=True)) / sum(weights)
    values[f"{prefix}/all"] = total
    return values, [Metric(key, group, lower_is_better=True) for key in values]


def _nats(figures: dict[str, Any]) -> float:
    """Nats per token of a domain; NaN if it was not finite, which is null in JSON."""
    value = figures["cross_entropy"]
    return math.nan if value is None else float(value)


def _bound(key: str) -> float:
    """An upper bound on reportable values: for a loss, its perplexity must fit in a float."""
    return math.inf if key.startswith("task/") else LARGEST_LOSS


def _of_domains(
    found: dict[str, Any], documents: dict[str, Documents], name: str, identities: dict[str, str]
) -> tuple[dict[str, float], list[Metric]]:
    """An evaluation on text outside the training domains; all runs must use the same protocol."""
    prefix = name.split("/")[0].removesuffix(".json")
    sizes = {domain: figures["num_tokens"] for domain, figures in found["domains"].items()}  # different for other text
    protocol = [found.get("protocol"), found.get("tokenizer"), sizes]
    _require_alike(identities, name, protocol, found, "protocol, tokenizer or list of domains, or other text in them,")
    outside = {domain: figures for domain, figures in found["domains"].items() if not figures.get("in_domain")}
    if not outside:
        raise ValueError(f"{name} of {found.get('model')} has no domain outside of training's")
    for domain, figures in outside.items():
        if figures.get("documents"):
            documents[f"{prefix}/{domain}"] = _as_documents(figures["documents"], domain, _nats(figures))
    return _losses(outside, prefix, OUT_OF_DOMAIN)


def _of_tasks(found: dict[str, Any], name: str, identities: dict[str, str]) -> tuple[dict[str, float], list[Metric]]:
    """Accuracies and perplexities; metrics of unknown direction are left out, since they define no speedup."""
    shots = {task: figures.get("num_fewshot") for task, figures in found["tasks"].items()}
    protocol = [found.get("protocol"), found.get("limit"), shots]
    _require_alike(identities, name, protocol, found, "protocol, limit, list of tasks or number of demonstrations")
    values, measured = {}, []
    for task, figures in found["tasks"].items():
        named = {key: value["value"] for key, value in figures.get("metrics", {}).items()}
        named |= {key: figures[key] for key in ("accuracy", "perplexity") if figures.get(key) is not None}
        for key, value in named.items():
            base = key.split(",")[0]
            if base in (*_HIGHER, *_LOWER):
                values[f"task/{task} {key}"] = float(value)
                measured.append(Metric(f"task/{task} {key}", TASK, lower_is_better=base in _LOWER))
    return values, measured


def _require_alike(identities: dict[str, str], name: str, protocol: Any, found: dict[str, Any], what: str) -> None:
    """An evaluation must be the same for all runs as for the first one read."""
    text = json.dumps(protocol, sort_keys=True)
    if identities.setdefault(name, text) != text:
        raise ValueError(
            f"{name} of {found.get('model')} has another {what} than those of other runs; delete it and run "
            f"`moe scale run` again"
        )


def _documents(run_dir: Path, values: dict[str, float]) -> dict[str, Documents]:
    """Documents of the test split: for each domain, and concatenated for all."""
    path = run_dir / "documents.json"
    if not path.exists():
        return {}
    found = {}
    for name, tree in sorted(_complete(path, "test")["test"].items()):
        if f"test/{name}" not in values:
            raise ValueError(f"{path} has the domain {name}, which {run_dir / 'results.json'} does not")
        found[f"test/{name}"] = _as_documents(tree, f"{path}: {name}", values[f"test/{name}"])
    if len(found) == sum(key.startswith("test/") and key != "test/all" for key in values):
        nats = tuple(value for each in found.values() for value in each.nats)
        found["test/all"] = Documents(nats, tuple(count for each in found.values() for count in each.num_tokens))
    return found


def _as_documents(tree: dict[str, Any], name: str, cross_entropy: float) -> Documents:
    nats, tokens = tree["nats"], tree["num_tokens"]
    if len(nats) != len(tokens):
        raise ValueError(f"{name} has {len(nats)} sums of nats and {len(tokens)} counts of tokens: they must match")
    total = math.fsum(nats) / sum(tokens)
    if abs(total - cross_entropy) > SAME_LOSS * cross_entropy:
        raise ValueError(f"the documents of {name} give {total} nats per token, and the domain has {cross_entropy}")
    return Documents(tuple(map(float, nats)), tuple(map(int, tokens)))


def _require_same_text(run_dir: Path, identities: dict[str, str]) -> None:
    text = json.dumps(_complete(run_dir / "corpus.json", None), sort_keys=True)
    if identities.setdefault("corpus.json", text) != text:
        raise ValueError(
            f"{run_dir} was trained or tested on other text, or with another tokenizer, than the runs before it: their "
            f"losses cannot be compared; delete it and run `moe scale run` again"
        )


def _provenance(folder: Path, name: str) -> dict[str, Any]:
    """The commits that computed a run, several if it resumed after a change, and whether files were modified.

    Whether they were is None if unknown.
    """
    entries = read_starts(folder, name)
    commits = list(dict.fromkeys(entry["commit"] or f"version {entry.get('version')}" for entry in entries))
    changes = [entry["changed"] for entry in entries]
    unknown = not changes or None in changes  # unknown for an installed package
    return {"commits": commits, "changed_since_commit": True if any(changes) else None if unknown else False}


def _is_start(entry: Any) -> bool:
    return isinstance(entry, dict) and {"commit", "changed"} <= entry.keys()


def _complete(path: Path, field: str | None) -> Any:
    try:
        tree = _json(path)
    except FileNotFoundError as error:
        raise Incomplete(f"{path} is missing: the run is not complete") from error
    except ValueError as error:
        raise Incomplete(str(error)) from error
    if field is not None and (not isinstance(tree, dict) or field not in tree):
        raise Incomplete(f"{path} has no field {field!r}: it is not what this version writes")
    return tree


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is half-written or damaged: {error}") from error
