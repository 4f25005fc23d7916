"""Shard a model across ranks: expert parallelism, recomputation, compilation and FSDP2, in this order."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard

from moe.config import RunConfig
from moe.distributed.expert_parallel import DispatchOptions, apply_expert_parallel, require_divisible_experts
from moe.distributed.mesh import Meshes
from moe.layers.experts import Experts
from moe.layers.moe import MoE
from moe.layers.router import Router
from moe.model import Transformer


def parallelize(model: Transformer, meshes: Meshes, config: RunConfig) -> Transformer:
    """Shard `model`, built on the meta device, across the ranks of `meshes`, in place.

    Gradients are *summed* over ranks: a rank's loss is its share of the global mean (docs/gradient_contract.md).
    Then materialise with `to_empty` and `reset_parameters(seed)`, which draws only each rank's own shards.
    Raises ValueError if experts or widths cannot be divided.
    """
    parallel = config.parallel
    if config.model.moe is not None:
        require_divisible_experts(config.model.moe.num_experts, parallel.ep_size, where="model.moe")
        options = DispatchOptions(
            ranks_per_node=parallel.ranks_per_node,
            num_parts=parallel.overlap_parts,
            fixed_capacity=parallel.fixed_capacity,
            rows_limit=parallel.rows_limit,
        )
        if parallel.ep_size > 1:
            # ranks that share an expert by FSDP2 belong to different ep groups, and gather it once per round
            together = meshes.world.get_group()
            apply_expert_parallel(model, meshes.sparse["ep"], options=options, together=together)
    elif parallel.ep_size > 1:
        raise ValueError(f"parallel.ep_size ({parallel.ep_size}) spreads experts, and this model is dense; add +moe=")
    for module in model.modules():
        if isinstance(module, Router):
            module.check_scores = False  # an error on one rank would leave the others waiting: let NaN through
    model.recompute = config.train.recompute
    if config.train.compile:
        for layer in model.layers:
            layer.compile()
    _shard(model, meshes, config)
    return model


def _shard(model: Transformer, meshes: Meshes, config: RunConfig) -> None:
    dense = _axes(meshes.dense, "dp_replicate", "shard")
    sparse = _axes(meshes.sparse, "dp_replicate", "dp_shard")
    offload: OffloadPolicy = OffloadPolicy()
    if config.parallel.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=meshes.world.device_type == "cuda")
    policy = _precision(config.train.precision)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    reshard = config.parallel.reshard_after_forward
    for layer in model.layers:
        sparse_part = layer.feed_forward
        if isinstance(sparse_part, MoE):
            _require_divisible_width(sparse_part.experts, sparse)
            fully_shard(
                sparse_part.experts,
                mesh=sparse,
                mp_policy=policy,
                offload_policy=offload,
                reshard_after_forward=reshard,
                shard_placement_fn=lambda parameter: Shard(1),  # dim 0 is the experts, sharded by `ep`
            )
            # routing computes in float32, whatever the rest uses
            fully_shard(
                sparse_part.router, mesh=dense, mp_policy=wide, offload_policy=offload, reshard_after_forward=reshard
            )
        fully_shard(layer, mesh=dense, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
    fully_shard(model, mesh=dense, mp_policy=policy, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _axes(mesh: DeviceMesh, replicate: str, shard: str) -> DeviceMesh:
    """Both axes, or only the second if there is one copy."""
    return mesh[shard] if mesh[replicate].size() == 1 else mesh[replicate, shard]


def _precision(precision: str) -> MixedPrecisionPolicy:
    if precision == "fp32":
        return MixedPrecisionPolicy()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=True)


def _require_divisible_width(experts: Experts, mesh: DeviceMesh) -> None:
    num_shards = mesh["dp_shard"].size() if mesh.ndim > 1 else mesh.size()
    for name, parameter in experts.named_parameters(recurse=False):
        if parameter.shape[1] % num_shards != 0:
            raise ValueError(
                f"experts.{name}: {parameter.shape[1]} rows cannot be divided among the {num_shards} ranks that share "
                f"an expert; raise parallel.ep_size or parallel.dp_replicate, or change model.d_ff or model.d_model"
            )
