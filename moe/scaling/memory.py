"""Closed-form bytes: what a MoE layer keeps and moves, and what each rank of a run holds."""

from __future__ import annotations

from typing import NamedTuple

from moe.config import RunConfig
from moe.scaling.activations import (
    LayerBytes,
    Moment,
    before_head_bytes,
    fullest_moment,
    head_bytes,
    layer_bytes,
    router_gradient_bytes,
    row_bytes,
)
from moe.scaling.communication import expert_capacity
from moe.scaling.routing_load import RoutingLoad
from moe.scaling.sharding import ParameterGroup, element_bytes, parameter_groups


def moe_activation_bytes(
    num_tokens: int,
    d_model: int,
    d_ff: int,
    num_experts: int,
    top_k: int,
    *,
    element_bytes: int,
    router_bytes: int = 4,
) -> int:
    """Bytes that a dropless MoE layer on the torch path keeps between forward and backward, excluding parameters.

    For R = T·K rows: inputs (R, D), outputs (R, D), pre-activations (R, F), and the gate's or the activations (R, F);
    for T tokens: the input (T, D) and router probabilities (T, E); plus indices and normalised weights of the choices.
    A test measures the same with torch's saved_tensors_hooks.
    """
    rows = num_tokens * top_k
    of_rows = rows * 2 * (d_model + d_ff) * element_bytes
    router_input = num_tokens * d_model * router_bytes  # the input itself if it has the router's dtype
    if element_bytes != router_bytes:
        router_input += num_experts * d_model * router_bytes  # plus a copy of the router's weight
    of_choices = rows * (5 * _INDEX_BYTES + 2 * router_bytes + 1)  # row order and expert; weights; kept flag
    of_tokens = num_tokens * (_INDEX_BYTES + (num_experts + 2) * router_bytes)  # first slot; probabilities and two sums
    return of_rows + router_input + of_choices + of_tokens + (num_experts + 1) * _INDEX_BYTES


_INDEX_BYTES = 8  # int64


def permutation_bytes(num_tokens: int, d_model: int, top_k: int, *, element_bytes: int, training: bool) -> int:
    """Bytes read and written to move tokens to their experts' rows and back, counting each pass over memory once.

    Forward: gather reads and writes R rows; combine reads R rows and writes T. Backward: the same for each, plus the
    product of each row with its gradient, which is the gradient of its weight.
    """
    rows = num_tokens * top_k
    gather, combine = 2 * rows, rows + num_tokens
    passes = gather + combine
    if training:
        passes += (rows + num_tokens) + (3 * rows + num_tokens)
    return passes * d_model * element_bytes


class RankMemory(NamedTuple):
    """What one rank holds on its device during training."""

    params: int  # elements of its shards, without padding
    param_bytes: int  # of its shards, padded to the largest rank's as FSDP2 stores them
    gradient_bytes: int  # likewise, once all gradients exist
    optimizer_bytes: int  # both AdamW moments and each parameter's step
    activation_bytes: int  # everything else, at the peak of a forward and backward pass
    peak_bytes: int  # at that moment, optimizer state included
    host_bytes: int = 0  # in host memory: weights, gradients and optimizer under parallel.cpu_offload


def plan_memory(
    config: RunConfig,
    num_ranks: int,
    load: RoutingLoad | None,
    *,
    sequences: int,
    micro_batches: int,
    device: str = "cuda",
) -> RankMemory:
    """What the first of `num_ranks` ranks, whose shards are the largest, holds on its device.

    A single rank holds everything, and gathers and reduces nothing.
    """
    groups = parameter_groups(config.model, config.parallel, num_ranks)
    params = sum(group.padded_shard for group in groups)  # the first rank's chunks are full, so it has no padding
    num_tensors = sum(len(group.shapes) for group in groups)
    optimizer_bytes = 2 * 4 * params + 4 * num_tensors
    share = {"sequences": sequences, "micro_batches": micro_batches}
    if num_ranks == 1:
        moment = fullest_moment_alone(config, groups, device=device, **share)
    else:
        moment = fullest_moment(config, groups, load, **share)
    inputs = 8 * sequences * config.seq_len
    activation_bytes = moment.total - moment.gradients
    if config.parallel.cpu_offload:
        states = 8 * params + optimizer_bytes
        return RankMemory(params, 0, 0, 0, activation_bytes, moment.total + inputs, states)
    return RankMemory(
        params=params,
        param_bytes=4 * params,
        gradient_bytes=4 * params,
        optimizer_bytes=optimizer_bytes,
        activation_bytes=activation_bytes,
        peak_bytes=4 * params + moment.total + inputs + optimizer_bytes,
    )


