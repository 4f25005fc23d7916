"""Tensors on disk: torch's distributed checkpoint in safetensors files, each of which says which part it holds."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moe.distributed.mesh import local_tensor

FILE_BYTES = 128 * 2**20  # per file, unless a single tensor is larger


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Write what this rank holds; one rank writes what several hold alike. All of `group` must call."""
    # given a non-tensor this writer silently produces a corrupt file
    wrong = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    assert not wrong, f"only tensors can be saved, not {wrong}"
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    if group is not None:
        dcp.save(tensors, storage_writer=writer, process_group=group)
        return
    with _one_process():
        dcp.save(tensors, storage_writer=writer, no_dist=True, use_collectives=False)


def read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place, for DTensors this rank's part. Nothing is exchanged between ranks."""
    with _one_process():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def files_of_rank(folder: Path, rank: int) -> list[Path]:
    """The files that `write_tensors` made on `rank`; none if other ranks wrote all that it holds."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The full shape of every tensor, from the files' headers."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    entries = metadata.state_dict_metadata.items()
    return {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


def compare_with_disk(files: list[Path], tensors: dict[str, Tensor]) -> None:
    """Read back every tensor of `files`, all written by this rank, and compare it with memory, one at a time."""
    for file in files:
        with safe_open(file, framework="pt") as content:
            for key in content.keys():  # noqa: SIM118 - not a mapping
                if not torch.equal(content.get_tensor(key), local_tensor(tensors[key]).cpu()):
                    raise OSError(f"{key} read back from {file} differs from what was written")


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of the file, from 1, for each tensor: the writer holds a whole file in memory beside the tensors.

    All ranks use rank 0's answer; its shards are the largest.
    """
    files, number, size = {}, 1, 0
    for key, tensor in tensors.items():
        num_bytes = local_tensor(tensor).nbytes
        if size and size + num_bytes > FILE_BYTES:
            number, size = number + 1, 0
        files[key] = number
        size += num_bytes
    return files


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Silence torch's warning that no process group is used: here that is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
