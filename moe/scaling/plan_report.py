"""A plan as tables for people and as JSON for programs, with the same figures."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from moe.config import RunConfig
from moe.scaling.communication import plan_exchange
from moe.scaling.flops import executed_flops, paper_training_flops, training_flops
from moe.scaling.params import component_params, count_params
from moe.scaling.planner import LayoutPlan, Plan, make_load, mfu, with_layout
from moe.scaling.step_time import rows_of_a_token

_READ_BY_PLAN_ALONE = ("cluster", "plan")


def commands(plan: Plan, overrides: Sequence[str]) -> dict[str, str]:
    """Commands to train and to dry-run the best layout for the given `overrides`.

    Empty without a best layout. Offloading is not simulated, so a layout that offloads has no dry run.
    """
    best, cluster = plan.best, plan.cluster
    if best is None:
        return {}
    chosen = {
        *(override.split("=")[0] for override in best.layout.overrides()),
        "train.batch_tokens",
        "train.num_steps",
    }
    given = [override for override in overrides if not _is_replaced(override, chosen)]
    train = plan.config.train
    run = [
        *given,
        f"train.batch_tokens={train.batch_tokens}",
        f"train.num_steps={train.num_steps}",
        *best.layout.overrides(),
    ]
    found = {"train": shlex.join(["python", "train.py", *run])}
    if cluster.num_nodes > 1:
        options = ["--slurm", f"--nodes={cluster.num_nodes}", f"--gpus-per-node={cluster.gpus_per_node}"]
        found["train"] = shlex.join(["moe", "launch", *options, *run])
    elif cluster.num_gpus > 1:
        found["train"] = shlex.join(["torchrun", f"--nproc-per-node={cluster.num_gpus}", "train.py", *run])
    if cluster.num_gpus > 1 and not best.layout.cpu_offload:
        dry_run = [*run, "parallel.dry_run=true", f"parallel.ranks={cluster.num_gpus}"]
        if not any(override.lstrip("+").startswith("model.vocab_size=") for override in given):
            dry_run.append(f"model.vocab_size={plan.config.model.vocab_size}")
        found["dry_run"] = shlex.join(["python", "train.py", *dry_run])
    return found


def to_json(plan: Plan, overrides: Sequence[str]) -> str:
    """The whole plan as one JSON object."""
    run = plan.config
    fields: dict[str, Any] = {
        "model": _name(run),
        "cluster": asdict(plan.cluster),
        "seq_len": run.seq_len,
        "batch_tokens": run.train.batch_tokens,
        "num_steps": run.train.num_steps,
        "tokens": run.train.batch_tokens * run.train.num_steps,
        "params": count_params(run.model)._asdict() | {"components": component_params(run.model)._asdict()},
        "flops_per_token": _flops(plan),
        "training_flops": training_flops(run.model, run.seq_len).total * run.train.batch_tokens * run.train.num_steps,
        "fits": plan.best is not None,
        "layouts": [layout_fields(plan, layout) for layout in plan.layouts],
        "refused": plan.refused,
        "sensitivity": [asdict(outcome) for outcome in plan.sensitivity],
        "rows_limit": plan.rows_limit,
        "link_bytes": {kind: links._asdict() for kind, links in plan.links.items()},
        "advice": plan.advice,
        "commands": commands(plan, overrides),
    }
    return json.dumps(fields, indent=1)


def layout_fields(plan: Plan, layout: LayoutPlan) -> dict[str, Any]:
    """One layout; times only if it fits."""
    fields: dict[str, Any] = asdict(layout.layout) | {
        "fits": layout.fits,
        "missing_bytes": layout.missing_bytes,
        "missing_host_bytes": layout.missing_host_bytes,
        "memory": layout.memory._asdict(),
    }
    if layout.step is None:
        return fields
    seconds, train = layout.seconds, plan.config.train
    return fields | {
        "step_seconds": seconds,
        "step_parts": layout.step.parts,
        "bottleneck": layout.step.bottleneck,
        "tokens_per_second": train.batch_tokens / seconds,
        "mfu": mfu(plan.config, plan.cluster, layout),
        "days": seconds * train.num_steps / 86400,
        "gpu_hours": seconds * train.num_steps / 3600 * plan.cluster.num_gpus,
    }


def print_plan(plan: Plan, overrides: Sequence[str], console: Console, *, show: int) -> None:
    """Print the tables and the commands."""
    run, cluster = plan.config, plan.cluster
    params, tokens = count_params(run.model), run.train.batch_tokens * run.train.num_steps
    console.print(
        f"[bold]{_name(run)}[/]: {_short(params.total)} parameters, {_short(params.active)} active; "
        f"{_short(tokens)} tokens in {run.train.num_steps:,} steps of {run.train.batch_tokens:,}; "
        f"{training_flops(run.model, run.seq_len).total * tokens:.3g} useful FLOPs"
    )
    console.print(
        f"[bold]{cluster.name}[/]: {cluster.num_gpus} devices in {cluster.num_nodes} nodes, "
        f"{cluster.usable_bytes / 2**30:.1f} of {cluster.memory_gib:g} GiB usable"
    )
    console.print(_parts_table(plan))
    if plan.layouts:
        console.print(_layout_table(plan, show))
    for reason in plan.refused[:3]:
        console.print(f"cannot run: {reason}")
    if plan.best is None:
        _print_shortage(plan, console)
        return
    _print_best(plan, plan.best, console)
    for name, command in commands(plan, overrides).items():
        console.print(f"\n[bold]{name.replace('_', ' ')}[/]")
        console.print(command, soft_wrap=True, highlight=False, markup=False)


def _print_shortage(plan: Plan, console: Console) -> None:
    if plan.layouts:
        nearest = plan.layouts[0]
        places = [
            f"{missing / 2**30:.1f} GiB of {where}"
            for missing, where in ((nearest.missing_bytes, "a device"), (nearest.missing_host_bytes, "a node's host"))
            if missing
        ]
        console.print(f"\n[bold]Nothing fits.[/] The layout that misses least is short of {' and '.join(places)}.")
    else:
        console.print("\n[bold]No layout can run[/] on all devices.")
    for change in plan.advice:
        console.print(f"- {change}")


def _print_best(plan: Plan, best: LayoutPlan, console: Console) -> None:
    fields = layout_fields(plan, best)
    console.print(
        f"best: {fields['step_seconds']:.3g} s a step, {fields['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {fields['mfu']:.1%}, {fields['days']:.3g} days, {fields['gpu_hours']:,.0f} GPU-hours; "
        f"bound by {fields['bottleneck']}"
    )
    table = Table("seconds of a step", *fields["step_parts"], title=None)
    table.add_row("best", *(f"{seconds:.3g}" for seconds in fields["step_parts"].values()))
    console.print(table)
    table = Table("GiB a rank sends in a step", "to itself", "within nodes", "across nodes")
    for kind, links in plan.links.items():
        table.add_row(kind.replace("_", "-"), *(f"{part / 2**30:.3g}" for part in links))
    console.print(table)
    table = Table("load", "rows of the fullest rank", "peak GiB", "fits", "s a step", "bound by")
    for outcome in plan.sensitivity:
        table.add_row(
            outcome.load,
            f"{outcome.rows:,}",
            f"{outcome.peak_bytes / 2**30:.1f}",
            "yes" if outcome.fits else "no",
            f"{outcome.seconds:.3g}",
            outcome.bottleneck,
        )
    console.print(table)
    if plan.rows_limit is not None:
        console.print(f"parallel.rows_limit={plan.rows_limit} keeps it within memory whatever the routing does")


def _parts_table(plan: Plan) -> Table:
    """Parameters and FLOPs by component."""
    params, flops = component_params(plan.config.model)._asdict(), _flops(plan)
    table = Table("component", "parameters", "useful GFLOPs a token", "executed")
    executed = flops["executed"] or dict.fromkeys(flops["useful"], 0.0)
    rows = {
        "embedding": ("embedding", ()),
        "attention": ("attention", ("attention_projections", "attention_scores")),
        "norms": ("norms", ()),
        "dense FFN": ("dense_ffn", ("dense_ffn",)),
        "experts": ("experts", ("experts",)),
        "shared experts": ("shared_experts", ("shared_experts",)),
        "routers": ("routers", ("router",)),
        "permutation": (None, ("permutation",)),
        "head": ("head", ("head",)),
    }
    for title, (param, names) in rows.items():
        count = 0 if param is None else params[param]
        useful, done = (sum(kind[name] for name in names) / 1e9 for kind in (flops["useful"], executed))
        if count or useful:
            table.add_row(title, _short(count), f"{useful:.4g}", f"{done:.4g}")
    table.add_row("all", _short(sum(params.values())), f"{flops['useful_total'] / 1e9:.4g}", _total(flops))
    return table


def _total(flops: dict[str, Any]) -> str:
    return "" if flops["executed_total"] is None else f"{flops['executed_total'] / 1e9:.4g}"


def _layout_table(plan: Plan, show: int) -> Table:
    """The best layout of each mesh, recompute and offload."""
    names = ("copies", "shards", "ep", "recompute", "offload", "precision", "micro-batch")
    table = Table(*names, "weights", "gradients", "optimizer", "activations", "peak GiB", "s a step", "MFU", "bound by")
    seen: set[tuple[object, ...]] = set()
    for entry in plan.layouts:
        layout, memory = entry.layout, entry.memory
        kind = (layout.dp_replicate, layout.ep_size, layout.recompute, layout.cpu_offload)
        if kind in seen or len(seen) == show:
            continue
        seen.add(kind)
        sizes = (memory.param_bytes, memory.gradient_bytes, memory.optimizer_bytes, memory.activation_bytes)
        time = ["", "", f"short of {(entry.missing_bytes + entry.missing_host_bytes) / 2**30:.1f} GiB"]
        if entry.step is not None:
            share = mfu(plan.config, plan.cluster, entry)
            time = [f"{entry.seconds:.3g}", f"{share:.1%}", entry.step.bottleneck]
        table.add_row(
            *(str(size) for size in (layout.dp_replicate, layout.dp_shard, layout.ep_size)),
            *("yes" if flag else "no" for flag in (layout.recompute, layout.cpu_offload)),
            layout.precision,
            f"{layout.micro_batches} x {layout.micro_batch_size}",
            *(f"{size / 2**30:.2f}" for size in sizes),
            f"{memory.peak_bytes / 2**30:.2f}",
            *time,
        )
    return table


def _flops(plan: Plan) -> dict[str, Any]:
    """Training FLOPs per token: `paper` where its formula is defined, `useful`, and `executed` by the best layout."""
    run, best = plan.config, plan.best
    useful = training_flops(run.model, run.seq_len)
    fields: dict[str, Any] = {"useful": useful._asdict(), "useful_total": useful.total}
    for name, recompute in (("paper", True), ("paper_without_recompute", False)):
        try:
            fields[name] = paper_training_flops(run.model, 1, run.seq_len, recompute=recompute)
        except ValueError:  # a shape the formula does not cover
            fields[name] = None
    fields["executed"] = fields["executed_total"] = None
    if best is not None:
        candidate, tokens = with_layout(run, best.layout), best.layout.micro_batch_size * run.seq_len
        load = make_load(candidate, "uniform")
        exchange = None if load is None else plan_exchange(candidate, load, tokens)
        executed = executed_flops(
            run.model,
            run.seq_len,
            recompute=best.layout.recompute,
            rows_per_token=rows_of_a_token(candidate, exchange, tokens),
            head_again=plan.cluster.device == "cuda",
        )
        fields |= {"executed": executed._asdict(), "executed_total": executed.total}
    return fields


def _is_replaced(override: str, chosen: set[str]) -> bool:
    """Whether a command omits an override, because the plan sets it or only a plan reads it."""
    key = override.split("=")[0].lstrip("+")
    return key in chosen or key.split(".")[0] in _READ_BY_PLAN_ALONE


def _name(run: RunConfig) -> str:
    return run.model.name if run.model.moe is None else f"{run.model.name} {run.model.moe.name}"


def _short(count: float) -> str:
    """1234567 as 1.235M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.4g}{letter}"
    return f"{count:,.0f}"
