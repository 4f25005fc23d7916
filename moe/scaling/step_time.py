"""A lower bound on the time of a training step: a roofline of its products, memory traffic and links, summed in order.

Each kind of product takes the longer of its FLOPs at the achievable GEMM rate and its bytes at memory bandwidth;
everything else takes its bytes. All-to-alls block what follows; parameter gathers and gradient reductions overlap with
computation. No schedule is simulated; docs/planner.md compares with real steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe.config import RunConfig
from moe.config.cluster import ClusterConfig
from moe.scaling.communication import Exchange, Ring, expert_capacity, plan_exchange, step_rings
from moe.scaling.flops import ComponentFlops, executed_flops
from moe.scaling.links import LinkBytes, fullest_links, ring_links
from moe.scaling.params import component_params
from moe.scaling.routing_load import RoutingLoad
from moe.scaling.sharding import element_bytes, parameter_groups

OPTIMIZER_BYTES = 32  # per parameter: AdamW reads four numbers and writes three, the gradient norm reads one
TILE_ROWS = 64  # rows of one expert per program of the GPU kernels, padded if fewer
HALF_RATE_ROWS = 20  # rows per expert at which a CPU's products reach half their rate (docs/planner.md)
_PASSES = 3  # over a product's inputs and outputs: forward, and two products in the backward


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step of the fullest rank, by what it waits for."""

    arithmetic: float  # products bound by FLOP/s
    memory: float  # products bound by bandwidth, and everything that is no product
    optimizer: float
    all_to_all: float
    sharding: float  # parameter gathers and gradient reductions not hidden by computation
    host: float  # the host's optimizer, and offloaded parameters' transfers, likewise
    latency: float
    all_to_all_link: str  # "within nodes" or "across nodes": the link that dominates
    sharding_link: str

    @property
    def seconds(self) -> float:
        parts = (self.arithmetic, self.memory, self.optimizer, self.all_to_all, self.sharding, self.host, self.latency)
        return sum(parts)

    @property
    def parts(self) -> dict[str, float]:
        """Parts by name, including the links."""
        return {
            "arithmetic": self.arithmetic,
            "memory bandwidth": self.memory,
            "optimizer": self.optimizer,
            f"all-to-all {self.all_to_all_link}": self.all_to_all,
            f"sharding {self.sharding_link}": self.sharding,
            "host link and memory": self.host,
            "latency of collectives": self.latency,
        }

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])


def step_time(
    config: RunConfig,
    cluster: ClusterConfig,
    num_ranks: int,
    load: RoutingLoad | None,
    *,
    sequences: int,
    micro_batches: int,
) -> StepTime:
    """Estimate one step of `config` on `num_ranks` devices of `cluster`, with micro-batches of `sequences` on each.

    load: of the ranks that share experts; None if none do. Raises ValueError if the devices do not support the
    precision.
    """
    exchange = None if load is None else plan_exchange(config, load, sequences * config.seq_len)
    arithmetic, memory = _computation(config, cluster, exchange, sequences, micro_batches)
    rings = step_rings(config, num_ranks, exchange, micro_batches=micro_batches)
    layers = micro_batches * len(config.model.moe_layers)
    rows = LinkBytes(0, 0, 0)
    if exchange is not None:
        rows = LinkBytes._make(layers * part for part in fullest_links(exchange, cluster.gpus_per_node))
    all_to_all, all_to_all_link = _link_seconds([rows], cluster)
    if exchange is not None and config.parallel.overlap_parts > 1:  # only the first part's exchange is never hidden
        all_to_all = max(all_to_all / config.parallel.overlap_parts, all_to_all - arithmetic - memory)
    sharding, sharding_link = _link_seconds([ring_links(ring, cluster.gpus_per_node) for ring in rings], cluster)
    copies = _sharding_copies(rings) / (cluster.memory_gb_per_second * 1e9 * cluster.memory_efficiency)
    shard = sum(group.padded_shard for group in parameter_groups(config.model, config.parallel, num_ranks))
    optimizer, host = _update(config, cluster, shard, num_ranks, micro_batches)
    hidden = arithmetic + memory + copies
    calls = sum(ring.calls for ring in rings if ring.size > 1) + (0 if exchange is None else layers * exchange.calls)
    return StepTime(
        arithmetic=arithmetic,
        memory=memory + copies,
        optimizer=optimizer,
        all_to_all=all_to_all,
        sharding=max(0.0, sharding - hidden),
        host=host[0] + max(0.0, host[1] - hidden),
        latency=calls * cluster.latency_microseconds * 1e-6,
        all_to_all_link=all_to_all_link,
        sharding_link=sharding_link,
    )


