"""Which parameters FSDP2 gathers together, and the size of a rank's shards."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moe.config import ModelConfig, ParallelConfig


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that FSDP2 gathers together, as they are in one rank's expert-parallel block."""

    kind: str  # "root", "layer", "router" or "experts"
    layer: int | None
    shapes: tuple[tuple[int, ...], ...]
    num_shards: int
    num_copies: int  # ranks that hold the same shard
    shard_dim: int  # 1 for experts, whose dim 0 is divided by expert parallelism

    @cached_property
    def numel(self) -> int:
        """Elements of the gathered parameters."""
        return sum(_numel(shape) for shape in self.shapes)

    @cached_property
    def padded_shard(self) -> int:
        """Elements of a shard, with each parameter's shard_dim rounded up to a multiple of num_shards."""
        return sum(
            -(-shape[self.shard_dim] // self.num_shards) * _numel(shape) // shape[self.shard_dim]
            for shape in self.shapes
        )

    @property
    def first_shard(self) -> int:
        """Elements of rank 0's shard, which is the largest."""
        return self.padded_shard  # rank 0's chunk is full

    def computed_bytes(self, precision: str) -> int:
        """Bytes per gathered element."""
        return 4 if self.kind == "router" else element_bytes(precision)


def element_bytes(precision: str) -> int:
    """Bytes per element in the arithmetic of `train.precision`."""
    return 4 if precision == "fp32" else 2


def parameter_groups(model: ModelConfig, parallel: ParallelConfig, num_ranks: int) -> list[ParameterGroup]:
    """The groups of `model` on `num_ranks` ranks, in the order the forward pass gathers them.

    As in `moe.distributed.parallelize`: the experts of a MoE layer are sharded over dp_shard only, everything else over
    all ranks of a copy.
    """
    dp_shard, rest = divmod(num_ranks, parallel.dp_replicate * parallel.ep_size)
    if rest:
        raise ValueError(
            f"parallel.dp_replicate * parallel.ep_size ({parallel.dp_replicate} * {parallel.ep_size}) must divide the "
            f"number of ranks ({num_ranks}); change one of them"
        )
    copies, dense = parallel.dp_replicate, dp_shard * parallel.ep_size
    groups = [ParameterGroup("root", None, tuple(_root_shapes(model)), dense, copies, 0)]
    for layer in range(model.num_layers):
        groups.append(ParameterGroup("layer", layer, tuple(_layer_shapes(model, layer)), dense, copies, 0))
        if model.moe is not None and layer in model.moe_layers:
            router = ((model.moe.num_experts, model.d_model),)
            groups.append(ParameterGroup("router", layer, router, dense, copies, 0))
            experts = tuple(_expert_shapes(model, model.moe.num_experts // parallel.ep_size))
            groups.append(ParameterGroup("experts", layer, experts, dp_shard, copies, 1))
    return groups


def _root_shapes(model: ModelConfig) -> list[tuple[int, ...]]:
    assert model.vocab_size is not None
    width, d = model.embedding_width, model.d_model
    shapes: list[tuple[int, ...]] = [(model.vocab_size, width)]
    if model.position == "learned":
        shapes.append((model.max_seq_len + model.position_offset, d))
    if width != d:
        shapes += [(d, width), (width, d)]
    if model.norm_position == "pre":
        shapes += _norm_shapes(model, d)
    if not model.tie_embeddings:
        shapes.append((model.vocab_size, width))
    return shapes


def _layer_shapes(model: ModelConfig, layer: int) -> list[tuple[int, ...]]:
    d, query, kv = model.d_model, model.num_heads * model.head_width, model.kv_heads * model.head_width
    shapes: list[tuple[int, ...]] = [*_norm_shapes(model, d), *_norm_shapes(model, d), (query + 2 * kv, d), (d, query)]
    if model.bias:
        shapes += [(query + 2 * kv,), (d,)]
    if model.qk_norm is not None:
        shapes += [(model.head_width,)] * 2 if model.qk_norm == "head" else [(query,), (kv,)]
    if model.moe is None or layer not in model.moe_layers:
        return shapes + _ffn_shapes(model, model.d_ff)
    if model.moe.shared_d_ff is not None:
        shapes += _ffn_shapes(model, model.moe.shared_d_ff)
        shapes += [(1, d)] if model.moe.shared_gate else []
    return shapes


def _ffn_shapes(model: ModelConfig, d_ff: int) -> list[tuple[int, ...]]:
    d = model.d_model
    shapes: list[tuple[int, ...]] = [(d_ff, d)]
    shapes += [(d_ff, d)] if model.gated else []
    shapes.append((d, d_ff))
    return [*shapes, (d_ff,), (d,)] if model.bias else shapes


def _expert_shapes(model: ModelConfig, num_local: int) -> list[tuple[int, ...]]:
    return [(num_local, *shape) for shape in _ffn_shapes(model, model.expert_width)]


def _norm_shapes(model: ModelConfig, width: int) -> list[tuple[int, ...]]:
    return [(width,)] * (2 if model.norm == "layernorm" else 1)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
