"""The tensors of a published checkpoint: safetensors or torch files, one or several, read one region at a time."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe.interop.hf.slots import Part

SAFETENSORS, PICKLES = "model.safetensors", ("pytorch_model.bin", "pytorch_model.pt", "model.pt")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Entry(NamedTuple):
    """A tensor's location and type."""

    file: Path
    key: str  # its name in the file
    dtype: torch.dtype | str  # a name if torch lacks it
    shape: tuple[int, ...]


class Weights:
    """All tensors of a folder by name. Names without the family's `prefix` get it; `buffers` are left out.

    Raises ValueError for missing, damaged and unsafe files. Files are opened on demand and memory-mapped; a torch file
    from before version 1.6 cannot be mapped, and is fully in memory while it is in use.
    """

    def __init__(self, folder: Path, *, prefix: str, buffers: str) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self.entries: dict[str, Entry] = {}
        for file in _files(folder):
            for key, dtype, shape in self._contents(file):
                name = key if key.startswith((prefix, "lm_head.")) else prefix + key
                if re.fullmatch(buffers, name):
                    continue
                if name in self.entries:
                    raise ValueError(f"{self.entries[name].file} and {file} both hold {key}: remove one")
                self.entries[name] = Entry(file, key, dtype, shape)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, part: Part) -> Tensor:
        """The tensor named by a part, or its region."""
        entry = self.entries[part.theirs]
        handle = self._handle(entry.file)
        try:
            if isinstance(handle, dict):
                tensor = handle[entry.key]
                return tensor if part.region is None else tensor[part.region[0], part.region[1] : part.region[2]]
            if part.region is None:
                return handle.get_tensor(entry.key)
            expert, first, end = part.region
            return handle.get_slice(entry.key)[expert, first:end]
        except SafetensorError as error:
            raise ValueError(
                f"{entry.file} is damaged: {entry.key} cannot be read ({error}); download it again"
            ) from error

    def _contents(self, file: Path) -> Iterable[tuple[str, torch.dtype | str, tuple[int, ...]]]:
        handle = self._handle(file)
        if isinstance(handle, dict):
            return [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in handle.items()]
        found = []
        for key in handle.keys():  # noqa: SIM118 - not a mapping
            view = handle.get_slice(key)
            found.append((key, DTYPES.get(view.get_dtype(), view.get_dtype()), tuple(view.get_shape())))
        return found

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open.clear()  # one at a time
            self._open[file] = _open_pickle(file) if file.suffix in (".bin", ".pt") else _open_safetensors(file)
        return self._open[file]


def _files(folder: Path) -> list[Path]:
    """The weight files, in transformers' order: safetensors before pickles, a single file before an index."""
    for name in (SAFETENSORS, *PICKLES):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _indexed(index)
    others = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != "config.json")
    raise ValueError(
        f"{folder} holds no weights in a supported format: neither {SAFETENSORS} nor {' nor '.join(PICKLES)}, nor an "
        f"index of several (NAME.index.json). It holds: {', '.join(others[:20]) or 'nothing else'}"
    )


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights, a JSON object with weight_map: {error!r}") from error
    if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{index} names {strange[0]!r}, which must be the name of a file beside it")
    files = [index.parent / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"{index.parent} lacks {', '.join(missing)}, which {index.name} names: download the missing files"
        )
    if strange := [file.name for file in files if file.suffix not in (".safetensors", ".bin", ".pt")]:
        raise ValueError(f"{index} names {strange[0]!r}, which is neither safetensors nor a torch file")
    return files


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a safetensors file, or is damaged: {error}; download it again") from error


def _open_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, read without executing anything it names."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is refused: it holds more than tensors, and no code in it was run. If you trust it, save its "
            f"tensors as safetensors ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read as a file of torch.save: {error!r}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a dictionary of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{file}: {name!r} is a {type(tensor).__name__}, not a tensor with a name")
        if tensor.is_meta or tensor.layout is not torch.strided:
            what = "has no numbers (device meta)" if tensor.is_meta else f"is {tensor.layout}"
            raise ValueError(f"{file}: {name} {what}: save it as an ordinary dense tensor")
    return content
