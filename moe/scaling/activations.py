"""Closed-form bytes that a rank holds besides its shards at the memory peak of a forward and backward pass.

Models eager code on the GPU path: what autograd keeps of each layer, what FSDP2 gathers, and the widest step of each
backward. Small items (statistics of norms, indices of a few bytes per token) are left out where they cannot matter.
"""

from __future__ import annotations

from typing import NamedTuple

from moe.config import RunConfig
from moe.scaling.communication import plan_exchange
from moe.scaling.routing_load import RoutingLoad
from moe.scaling.sharding import ParameterGroup, element_bytes

CHUNK_TOKENS = 4096  # chunk of the head's backward, as in kernels/linear_cross_entropy
_INDEX, _WIDE = 8, 4  # bytes per int64 and float32


class Moment(NamedTuple):
    """Bytes besides the parameter shards, and how many of them are gradient shards."""

    total: int
    gradients: int


class LayerBytes(NamedTuple):
    """Bytes of one layer and micro-batch on the GPU path."""

    kept: int  # kept from forward to backward
    between: int  # the part of it that stays under recompute
    routing: int  # the part of it that Routing holds to the end of the step
    rows: int  # the part of it in expert rows, freed by the time their gradients are reduced
    widest: int  # peak of its backward, beyond what was kept


def fullest_moment(
    config: RunConfig, groups: list[ParameterGroup], load: RoutingLoad | None, *, sequences: int, micro_batches: int
) -> Moment:
    """The maximum over all candidate peaks, on one of several ranks.

    Candidates are the backward of the head, when everything is kept and no layer has gradients yet, and for each layer,
    last to first, the widest step of its backward and the gradient reduction of each of its groups. With several
    micro-batches all gradient shards exist from the second on. With parallel.cpu_offload they leave as they are
    produced, and the shard of the next gathered group comes from the host.
    """
    sparse = set(config.model.moe_layers)
    layers = layer_bytes(config, sparse, load, sequences)
    kept = [layer.between if config.train.recompute else layer.kept for layer in layers]
    precision, offload = config.train.precision, config.parallel.cpu_offload
    of_layers: list[list[ParameterGroup]] = [[] for _ in layers]
    for group in groups[1:]:
        assert group.layer is not None
        of_layers[group.layer].append(group)
    root = groups[0]
    width = root.computed_bytes(precision)
    stream = sequences * config.seq_len * config.model.d_model * element_bytes(precision)
    held = root.numel * width  # the root's parameters stay gathered
    if offload:
        held += 4 * max(group.padded_shard for group in groups)
    routers = router_gradient_bytes(config, sequences)
    gradients = 0 if micro_batches == 1 or offload else 4 * sum(group.padded_shard for group in groups)
    pending, below = len(sparse) * routers, sum(kept)
    sizes = [[group.numel * group.computed_bytes(precision) for group in of] for of in of_layers]
    total = below + held + _gathered_ahead(config, sizes, config.model.num_layers) + pending
    total += before_head_bytes(config, sequences) + head_bytes(config, root, sequences)
    moments = [Moment(total + gradients, gradients)]
    held += root.numel * width  # its gradient waits for the embedding's
    for i in reversed(range(config.model.num_layers)):
        below -= kept[i]
        here = below + held + pending + gradients
        gathered = sum(sizes[i]) + _gathered_ahead(config, sizes, i)
        moments.append(Moment(here + layers[i].kept + layers[i].widest + gathered + sizes[i][-1], gradients))
        for group, size in zip(reversed(of_layers[i]), reversed(sizes[i]), strict=True):
            own = layers[i].kept - layers[i].rows if group.kind != "layer" else layers[i].routing
            gathered -= size  # freed before the reduction
            moments.append(Moment(here + own + stream + gathered + _reduction(config, group), gradients))
            if micro_batches == 1 and not offload:
                gradients += 4 * group.padded_shard
                here += 4 * group.padded_shard
        held += layers[i].routing
        pending -= routers if i in sparse else 0
    reduction = _reduction(config, root) - root.numel * width
    moments.append(Moment(held + gradients + max(reduction, 2 * root.numel * width), gradients))
    return max(moments)


def _gathered_ahead(config: RunConfig, sizes: list[list[int]], layer: int) -> int:
    """Gathered bytes of the layers before `layer` during its backward. sizes: bytes of each layer's groups.

    That is the next group, prefetched, or all groups if they stay gathered after the forward.
    """
    if not config.parallel.reshard_after_forward:
        return sum(map(sum, sizes[:layer]))
    return sizes[layer - 1][-1] if layer > 0 else 0


def layer_bytes(config: RunConfig, sparse: set[int], load: RoutingLoad | None, sequences: int) -> list[LayerBytes]:
    """The bytes of every layer; layers of the same kind are equal."""
    is_sparse = [i in sparse for i in range(config.model.num_layers)]
    kinds = {kind: _layer(config, kind, load, sequences) for kind in set(is_sparse)}
    return [kinds[kind] for kind in is_sparse]


