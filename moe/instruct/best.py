"""The best checkpoint of a run, by a metric on held-out examples, in `<run>/best`."""

from __future__ import annotations

from pathlib import Path

from moe.checkpoint import CheckpointSaver, TrainState, list_checkpoints
from moe.checkpoint.folders import remove_checkpoint, step_folder
from moe.distributed.world import World
from moe.training.metrics import Validation, read_metrics

_DOMAIN = "all"
_SIGN = {"accuracy": 1.0, "cross_entropy": -1.0}  # larger is better after applying the sign


class BestCheckpoint:
    """Saves the weights whenever a validation beats all earlier ones; on a tie the earlier stays.

    The best before a resume is read from metrics.jsonl, so a resumed run keeps what an uninterrupted one would. saver:
    writes weights only into the folder of the best, keeping one. All ranks must call.
    """

    def __init__(self, saver: CheckpointSaver, metric: str, metrics: Path, state: TrainState, world: World) -> None:
        self._saver = saver
        self._metric = metric
        self._world = world
        found: tuple[int, float] | None = world.on_first(lambda: self._before(metrics, state.step))
        self.step: int | None = None if found is None else found[0]
        self.value: float | None = None if found is None else found[1]  # of the metric, unsigned

    @property
    def folder(self) -> Path:
        return self._saver.folder

    def offer(self, validation: Validation, state: TrainState) -> None:
        """Save the model if it is better than all before it."""
        value = validation[_DOMAIN][self._metric]
        if self.value is not None and not self._better(value, self.value):
            return
        self._saver.save(state)
        self.step, self.value = state.step, value

    def _better(self, a: float, b: float) -> bool:
        return _SIGN[self._metric] * a > _SIGN[self._metric] * b

    def _before(self, metrics: Path, step: int) -> tuple[int, float] | None:
        """The best validation up to `step` whose weights exist; all other weights are removed.

        Weights of later steps are removed too, since those steps will be repeated.
        """
        best: tuple[int, float] | None = None
        for record in read_metrics(metrics) if metrics.exists() else []:
            if "validation" in record and record["step"] <= step:
                value = record["validation"][_DOMAIN][self._metric]
                if best is None or self._better(value, best[1]):
                    best = (record["step"], value)
        kept = None if best is None else step_folder(self.folder, best[0])
        for path in list_checkpoints(self.folder):
            if path != kept:
                remove_checkpoint(path)
        return best if kept is not None and kept.is_dir() else None
