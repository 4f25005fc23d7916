"""Curves, expert histograms and the experts x steps heat-map, for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from moe.training.metrics import StepMetrics, Validation, stream_metrics


class TensorBoard:
    """Writes event files to `folder`; on a resume, events after `after_step` are marked as overwritten.

    The heat-map needs the run's history, which is read from `metrics_path` on closing.
    """

    def __init__(self, folder: Path, metrics_path: Path, *, after_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=after_step + 1)
        self._metrics_path = metrics_path
        self._last_step = after_step

    def step(self, metrics: StepMetrics) -> None:
        self._last_step = metrics.step
        scalars = {
            "train/loss": metrics.loss,
            "train/cross_entropy": metrics.cross_entropy,
            "train/load_balance_loss": metrics.load_balance_loss,
            "train/router_z_loss": metrics.router_z_loss,
            "train/grad_norm": metrics.grad_norm,
            "train/learning_rate": metrics.learning_rate,
            "train/tokens_per_second": metrics.tokens_per_second,
        }
        for router in metrics.routers:
            for name in ("load_max_over_mean", "load_cv", "entropy", "dropped_fraction", "dead_experts"):
                scalars[f"router_{router.layer}/{name}"] = getattr(router, name)
            if router.tokens_per_expert is not None:
                counts = np.asarray(router.tokens_per_expert)
                self._writer.add_histogram(f"router_{router.layer}/tokens_per_expert", counts, metrics.step)
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, metrics.step)

    def validation(self, step: int, domains: Validation) -> None:
        for domain, figures in domains.items():
            for name in ("cross_entropy", "perplexity", "bits_per_byte"):
                self._writer.add_scalar(f"validation_{domain}/{name}", figures[name], step)

    def message(self, text: str) -> None:
        """Messages are only for the display."""

    def close(self) -> None:
        records = (record for record in stream_metrics(self._metrics_path) if "routers" in record)
        for layer, image in load_heat_maps(records).items():
            self._writer.add_image(f"router_{layer}/experts_x_steps", image, self._last_step)
        self._writer.close()


def load_heat_maps(records: Iterable[dict]) -> dict[int, np.ndarray]:
    """One image in [0, 1] per sparse layer of each expert's share of rows: experts down, recorded steps across.

    The colour is log2(load / mean load) from 1/8 (black) to 8 (white): a balanced expert is mid-grey.
    """
    columns: dict[int, list[np.ndarray]] = {}
    for record in records:
        for router in record["routers"]:
            if router["tokens_per_expert"] is not None:
                counts = np.asarray(router["tokens_per_expert"], dtype=np.float64)
                load = counts / max(counts.mean(), 1e-12)
                columns.setdefault(router["layer"], []).append(np.log2(np.maximum(load, 2.0**-3)))
    images = {}
    for layer, history in columns.items():
        image = np.clip((np.stack(history, axis=1) + 3.0) / 6.0, 0.0, 1.0)  # (E, recorded steps)
        zoom = [max(1, 384 // length) for length in image.shape]  # a few experts or steps would be too small to see
        images[layer] = np.kron(image, np.ones(zoom))[None].astype(np.float32)
    return images
