"""Writes a safetensors file tensor by tensor, so that its size is not limited by memory.

The format: 8 bytes with the length of a JSON header, little-endian; the header with each tensor's dtype, shape and
offset; the tensors' bytes, row-major (safetensors' own documentation). Order and spacing are those of its writer, so
equal tensors give equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe.checkpoint.folders import flush_to_disk
from moe.interop.hf.weights import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes, of the header


class Content(NamedTuple):
    """A tensor's dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_safetensors(path: Path, contents: dict[str, Content], rows_of: Callable[[str], Iterable[Tensor]]) -> str:
    """Write `path` and return the SHA-256 of the intended content.

    rows_of: yields a tensor's rows in any number of pieces, which concatenate to the tensor; called in file order.
    Raises ValueError if a value overflows its tensor's dtype.
    """
    digest = hashlib.sha256()
    ordered = in_file_order(contents)
    with path.open("wb") as file:
        for block in _blocks(ordered, rows_of):
            digest.update(block)
            file.write(block)
    flush_to_disk(path)
    return digest.hexdigest()


def in_file_order(contents: dict[str, Content]) -> dict[str, Content]:
    """Wide dtypes first, so that every tensor is aligned; then by name."""
    return dict(sorted(contents.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def _blocks(contents: dict[str, Content], rows_of: Callable[[str], Iterable[Tensor]]) -> Iterator[bytes | memoryview]:
    yield _header(contents)
    for name, content in contents.items():
        written = 0
        for rows in rows_of(name):
            block = _rounded(rows, content.dtype, name).contiguous().reshape(-1).view(torch.uint8).numpy().data
            written += block.nbytes
            yield block
        assert written == content.num_bytes, f"{name}: {written} bytes of {content.num_bytes}"


def _rounded(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`rows` in `dtype`. Raises ValueError if a value is too large for it and would become infinite."""
    found = rows.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(rows.dtype).max and bool((found.isinf() & rows.isfinite()).any()):
        largest = float(rows[rows.isfinite()].abs().amax())
        raise ValueError(
            f"{name} holds {largest:.6g}, and the largest number of {str(dtype).removeprefix('torch.')} is "
            f"{torch.finfo(dtype).max:.6g}: choose another --dtype"
        )
    return found


def _header(contents: dict[str, Content]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for name, content in contents.items():
        begin, end = end, end + content.num_bytes
        table[name] = {"dtype": _NAMES[content.dtype], "shape": list(content.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
