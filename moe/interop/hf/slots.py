"""A name table applied to a model: where every row of each of our tensors lies in theirs."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from moe.checkpoint import model_tensors
from moe.config import ModelConfig
from moe.interop.hf.names import Half, Table, Theirs, Transposed
from moe.model import Transformer

Shape = tuple[int, ...]


class Part(NamedTuple):
    """Rows `begin` to `end` of our tensor's first dimension, and the matching tensor of theirs, or its region."""

    theirs: str
    shape: Shape  # of their whole tensor
    begin: int
    end: int
    transposed: bool = False
    region: tuple[int, int, int] | None = None  # (expert, first row, end row) of theirs; None is all of it

    def ours(self, theirs: Tensor) -> Tensor:
        """Their tensor, or its region, as rows of ours."""
        return theirs.T if self.transposed else theirs

    def rows(self, rows: Tensor) -> Tensor:
        """Rows of ours as their tensor, or its region."""
        if self.transposed:
            return rows.T
        return rows.reshape(self.region_shape)

    @property
    def region_shape(self) -> Shape:
        """The shape of what this part takes from theirs."""
        if self.region is None:
            return self.shape
        return (self.region[2] - self.region[1], *self.shape[2:])


class Slot(NamedTuple):
    """One of our tensors and its parts, in the order of its rows."""

    ours: str
    shape: Shape
    parts: tuple[Part, ...]


def make_slots(model: ModelConfig, *tables: Table) -> list[list[Slot]]:
    """For each tensor of a model, in order, its slot in each table that names it.

    Raises ValueError for a tensor that no table names: the family has no place for it.
    """
    shapes = {
        name.removeprefix("model."): tuple(tensor.shape)
        for name, tensor in model_tensors(Transformer(model, device="meta")).items()
    }
    found: list[list[Slot]] = []
    for name, shape in shapes.items():
        layer = re.match(r"layers\.(\d+)\.", name)
        generic = name if layer is None else f"layers.{{i}}.{name[layer.end() :]}"
        index = "" if layer is None else layer[1]
        entries = [table[generic] for table in tables if generic in table]
        if not entries:
            raise ValueError(f"the family of transformers has no tensor for {name} {shape}: choose another --family")
        found.append([Slot(name, shape, _parts(entry, index, shape, model)) for entry in entries])
    return found


def _parts(entry: Theirs, index: str, shape: Shape, model: ModelConfig) -> tuple[Part, ...]:
    if isinstance(entry, Transposed):
        return (Part(_in_layer(entry.name, index), shape[::-1], 0, shape[0], transposed=True),)
    if isinstance(entry, Half):
        num_experts, d_ff, d_model = shape
        first = entry.which * d_ff
        name, whole = _in_layer(entry.name, index), (num_experts, 2 * d_ff, d_model)
        return tuple(Part(name, whole, e, e + 1, region=(e, first, first + d_ff)) for e in range(num_experts))
    if isinstance(entry, tuple):
        names = [str(each) for each in entry]
        widths = (model.num_heads * model.head_width, *[model.kv_heads * model.head_width] * 2)  # q, k, v
        ends = [sum(widths[: n + 1]) for n in range(len(widths))]
        return tuple(
            Part(_in_layer(name, index), (width, *shape[1:]), end - width, end)
            for name, width, end in zip(names, widths, ends, strict=True)
        )
    assert isinstance(entry, str)
    name = _in_layer(entry, index)
    if "{e}" in name:
        return tuple(Part(name.replace("{e}", str(e)), shape[1:], e, e + 1) for e in range(shape[0]))
    return (Part(name, shape, 0, shape[0]),)


def _in_layer(name: str, index: str) -> str:
    return name.replace("{i}", index)
