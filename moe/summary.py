"""The table at the end of a run, made from its results.json alone."""

from __future__ import annotations

import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from moe.compose import from_yaml
from moe.config import RunConfig


def print_summary(run_dir: Path, console: Console | None = None) -> None:
    """Print held-out bits per byte beside the compressors', then sizes, cost and what to try next."""
    console = Console() if console is None else console
    results = json.loads((run_dir / "results.json").read_text())
    config = from_yaml((run_dir / "config.yaml").read_text())
    console.print(_bits_table(results))
    console.print(_facts_table(results))
    console.print(f"\n[bold]{run_dir}[/bold]: config.yaml metrics.jsonl tensorboard/ samples.txt checkpoints/")
    console.print("next:", *(f"\n  {command}" for command in _next_commands(run_dir, config)), highlight=False)


def _bits_table(results: dict) -> Table:
    table = Table(title="bits per byte", title_justify="left", box=box.SIMPLE_HEAD)  # fits 80 columns
    for name in ("split", "domain"):
        table.add_column(name)
    for name in ("model", "gzip -9", "xz -9", "xz given train", "perplexity"):
        table.add_column(name, justify="right")
    for split, score in results["splits"].items():
        for domain, figures in score["domains"].items():
            compressed = results["compressors"][split][domain]
            table.add_row(
                split,
                domain,
                f"[bold]{_shown(figures['bits_per_byte'], 3)}[/bold]",
                *(f"{compressed[name]:.3f}" for name in ("gzip", "xz", "xz_given_train")),
                _shown(figures["perplexity"], 2),
            )
    return table


def _shown(figure: float | None, digits: int) -> str:
    """Format a figure, which is null in results.json if the model diverged and it is beyond a float's range."""
    return "not finite" if figure is None else f"{figure:.{digits}f}"


def _facts_table(results: dict) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(justify="left")
    table.add_column(justify="right")
    rows = [
        ("parameters, total", f"{results['total_params']:,}"),
        ("parameters, active per token", f"{results['active_params']:,}"),
        ("training FLOPs per token", f"{results['training_flops_per_token']:,.0f}"),
        ("training FLOPs", f"{results['training_flops']:.4g}"),
        ("steps (skipped)", f"{results['steps']} ({results['skipped_steps']})"),
        ("training tokens", f"{results['tokens']:,}"),
        ("training seconds", f"{results['seconds']:.0f}"),
        ("tokens per second", f"{results['tokens_per_second']:,.0f}"),
        ("peak memory", f"{results['peak_memory_bytes'] / 2**30:.2f} GiB"),
    ]
    dead = results["splits"]["validation"]["dead_experts"]
    if dead is not None:
        rows.append(("experts without a validation token", str(dead)))
    for row in rows:
        table.add_row(*row)
    return table


def _next_commands(run_dir: Path, config: RunConfig) -> list[str]:
    commands = [f"moe generate {run_dir} --prompt 'def main('", f"tensorboard --logdir {run_dir.parent}"]
    if (config.model.name, config.data.name) != ("tiny", "python"):
        return commands  # another run's twin needs its overrides, which only its author knows
    if config.model.moe is None:
        return [*commands, "python train.py +moe=512e        # the sparse twin of the dense default"]
    return [
        *commands,
        "python train.py                  # the dense twin, same data and steps",
        "python train.py -m +moe=8e,64e   # fewer experts",
    ]
