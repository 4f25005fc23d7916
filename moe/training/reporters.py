"""The reporters of a run: its metrics file, TensorBoard and the display, which also shows warnings."""

from __future__ import annotations

from pathlib import Path

from moe.config import RunConfig
from moe.training.metrics import MetricsFile
from moe.training.progress import Progress
from moe.training.tensorboard import TensorBoard
from moe.training.trainer import Reporter


def open_reporters(config: RunConfig, run_dir: Path, *, after_step: int) -> list[Reporter]:
    """Reporters in `run_dir` that continue after `after_step`. Warns of lost steps and of an over-long warm-up."""
    path = run_dir / "metrics.jsonl"
    metrics = MetricsFile(path, after_step=after_step)
    progress = Progress(first_step=after_step, num_steps=config.train.num_steps)
    if after_step == 0 and metrics.dropped_steps > 0:
        progress.message(
            f"{metrics.dropped_steps} logged steps are lost, and {run_dir} begins again: no checkpoint was saved; "
            f"set train.checkpoint_every"
        )
    warmup, steps = config.optim.warmup_steps, config.train.num_steps
    if warmup >= steps:
        progress.message(
            f"warning: optim.warmup_steps ({warmup}) is not below train.num_steps ({steps}): the learning rate rises "
            f"to the last step, to {steps / warmup:.3g} of optim.lr, and never decays"
        )
    return [metrics, TensorBoard(run_dir / "tensorboard", path, after_step=after_step), progress]
