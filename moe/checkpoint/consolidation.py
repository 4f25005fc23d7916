"""Merge a checkpoint of any sharding into one file of weights that any reader of safetensors understands.

The format: 8 bytes with the length of a JSON header, little-endian; the header with each tensor's dtype, shape and
offsets; the tensors' bytes, row-major (safetensors' own documentation).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moe.checkpoint.folders import CHECKSUMS, find_checkpoint, flush_to_disk, sha256, verify_checkpoint
from moe.checkpoint.storage import read_tensors
from moe.data.tokenizer import tokenizer_files

MODEL_FILE = "model.safetensors"
GROUP_BYTES = 2**30  # of tensors in memory at a time, unless a single one is larger
_HEADER_ALIGNMENT = 8  # bytes
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


def consolidate(source: Path, destination: Path) -> Path:
    """Write the weights of the checkpoint at `source` to `destination`/model.safetensors, beside its configuration
    and tokenizer. Returns `destination`.

    Tensors have their names in the model's state_dict, tied ones once. Holds GROUP_BYTES of them at a time.
    Raises ValueError if `destination` is not empty, or `source` is damaged or already such a folder.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} is not empty: name a new folder")
    checkpoint = find_checkpoint(source)
    if (checkpoint / MODEL_FILE).is_file():
        raise ValueError(f"{checkpoint} is one {MODEL_FILE} already: copy the folder")
    verify_checkpoint(checkpoint)
    partial = destination.with_name(f".partial_{destination.name}")
    shutil.rmtree(partial, ignore_errors=True)  # left by a crash
    partial.mkdir(parents=True)
    try:
        with (partial / MODEL_FILE).open("wb") as file:
            written = _write_model(checkpoint, file)
        flush_to_disk(partial / MODEL_FILE)
        texts = ["config.yaml", *tokenizer_files(checkpoint)]
        for name in texts:
            shutil.copyfile(checkpoint / name, partial / name)
        checksums = {name: sha256(partial / name) for name in (MODEL_FILE, *texts)}
        if checksums[MODEL_FILE] != written:
            raise OSError(f"{destination / MODEL_FILE} read back differs from what was written; try another disk")
        (partial / CHECKSUMS).write_text(json.dumps(checksums, indent=1))
        for file_path in partial.iterdir():
            flush_to_disk(file_path)
        os.replace(partial, destination)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return destination


def _write_model(checkpoint: Path, file: BinaryIO) -> str:
    """Write all weights; returns the SHA-256 of the intended bytes."""
    entries = _entries(checkpoint)
    digest = hashlib.sha256()

    def put(content: bytes | memoryview) -> None:
        digest.update(content)
        file.write(content)

    put(_header(entries))
    for group in _groups(entries):
        tensors = {f"model.{name}": torch.empty(shape, dtype=dtype) for name, (dtype, shape) in group.items()}
        read_tensors(checkpoint, tensors)
        for tensor in tensors.values():
            put(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


Entries = dict[str, tuple[torch.dtype, torch.Size]]


def _entries(checkpoint: Path) -> Entries:
    """dtype and shape by the model's names, wide dtypes first so that every tensor is aligned."""
    metadata = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    found: Entries = {}
    for key, entry in metadata.items():
        if key.startswith("model."):
            assert isinstance(entry, TensorStorageMetadata)
            found[key.removeprefix("model.")] = (entry.properties.dtype, entry.size)
    return dict(sorted(found.items(), key=lambda item: (-item[1][0].itemsize, item[0])))


def _header(entries: Entries) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + _num_bytes(dtype, shape)
        table[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _groups(entries: Entries) -> Iterator[Entries]:
    group: Entries = {}
    size = 0
    for name, (dtype, shape) in entries.items():
        num_bytes = _num_bytes(dtype, shape)
        if group and size + num_bytes > GROUP_BYTES:
            yield group
            group, size = {}, 0
        group[name] = (dtype, shape)
        size += num_bytes
    yield group


def _num_bytes(dtype: torch.dtype, shape: torch.Size) -> int:
    return dtype.itemsize * shape.numel()