def rows_of_a_token(config: RunConfig, exchange: Exchange | None, num_tokens: int) -> float | None:
    """Rows computed by the fullest rank's experts, per token of the rank; None for a dense model."""
    moe = config.model.moe
    if moe is None:
        return None
    if exchange is not None:
        return exchange.received / num_tokens
    capacity = expert_capacity(moe, num_tokens)
    most = moe.top_k * num_tokens
    return (most if capacity is None else min(most, capacity * moe.num_experts)) / num_tokens


def _computation(
    config: RunConfig, cluster: ClusterConfig, exchange: Exchange | None, sequences: int, micro_batches: int
) -> tuple[float, float]:
    """(seconds bound by FLOP/s, seconds bound by memory) of all micro-batches of a step."""
    peak = cluster.peak_flops_per_second(config.train.precision)
    if peak is None:
        raise ValueError(
            f"{cluster.name} has no fast arithmetic of train.precision={config.train.precision}: choose one of "
            f"{', '.join(cluster.precisions)}"
        )
    tokens = sequences * config.seq_len
    flops = executed_flops(
        config.model,
        config.seq_len,
        recompute=config.train.recompute,
        rows_per_token=rows_of_a_token(config, exchange, tokens),
        head_again=cluster.device == "cuda",
    )
    traffic = _product_bytes(config, exchange, tokens)
    rate, bandwidth = peak * cluster.gemm_efficiency, cluster.memory_gb_per_second * 1e9 * cluster.memory_efficiency
    arithmetic, memory = 0.0, _other_bytes(config, exchange, tokens, cluster.device) / bandwidth
    for name in ComponentFlops._fields[:-1]:
        computing, moving = getattr(flops, name) * tokens / rate, getattr(traffic, name) / bandwidth
        if name == "experts":
            computing /= _expert_fill(config, exchange, tokens, cluster.device)
        if computing >= moving:
            arithmetic += computing
        else:
            memory += moving
    return micro_batches * arithmetic, micro_batches * memory


def _expert_fill(config: RunConfig, exchange: Exchange | None, tokens: int, device: str) -> float:
    """Share of the large-GEMM rate reached with an expert's rows, for the mean over a rank's experts."""
    moe = config.model.moe
    if moe is None:
        return 1.0
    rows = (rows_of_a_token(config, exchange, tokens) or 0.0) * tokens * config.parallel.ep_size / moe.num_experts
    if device == "cpu":
        return rows / (rows + HALF_RATE_ROWS)
    return rows / (math.ceil(rows / TILE_ROWS) * TILE_ROWS)


def _product_bytes(config: RunConfig, exchange: Exchange | None, tokens: int) -> ComponentFlops:
    """Bytes that each kind of product reads and writes per micro-batch, weights and tokens, over all passes."""
    model, element = config.model, element_bytes(config.train.precision)
    assert model.vocab_size is not None
    d, query, kv = model.d_model, model.num_heads * model.head_width, model.kv_heads * model.head_width
    params, moe, sparse, dense = component_params(model), model.moe, len(model.moe_layers), model.num_layers
    dense -= sparse
    hidden = 2 if model.gated else 1
    local = experts = 0.0
    shared = router = 0
    if moe is not None:
        rows = rows_of_a_token(config, exchange, tokens) or 0.0
        local = params.experts / config.parallel.ep_size
        experts = sparse * rows * (2 * d + (hidden + 1) * model.expert_width)
        shared = sparse * (2 * d + (hidden + 1) * (moe.shared_d_ff or 0))
        router = sparse * (d + moe.num_experts)
    numbers = ComponentFlops(
        attention_projections=params.attention + tokens * model.num_layers * (2 * d + 2 * query + 2 * kv),
        attention_scores=tokens * model.num_layers * (2 * query + 2 * kv),
        dense_ffn=params.dense_ffn + tokens * dense * (2 * d + (hidden + 1) * model.d_ff),
        experts=local + tokens * experts,
        shared_experts=params.shared_experts + tokens * shared,
        router=params.routers + tokens * router,
        head=model.vocab_size * model.embedding_width + tokens * model.embedding_width,
        permutation=0,
    )
    passes = _PASSES + config.train.recompute
    return ComponentFlops._make(passes * element * count for count in numbers)


