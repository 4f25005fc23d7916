"""Which rank holds what: the mesh axes for dense parameters and for experts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from moe.config import ParallelConfig


class Meshes(NamedTuple):
    """Two views of the same W ranks, in the same order.

    Dense parameters are copied over dp_replicate and sharded over all other ranks. An expert lives on the ranks of one
    `ep` coordinate, copied over dp_replicate and sharded over dp_shard. `ep` is the innermost axis: with ep_size = E,
    rank r holds expert r % E, the paper's placement (Artetxe et al. 2021).
    """

    world: DeviceMesh  # (world,)
    dense: DeviceMesh  # (dp_replicate, shard)
    sparse: DeviceMesh  # (dp_replicate, dp_shard, ep)


def make_meshes(config: ParallelConfig, world_size: int, device_type: str) -> Meshes:
    """The meshes of `world_size` ranks. Raises ValueError if the axes do not divide it."""
    rest, remainder = divmod(world_size, config.dp_replicate * config.ep_size)
    if remainder:
        raise ValueError(
            f"parallel.dp_replicate * parallel.ep_size ({config.dp_replicate} * {config.ep_size}) must divide the "
            f"number of processes ({world_size}); start another number of them or change an axis"
        )
    world = init_device_mesh(device_type, (world_size,), mesh_dim_names=("world",))
    dense = world._unflatten(0, (config.dp_replicate, rest * config.ep_size), ("dp_replicate", "shard"))
    sparse = world._unflatten(0, (config.dp_replicate, rest, config.ep_size), ("dp_replicate", "dp_shard", "ep"))
    return Meshes(world, dense, sparse)


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
