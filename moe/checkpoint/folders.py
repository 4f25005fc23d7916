"""Checkpoint folders on disk: which exist, whether they are complete, and which to delete."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from moe.checkpoint.agreement import agreement
from moe.distributed.world import World

CHECKSUMS = "checksums.json"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_LEFTOVERS = (".partial_step_*", ".deleted_step_*")


def step_folder(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return folder / f"step_{step:08d}"


def partial_folder(folder: Path, step: int) -> Path:
    """The folder it is written in until it is complete."""
    return folder / f".partial_step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`: itself, or the newest in a run folder or a checkpoints folder."""
    if (path / CHECKSUMS).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if checkpoints := list_checkpoints(folder):
            return checkpoints[-1]
    raise ValueError(
        f"no checkpoint at {path}: give a run folder, its checkpoints folder or one step_* folder inside it"
    )


def verify_checkpoint(path: Path, world: World | None = None) -> None:
    """Raise ValueError naming the first file that is missing, truncated or changed since it was written.

    The list of checksums is checked too.
    The ranks of `world` divide the files among them, and all of them raise.
    """
    rank, size, group = (0, 1, None) if world is None else (world.rank, world.size, world.group)
    with agreement(group):
        for name, expected in sorted(_checksums(path).items())[rank::size]:
            file = path / name
            found = sha256(file) if file.is_file() else "no such file"
            if found != expected:
                raise ValueError(f"{file} is damaged: sha256 {found}, expected {expected}; {_advice(path)}")


def _checksums(path: Path) -> dict[str, str]:
    """SHA-256 by file name. Raises ValueError for a tensor file without one, which would be read all the same."""
    try:
        found = json.loads((path / CHECKSUMS).read_text())
        if not isinstance(found, dict) or not found:
            raise ValueError("it names no files")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path / CHECKSUMS} is missing or damaged ({error}); {_advice(path)}") from error
    strange = sorted({file.name for file in path.glob("*.safetensors")} - found.keys())
    if strange:
        raise ValueError(
            f"{path / strange[0]} is not in {CHECKSUMS}, and its tensors would be read with the others: delete it if "
            f"it was put there later; otherwise, {_advice(path)}"
        )
    return found


def _advice(path: Path) -> str:
    others = [other.name for other in list_checkpoints(path.parent) if other != path]
    return f"delete {path} to resume from {others[-1]}" if others else f"delete {path} to start again"


def expired_checkpoints(folder: Path, *, keep_last: int, keep_every: int | None) -> list[Path]:
    """All but the newest `keep_last` and those whose step is a multiple of `keep_every`."""
    older = list_checkpoints(folder)[:-keep_last]
    return [path for path in older if keep_every is None or int(path.name.removeprefix("step_")) % keep_every != 0]


def remove_leftovers(folder: Path) -> None:
    """Delete what a writer left half-written, half-deleted or replaced."""
    for pattern in _LEFTOVERS:
        for path in folder.glob(pattern):
            _delete(path)


def remove_checkpoint(path: Path) -> None:
    """Rename a checkpoint, then delete it, so that a folder named step_* is complete even if this is interrupted."""
    _delete(_set_aside(path))


def publish(partial: Path, final: Path) -> None:
    """Give a folder whose files are all on disk its final name, and make it the latest.

    A step saved again, after resuming from before it, replaces the earlier one, which `remove_leftovers` deletes.
    """
    if os.path.lexists(final):
        _set_aside(final)
    os.replace(partial, final)
    flush_to_disk(final.parent)
    scratch = final.parent / ".latest.tmp"
    scratch.write_text(final.name + "\n")
    os.replace(scratch, final.parent / "latest")


def _set_aside(path: Path) -> Path:
    dying = path.with_name(f".deleted_{path.name}")
    os.replace(path, dying)
    return dying


def _delete(path: Path) -> None:
    """Delete a folder with its contents, or a file; for a symbolic link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Return once a file's bytes, or a folder's names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
