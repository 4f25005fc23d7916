"""Checks that a checkpoint's tensors are those the model needs, reporting all faults in one error."""

from __future__ import annotations

import torch

from moe.interop.hf.folders import DTYPES
from moe.interop.hf.slots import Slot
from moe.interop.hf.weights import Weights

_SHOWN = 50


def choose_layout(alternatives: list[list[Slot]], weights: Weights) -> list[Slot]:
    """For each of our tensors the layout whose names are present; the published one if neither is."""
    return [
        next((slot for slot in slots if all(part.theirs in weights for part in slot.parts)), slots[0])
        for slots in alternatives
    ]


def require_fit(slots: list[Slot], weights: Weights, *, tied_to: str | None) -> None:
    """Raise ValueError listing every tensor that is missing, unused, misshaped or of an unsupported dtype.

    tied_to: the embedding's name if the head is tied to it; a copy under lm_head.weight must equal it.
    """
    parts = [part for slot in slots for part in slot.parts]
    expected = {part.theirs: part.shape for part in parts}
    head = "lm_head.weight"
    if tied_to is not None and head in weights and tied_to in weights:
        expected[head] = expected[tied_to]
    faults = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in weights]
    faults += [f"unused: {name} {entry.shape}" for name, entry in weights.entries.items() if name not in expected]
    for name, shape in expected.items():
        entry = weights.entries.get(name)
        if entry is not None and entry.shape != shape:
            faults.append(f"misshaped: {name} {entry.shape} must be {shape}")
        if entry is not None and entry.dtype not in DTYPES.values():
            faults.append(f"of an unsupported dtype: {name} {entry.dtype}")
    for slot in slots:
        dtypes = {weights.entries[part.theirs].dtype for part in slot.parts if part.theirs in weights}
        if len(dtypes) > 1:
            names = f"{slot.parts[0].theirs} to {slot.parts[-1].theirs}"
            faults.append(f"of several dtypes: {names} {sorted(map(str, dtypes))}")
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(f"{weights.folder} does not fit its config.json: {'; '.join(faults[:_SHOWN])}{more}")
    if tied_to is not None and head in weights:
        _require_tied(slots, weights, tied_to, head)


def _require_tied(slots: list[Slot], weights: Weights, tied_to: str, head: str) -> None:
    part = next(part for slot in slots for part in slot.parts if part.theirs == tied_to)
    if not torch.equal(weights.read(part), weights.read(part._replace(theirs=head))):
        raise ValueError(
            f"{weights.folder}: config.json ties the embeddings, but {head} is not {tied_to}; "
            f"set tie_word_embeddings to false there if the model has both"
        )
