"""The tensors of one of our checkpoints, however sharded, a few rows at a time."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moe.checkpoint.consolidation import MODEL_FILE
from moe.checkpoint.load import is_consolidated
from moe.checkpoint.storage import read_tensors
from moe.interop.hf.slots import Slot

_KEPT = 3  # tensors of a sharded checkpoint in memory: w_in, w_gate and w_out of one layer's experts


class OurWeights:
    """Weights of a checkpoint folder by the model's own names.

    Rows of a single model.safetensors are read in place. Tensors of a sharded checkpoint are assembled one by one, and
    the last three are cached, since their experts are requested in turn.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        consolidated = is_consolidated(checkpoint)
        self._prefix = "" if consolidated else "model."
        self._file: Any = safe_open(checkpoint / MODEL_FILE, framework="pt") if consolidated else None
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        metadata = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
        self.entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for key, entry in metadata.items():
            if key.startswith(self._prefix):
                assert isinstance(entry, TensorStorageMetadata)
                name = key.removeprefix(self._prefix)
                self.entries[name] = (entry.properties.dtype, tuple(entry.size))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor."""
        return self.entries[name][0]

    def require(self, slots: list[Slot]) -> None:
        """Raise ValueError unless the tensors match the configuration beside them."""
        shapes = {slot.ours: slot.shape for slot in slots}
        faults = [f"missing: {name}" for name in shapes if name not in self.entries]
        faults += [f"unused: {name}" for name in self.entries if name not in shapes]
        faults += [
            f"misshaped: {name} {found} must be {shapes[name]}"
            for name, (_, found) in self.entries.items()
            if name in shapes and shapes[name] != found
        ]
        if faults:
            raise ValueError(f"{self.checkpoint} does not fit its config.yaml: {'; '.join(faults)}")

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows `begin` to `end` of a tensor's first dimension."""
        if self._file is not None:
            return self._file.get_slice(name)[begin:end]
        if name not in self._kept:
            while len(self._kept) >= _KEPT:
                self._kept.popitem(last=False)
            dtype, shape = self.entries[name]
            tensor = torch.empty(shape, dtype=dtype)
            read_tensors(self.checkpoint, {f"model.{name}": tensor})
            self._kept[name] = tensor
        self._kept.move_to_end(name)
        return self._kept[name][begin:end]