def _layer(config: RunConfig, is_sparse: bool, load: RoutingLoad | None, sequences: int) -> LayerBytes:
    model, element = config.model, element_bytes(config.train.precision)
    tokens = sequences * config.seq_len
    stream = tokens * model.d_model * element
    query, kv = model.num_heads * model.head_width, model.kv_heads * model.head_width
    mask = stream if model.dropout > 0.0 else 0  # one byte per element on a GPU
    attention = tokens * (query + 2 * kv + 2 * query) * element + tokens * model.num_heads * _WIDE + mask
    attention += _turned(config, tokens)
    norms = 2 * _norm(config, tokens)
    backward = 3 * stream + tokens * (query + 2 * kv) * element  # of attention: its three gradients, then one
    if is_sparse:
        experts, routing, rows, widest = _sparse(config, load, tokens)
        kept = 2 * stream + norms + attention + experts
        return LayerBytes(kept, stream + routing, routing, rows, max(backward, widest))
    factor = 4 if model.gated else 2
    hidden = tokens * model.d_ff * element
    kept = 2 * stream + norms + attention + factor * hidden + mask
    return LayerBytes(kept, stream, 0, 0, max(backward, 2 * stream + 2 * hidden))


def _norm(config: RunConfig, tokens: int) -> int:
    """Kept by one norm besides its input: its result and, if RMSNorm is composed, float32 copies."""
    model, element = config.model, element_bytes(config.train.precision)
    result = tokens * model.d_model * element
    if model.norm == "layernorm":
        return result
    return result + tokens * model.d_model * _WIDE * (1 if element == _WIDE else 2)


def _turned(config: RunConfig, tokens: int) -> int:
    """Kept of queries and keys that are normalised or rotated."""
    model, element = config.model, element_bytes(config.train.precision)
    numbers = tokens * (model.num_heads + model.kv_heads) * model.head_width
    kept = numbers * element if model.position == "rope" else 0
    if model.qk_norm is not None:
        kept += 2 * numbers * _WIDE
    return kept


def _sparse(config: RunConfig, load: RoutingLoad | None, tokens: int) -> tuple[int, int, int, int]:
    """(kept, its parts in Routing and in rows, peak of the backward) of the sparse half of a layer."""
    model, element = config.model, element_bytes(config.train.precision)
    moe = model.moe
    assert moe is not None
    slots, stream = tokens * moe.top_k, tokens * model.d_model * element
    routing = 2 * tokens * moe.num_experts * _WIDE + slots * (_INDEX + _WIDE + 2)
    kept = routing + slots * (4 * _INDEX + _WIDE) + (tokens * model.d_model * _WIDE if element < _WIDE else 0)
    if moe.shared_d_ff is not None:
        kept += tokens * moe.shared_d_ff * element * (4 if model.gated else 2)
    of_row, backward = row_bytes(config)
    if load is None:  # fused: rows are gathered where they are read
        rows = slots * (of_row - model.d_model * element)
        return kept + rows, routing, rows, slots * backward + 2 * stream
    exchange = plan_exchange(config, load, tokens)
    received = -(-exchange.received // exchange.rounds)
    home = slots * model.d_model * element // exchange.rounds  # returned rows, read by the combine's backward
    rows = received * of_row + home
    widest = received * backward + 2 * stream - home
    if exchange.rounds > 1:  # each round is recomputed in its turn
        return kept, routing, 0, rows + widest
    return kept + rows, routing, rows, widest


def row_bytes(config: RunConfig) -> tuple[int, int]:
    """(kept, peak of the backward) per row that a rank's experts receive.

    Kept are the row, its pre-activations, its source and destination index, and the dropout mask. The widest step of
    the backward holds the recomputed activations, the gradients of the pre-activations and that of the expert's output;
    the mask is freed.
    """
    model, element = config.model, element_bytes(config.train.precision)
    width, row = model.expert_width * element, model.d_model * element
    hidden = (2 if model.gated else 1) * width
    mask = row if model.dropout > 0.0 else 0
    return row + hidden + 2 * _INDEX + mask, hidden + width + row - mask


def router_gradient_bytes(config: RunConfig, sequences: int) -> int:
    """Gradients of the auxiliary losses for one layer's logits and probabilities, made before its backward."""
    moe = config.model.moe
    return 0 if moe is None else 2 * sequences * config.seq_len * moe.num_experts * _WIDE


def before_head_bytes(config: RunConfig, sequences: int) -> int:
    """Kept until the head's backward is over: the last layer's output, and what the norm after it keeps."""
    model, tokens = config.model, sequences * config.seq_len
    stream = tokens * model.d_model * element_bytes(config.train.precision)
    return stream + (_norm(config, tokens) if model.norm_position == "pre" else 0)


def head_bytes(config: RunConfig, root: ParameterGroup, sequences: int) -> int:
    """Peak of the head's backward: gradients of its input and of its weight (float32, plus one product), and logits."""
    model, element = config.model, element_bytes(config.train.precision)
    assert model.vocab_size is not None
    tokens = sequences * config.seq_len
    weight = model.vocab_size * model.embedding_width
    chunk = min(tokens, CHUNK_TOKENS) * model.vocab_size * element  # freed before the next chunk is computed
    return tokens * model.embedding_width * element + weight * (_WIDE + element) + chunk


def _reduction(config: RunConfig, group: ParameterGroup) -> int:
    """Peak of reducing a group's gradients over ranks: the gradients and the float32 buffer.

    A group with one shard copies its buffer through a division.
    """
    if group.num_shards == 1:
        return 3 * group.numel * _WIDE
    return group.numel * group.computed_bytes(config.train.precision) + group.num_shards * group.padded_shard * _WIDE
