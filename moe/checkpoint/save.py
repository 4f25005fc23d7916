"""Writing a checkpoint, at once or in the background, by one process or by many together."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import nn

from moe.checkpoint.agreement import agreement, gather
from moe.checkpoint.folders import (
    CHECKSUMS,
    expired_checkpoints,
    flush_to_disk,
    list_checkpoints,
    partial_folder,
    publish,
    remove_checkpoint,
    remove_leftovers,
    sha256,
    step_folder,
)
from moe.checkpoint.state import Snapshot, TrainState, copy_to_host, refuse_non_finite, take_snapshot
from moe.checkpoint.storage import compare_with_disk, files_of_rank, write_tensors
from moe.data.tokenizer import Tokenizer
from moe.distributed.world import World


def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: TrainState,
    config_yaml: str,
    tokenizer: Tokenizer,
    keep_last: int,
    keep_every: int | None = None,
    world: World | None = None,
) -> Path:
    """Write `folder`/step_<step>, make it the latest and delete older ones. Returns its path.

    optimizer: `None` writes only the weights, to start another run from.
    keep_last: how many of the newest to keep; keep_every: those whose step is a multiple of it are kept for good.
    world: the ranks that share the model, all of which must call; each writes its part.
    Raises, on all ranks alike, DivergedError if a tensor is not finite and OSError if writing fails; earlier
    checkpoints survive both.
    """
    snapshot = take_snapshot(model, optimizer, state, config_yaml=config_yaml, tokenizer=tokenizer)
    return _write(folder, snapshot, keep_last, keep_every, world)


class CheckpointSaver:
    """Saves the checkpoints of one run; with `in_background`, during training, from a copy in host memory.

    Then `save` returns once the copy is made, and training may change the weights. The next `save`, `wait` and leaving
    the `with` block wait until the checkpoint is complete and raise its errors. One copy of this rank's tensors stays
    in host memory. Every rank of `world` must create a saver and call it at the same steps; its own process group
    keeps its messages apart from those of training.
    Other arguments and errors are those of `save_checkpoint`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        config_yaml: str,
        tokenizer: Tokenizer,
        keep_last: int,
        keep_every: int | None = None,
        world: World | None = None,
        in_background: bool = False,
    ) -> None:
        _require_policy(keep_last, keep_every)
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self.config_yaml = config_yaml
        self.tokenizer = tokenizer
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.world = world
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[Path] | None = None
        self._copy: Snapshot | None = None
        self._own_group: dist.ProcessGroup | None = None
        if in_background:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
            if world is not None and world.group is not None:
                self._own_group = dist.new_group(
                    dist.get_process_group_ranks(world.group),
                    backend="gloo",
                    timeout=timedelta(seconds=world.timeout_seconds),
                )
                self.world = world._replace(group=self._own_group, device=torch.device("cpu"))

    def save(self, state: TrainState) -> None:
        """Save the model as it is now, after waiting for any earlier save."""
        self.wait()
        snapshot = take_snapshot(
            self.model, self.optimizer, state, config_yaml=self.config_yaml, tokenizer=self.tokenizer
        )
        if self._thread is None:
            _write(self.folder, snapshot, self.keep_last, self.keep_every, self.world)
            return
        self._copy = copy_to_host(snapshot, self._copy)
        self._writing = self._thread.submit(
            _write, self.folder, self._copy, self.keep_last, self.keep_every, self.world
        )

    def wait(self) -> None:
        """Return once the last save is complete. Raises its error, once."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Wait, then free the copy, the thread and the process group. Do not use the saver afterwards."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            if self._own_group is not None:
                dist.destroy_process_group(self._own_group)
            self._copy = self._own_group = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except (OSError, ValueError, RuntimeError) as failure:
            if error is None:
                raise
            error.add_note(f"and the last checkpoint failed: {failure}")  # what stopped the run comes first


def _write(
    folder: Path, snapshot: Snapshot, keep_last: int, keep_every: int | None, world: World | None = None
) -> Path:
    _require_policy(keep_last, keep_every)
    rank, group = (0, None) if world is None else (world.rank, world.group)
    with agreement(group):
        refuse_non_finite(snapshot, folder)
    final, partial = step_folder(folder, snapshot.step), partial_folder(folder, snapshot.step)
    try:
        with agreement(group):
            if rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(folder)
                partial.mkdir()
        with agreement(group):
            _require_visible(partial)
        with agreement(group):
            write_tensors(partial, snapshot.tensors, group)
        with agreement(group):
            own = files_of_rank(partial, rank)
            compare_with_disk(own, snapshot.tensors)
            checksums = _finish_files(own)
        parts = gather(checksums, group)
        with agreement(group):
            if rank == 0:
                _write_texts(partial, snapshot, {name: digest for part in parts for name, digest in part.items()})
                publish(partial, final)
    except OSError as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"checkpoint {final} could not be written ({error}); earlier checkpoints in {folder} are untouched. "
            f"Free space or choose another run_dir, then start the same command again"
        ) from error
    with agreement(group):
        if rank == 0:
            _delete_old(folder, keep_last, keep_every)
    return final


def _delete_old(folder: Path, keep_last: int, keep_every: int | None) -> None:
    try:
        remove_leftovers(folder)  # a checkpoint that the new one has replaced
        for old in expired_checkpoints(folder, keep_last=keep_last, keep_every=keep_every):
            remove_checkpoint(old)
    except OSError as error:
        raise OSError(
            f"{list_checkpoints(folder)[-1]} is saved, but older checkpoints cannot be deleted ({error}): see to what "
            f"keeps them, then start the same command again"
        ) from error


def _write_texts(partial: Path, snapshot: Snapshot, checksums: dict[str, str]) -> None:
    """Write everything that is not a tensor, and the checksums of all files."""
    (partial / "config.yaml").write_text(snapshot.config_yaml)
    (partial / "state.json").write_text(snapshot.state_json)
    tokenizer_files = snapshot.tokenizer.save(partial)
    checksums |= _finish_files([partial / "config.yaml", partial / "state.json", *tokenizer_files])
    (partial / CHECKSUMS).write_text(json.dumps(dict(sorted(checksums.items())), indent=1))
    flush_to_disk(partial / CHECKSUMS)
    flush_to_disk(partial)


def _finish_files(files: list[Path]) -> dict[str, str]:
    """Flush files to disk; returns their checksums by name."""
    for file in files:
        flush_to_disk(file)
    return {file.name: sha256(file) for file in files}


def _require_visible(partial: Path) -> None:
    if not partial.is_dir():
        raise OSError(
            f"{partial}, which rank 0 has made, is not there: all ranks write into one folder, so run_dir must lie on "
            f"a file system that all nodes share"
        )


def _require_policy(keep_last: int, keep_every: int | None) -> None:
    if keep_last < 1:
        raise ValueError(f"keep_last ({keep_last}) must be at least 1: a run resumes from the newest checkpoint")
    if keep_every is not None and keep_every < 1:
        raise ValueError(f"keep_every ({keep_every}) must be at least 1 step, or None to keep none for good")