def _other_bytes(config: RunConfig, exchange: Exchange | None, tokens: int, device: str) -> float:
    """Bytes that norms, residuals, activations, dropout and permutation move per micro-batch.

    Forward; the backward moves twice as much. On a CPU the logits go through memory, and float32 norms are composed.
    """
    model, element = config.model, element_bytes(config.train.precision)
    assert model.vocab_size is not None
    d, query, kv = model.d_model, model.num_heads * model.head_width, model.kv_heads * model.head_width
    sparse = len(model.moe_layers)
    hidden = 3 if model.gated else 2  # an activation reads the pre-activations and writes its result
    norms = 2 * 2 * d * (2 if model.norm == "rmsnorm" else 1)  # composed norms pass through memory once more
    residuals = 2 * 3 * d + (2 * 3 * d if model.dropout > 0.0 else 0)
    turned = 2 * (query + kv) * ((model.position == "rope") + 2 * (model.qk_norm is not None))
    per_layer = norms + residuals + turned
    numbers: float = model.num_layers * per_layer + (model.num_layers - sparse) * hidden * model.d_ff
    if model.moe is not None:
        rows = rows_of_a_token(config, exchange, tokens) or 0.0
        of_row = 2 * d + d + hidden * model.expert_width  # gathered; read by the weighted sum; activated
        wide = 4 / element * 3 * model.moe.num_experts  # float32 logits, probabilities and their sums
        numbers += sparse * (rows * of_row + d + wide + hidden * (model.moe.shared_d_ff or 0))
    passes = _PASSES + config.train.recompute
    moved: float = passes * element * tokens * numbers
    if device == "cpu":
        moved += 4 * 4 * tokens * model.vocab_size  # logits written, read, turned into probabilities and gradients
    return moved


def _sharding_copies(rings: list[Ring]) -> float:
    """Device memory traffic of parameter gathers and gradient reductions, besides the links' own."""
    return sum(2 * ring.bytes for ring in rings if ring.size > 1 and ring.kind != "all_reduce")


def _update(
    config: RunConfig, cluster: ClusterConfig, shard: int, num_ranks: int, micro_batches: int
) -> tuple[float, tuple[float, float]]:
    """(optimizer on the device, (optimizer on the host, its link)) in seconds, for `shard` elements per rank."""
    if not config.parallel.cpu_offload:
        bandwidth = cluster.memory_gb_per_second * cluster.memory_efficiency * 1e9
        return OPTIMIZER_BYTES * shard / bandwidth, (0.0, 0.0)
    of_node = min(num_ranks, cluster.gpus_per_node)
    # besides the optimizer, every further micro-batch adds its gradients to the stored ones
    traffic = of_node * shard * (OPTIMIZER_BYTES + 12 * (micro_batches - 1))
    on_host = traffic / (cluster.host_memory_gb_per_second * cluster.memory_efficiency * 1e9)
    gathers = micro_batches * (2 if config.parallel.reshard_after_forward else 1)
    crossing = 4 * shard * max(gathers, micro_batches)  # the busier direction: shards go down, gradients up
    return 0.0, (on_host, crossing / (cluster.host_gb_per_second * cluster.link_efficiency * 1e9))


def _link_seconds(parts: list[LinkBytes], cluster: ClusterConfig) -> tuple[float, str]:
    """Total of consecutive transfers, each taking the slower of its two links, and which of them dominates."""
    total, of_network = 0.0, 0.0
    for links in parts:
        within = links.within / (cluster.node_gb_per_second * cluster.link_efficiency * 1e9)
        across = links.across / (cluster.network_gb_per_second * cluster.link_efficiency * 1e9)
        total += max(within, across)
        of_network += across if across > within else 0.0
    return total, "across nodes" if of_network > total / 2 else "within nodes"
