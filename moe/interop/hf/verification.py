"""`--verify`: re-reads both folders and compares them tensor by tensor, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.interop.hf.our_weights import OurWeights
from moe.interop.hf.slots import Slot
from moe.interop.hf.weights import Weights


def verify_import(slots: list[Slot], theirs: Weights, ours: OurWeights) -> int:
    """Compare each of their tensors, in our dtype, with what ours maps back to. Returns the number compared.

    Raises ValueError listing those that differ.
    """
    wrong = []
    for slot in slots:
        for part in slot.parts:
            expected = theirs.read(part).to(ours.dtype(slot.ours))
            if not _same_bits(part.rows(ours.rows(slot.ours, part.begin, part.end)), expected):
                wrong.append(f"{slot.ours} rows {part.begin} to {part.end} are not {part.theirs}")
    return _conclude(wrong, slots)


def verify_export(slots: list[Slot], theirs: Weights, ours: OurWeights) -> int:
    """Compare each of our tensors, in their dtype, with what theirs maps back to. Returns and raises as above."""
    wrong = []
    for slot in slots:
        for part in slot.parts:
            found = theirs.read(part)
            expected = ours.rows(slot.ours, part.begin, part.end).to(found.dtype)
            if not _same_bits(part.ours(found).reshape(expected.shape), expected):
                wrong.append(f"{part.theirs} is not {slot.ours} rows {part.begin} to {part.end}")
    return _conclude(wrong, slots)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def _conclude(wrong: list[str], slots: list[Slot]) -> int:
    if wrong:
        raise ValueError(
            f"--verify found {len(wrong)} tensors that differ from their source: {'; '.join(wrong[:20])}; convert again"
        )
    return sum(len(slot.parts) for slot in slots)