def layer_bytes_alone(config: RunConfig, sequences: int, *, device: str = "cuda") -> list[LayerBytes]:
    """Bytes per layer if one process has all experts. On a CPU, experts compute from permuted rows."""
    model, sparse = config.model, set(config.model.moe_layers)
    layers = layer_bytes(config, sparse, None, sequences)
    if device != "cpu" or model.moe is None:
        return layers
    element, slots = element_bytes(config.train.precision), sequences * config.seq_len * model.moe.top_k
    experts = moe_activation_bytes(
        sequences * config.seq_len,
        model.d_model,
        model.expert_width,
        model.moe.num_experts,
        model.moe.top_k,
        element_bytes=element,
    )
    of_row, _ = row_bytes(config)
    fused = slots * (of_row - model.d_model * element)  # as the GPU path keeps them
    return [
        layer._replace(kept=layer.kept - fused - layer.routing + experts) if i in sparse else layer
        for i, layer in enumerate(layers)
    ]


def fullest_moment_alone(
    config: RunConfig, groups: list[ParameterGroup], *, sequences: int, micro_batches: int, device: str = "cuda"
) -> Moment:
    """As `activations.fullest_moment`, for one process that holds everything.

    Gradients are whole and stay. 16-bit arithmetic keeps a copy of each weight from forward to backward.
    """
    model, train = config.model, config.train
    sparse = set(model.moe_layers)
    layers = layer_bytes_alone(config, sequences, device=device)
    element = element_bytes(train.precision)
    kept = [layer.between if train.recompute else layer.kept for layer in layers]
    copies = 0 if train.precision == "fp32" else sum(group.numel for group in groups) * element
    of_layers = [4 * sum(group.numel for group in groups if group.layer == i) for i in range(model.num_layers)]
    root = groups[0]
    gradients = 0 if micro_batches == 1 else 4 * root.numel + sum(of_layers)
    pending, below = len(sparse) * router_gradient_bytes(config, sequences), sum(kept)
    of_head = before_head_bytes(config, sequences) + head_bytes(config, root, sequences)
    moments = [Moment(below + copies + of_head + pending + gradients, gradients)]
    held = copies + 4 * root.numel  # the head's gradient waits for the embedding's
    for i in reversed(range(model.num_layers)):
        below -= kept[i]
        if micro_batches == 1:
            gradients += of_layers[i]
        moments.append(Moment(below + held + pending + gradients + layers[i].kept + layers[i].widest, gradients))
        held += layers[i].routing
    return max(moments)


class MemoryBound(NamedTuple):
    """What one rank receives if all tokens of the ranks that share the experts choose its own."""

    rows: int  # held by its experts at once
    bytes: int  # of these rows: kept by every MoE layer that keeps them, plus the widest backward of one
    limited: bool  # by parallel.rows_limit
    fixed: bool = False  # by parallel.fixed_capacity, which sends the same number whatever the tokens choose

    def __str__(self) -> str:
        why = "every token on this rank; parallel.rows_limit lowers it"
        if self.limited or self.fixed:
            why = "parallel.rows_limit" if self.limited else "parallel.fixed_capacity"
        return f"a rank's experts hold at most {self.rows:,} rows ({why}), {self.bytes / 2**30:.2f} GiB at the peak"


def memory_bound(config: RunConfig, num_ranks: int) -> MemoryBound:
    """The worst-case rows of a rank: min(rows_limit, P·T·min(K, E/P)), or what its experts' capacity admits.

    P is the number of ranks that share the experts, T the tokens of one rank's micro-batch. A dense model has no rows.
    With recompute, the rows of only one layer are alive at a time. rows_limit does not ensure that: only excess rows
    are split into rounds, and every layer keeps as many as the limit admits.
    """
    moe, parallel = config.model.moe, config.parallel
    if moe is None:
        return MemoryBound(0, 0, False)
    tokens = rank_share(config, num_ranks)[0] * config.seq_len
    local = moe.num_experts // parallel.ep_size
    worst = parallel.ep_size * tokens * min(moe.top_k, local)
    capacity = expert_capacity(moe, tokens)
    fixed = capacity is not None and parallel.fixed_capacity and parallel.ep_size > 1
    if capacity is not None:
        places = parallel.ep_size * local * capacity
        worst = places if fixed else min(worst, places)
    limit = parallel.rows_limit if parallel.ep_size > 1 else None
    limited = limit is not None and limit < worst
    rows = min(worst, limit) if limit is not None else worst
    kept, widest = row_bytes(config)
    return MemoryBound(rows, rows * (layers_with_rows(config) * kept + widest), limited, fixed)


def layers_with_rows(config: RunConfig) -> int:
    """MoE layers that keep their experts' rows until their own backward."""
    return 1 if config.train.recompute else len(config.model.moe_layers)


def rank_share(config: RunConfig, num_ranks: int) -> tuple[int, int]:
    """Sequences per micro-batch of a rank and micro-batches per step; 1 and 1 for a batch too small for the ranks."""
    own = max(1, config.batch_size // num_ranks)
    sequences = own if config.train.micro_batch_size is None else config.train.micro_batch_size
    return sequences, max(1, own // sequences)
