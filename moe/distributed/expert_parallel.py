"""Expert parallelism: experts spread over the ranks of a mesh axis, in this library's models and in foreign ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from moe.distributed.all_to_all import current_traffic
from moe.distributed.wire import (
    FlatWire,
    InFlight,
    Journey,
    TwoLevelWire,
    Wire,
    part_of,
    send_back,
    send_out,
    transpose_blocks,
)
from moe.kernels.permute import permute, sort_by_expert, unpermute
from moe.layers.experts import Experts, Visit
from moe.layers.moe import MoE
from moe.layers.routing import Routing
from moe.scaling.routing_load import tokens_a_round


class DispatchOptions(NamedTuple):
    """How rows are exchanged. All settings agree: the first two bit for bit, the others up to the order of addition.

    fixed_capacity and rows_limit exclude each other: a capacity is for all tokens, of which a round has only some, and
    it already bounds a rank's rows.
    """

    ranks_per_node: int | None = None  # two all-to-alls, within nodes of so many ranks and between them; None: one
    num_parts: int = 1  # parts of each rank's experts: one computes while the next one's rows are in flight
    fixed_capacity: bool = False  # in training, send the whole capacity, empty rows too: no counts to wait for
    rows_limit: int | None = None  # the most rows a rank receives at once; None: no limit


_PLAIN = DispatchOptions()


class ExpertParallelDispatcher(nn.Module):
    """Sends each row to its expert's rank, runs this rank's experts and sums each token's rows on the token's rank.

    Expert e lives on rank e // (E / P). It sees its rows in the order (source rank, token, choice): the matrix that one
    process would give it for the ranks' tokens in rank order, so its outputs are bit-identical.
    capacity: maps T tokens of one rank to the rows an expert may get from them, None for no limit; used with
    `fixed_capacity` in training, where every rank must then have the same T.
    together: the ranks that take the same number of rounds under `rows_limit`; None is `group`.
    gradient_divisor: divides the experts' gradients.
    """

    def __init__(
        self,
        wire: Wire,
        group: dist.ProcessGroup,
        *,
        options: DispatchOptions = _PLAIN,
        capacity: Callable[[int], int | None] | None = None,
        backend: str = "auto",
        together: dist.ProcessGroup | None = None,
        gradient_divisor: int | None = None,
    ) -> None:
        super().__init__()
        self.wire = wire
        self.group = group
        self.together = group if together is None else together
        self.gradient_divisor = gradient_divisor
        self.options = options
        self.capacity = capacity
        self.backend = backend

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallelDispatcher:
        """A copy that shares the process groups, which are handles and cannot be copied."""
        capacity = copy.deepcopy(self.capacity, memo)  # a router's method: the copy must call the copied router
        twin = type(self)(
            self.wire,
            self.group,
            options=self.options,
            capacity=capacity,
            backend=self.backend,
            together=self.together,
            gradient_divisor=self.gradient_divisor,
        )
        return twin.train(self.training)

    @torch.compiler.disable  # counts are read on the host, which breaks the graph anyway
    def forward(
        self,
        x: Tensor,
        routing: Routing,
        experts: Experts,
        alongside: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """(T, D) -> (T, D): Σ_k expert_weights[t, k] · expert(x_t) over the kept choices, plus `alongside`'s result.

        Every rank of the group must take part, even without tokens. alongside: local work (a shared expert) to do while
        rows are in flight.
        """
        limit = self.options.rows_limit
        tokens = (x, routing.expert_indices, routing.kept, routing.expert_weights)
        rounds = 1 if limit is None else self._num_rounds(routing, limit)
        if rounds == 1:
            return self._round(*tokens, routing.tokens_per_expert.numel(), experts, alongside)
        y = torch.cat(
            [
                # recomputed in the backward, so that only one round's rows are alive at a time
                checkpoint(self._round, *part, routing.tokens_per_expert.numel(), experts, None, use_reentrant=False)
                for part in zip(*(tensor.tensor_split(rounds) for tensor in tokens), strict=True)
            ]
        )
        return y if alongside is None else y + alongside()

    def _round(
        self,
        x: Tensor,
        expert_indices: Tensor,
        kept: Tensor,
        expert_weights: Tensor,
        num_experts: int,
        experts: Experts,
        alongside: Callable[[], Tensor] | None,
    ) -> Tensor:
        order = sort_by_expert(expert_indices, kept, num_experts, backend=self.backend)
        rows = permute(x, order, backend=self.backend)  # (R, D)
        places = capacity = None
        # in evaluation ranks may have different numbers of tokens, for instance at the end of a text
        if self.options.fixed_capacity and self.training and self.capacity is not None:
            capacity = self.capacity(x.shape[0])
        if capacity is not None:
            places = _places(order.expert_offsets, rows.shape[0], capacity)  # (R,)
            rows = rows.new_zeros(num_experts * capacity + 1, rows.shape[1]).index_copy(0, places, rows)[:-1]
            journey = self.wire.uniform(capacity, num_experts // self.wire.size)
        else:
            counts = order.expert_offsets.diff().view(self.wire.size, -1)
            journey = self.wire.announce(counts)
        rows, beside = self._visit(rows[: journey.num_sent], journey, experts, alongside)
        if places is not None:
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).index_select(0, places)
        elif rows.shape[0] < order.slots.numel():  # an order of all slots, the dropped ones last
            rows = torch.cat([rows, rows.new_zeros(order.slots.numel() - rows.shape[0], rows.shape[1])])
        y = unpermute(rows, expert_weights, order, backend=self.backend)
        return y if beside is None else y + beside

    def _visit(
        self, rows: Tensor, journey: Journey, experts: Experts, alongside: Callable[[], Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Send rows in the order (destination, expert) out and back; also returns what `alongside` computed."""
        traffic = current_traffic()
        if traffic is not None:
            traffic.rows_received += journey.num_received
            traffic.peak_rows = max(traffic.peak_rows, journey.num_received)
        num_local = len(journey.received[0])
        cuts = _cut(num_local, self.options.num_parts)
        blocks = [[sum(row[cut]) for cut in cuts] for row in journey.tables[0]]  # [destination][part] rows
        if len(cuts) > 1:
            rows = transpose_blocks(rows, blocks)
        parts = [part_of(self.wire, journey, cut) for cut in cuts] if len(cuts) > 1 else [journey]
        split = rows.split([way.num_sent for way in parts])
        out = [send_out(part, way) for part, way in zip(split, parts, strict=True)]
        beside = None if alongside is None else alongside()
        back: list[InFlight] = []

        def arrive(index: int, leaving: Tensor) -> tuple[Tensor, Tensor]:
            received = parts[index].received
            arrived = transpose_blocks(out[index].arrive(leaving), received)  # (expert, source)
            return arrived, _offsets(received, arrived.device)

        def depart(index: int, y: Tensor) -> Tensor:
            back.append(send_back(transpose_blocks(y, parts[index].received, back=True), parts[index]))
            return back[index].leaving

        leaving = experts(tuple(way.leaving for way in out), visit=Visit(cuts, arrive, depart, self.gradient_divisor))
        home = [way.arrive(tensor) for way, tensor in zip(back, leaving, strict=True)]
        if len(home) == 1:
            return home[0], beside
        return transpose_blocks(torch.cat(home), blocks, back=True), beside

    def _num_rounds(self, routing: Routing, limit: int) -> int:
        """The number of rounds that keeps every rank's rows within `limit`, the same on all of `together`."""
        num_tokens, top_k = routing.expert_indices.shape
        num_local = routing.tokens_per_expert.numel() // self.wire.size
        kept = torch.zeros_like(routing.tokens_per_expert)
        kept.scatter_add_(0, routing.expert_indices.flatten(), routing.kept.flatten().to(kept.dtype))
        dist.all_reduce(kept, group=self.group)
        most = torch.stack([kept.view(self.wire.size, -1).sum(dim=1).max(), kept.new_tensor(num_tokens)])
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.together)
        most_rows, most_tokens = most.tolist()
        if most_rows <= limit:
            return 1
        return -(-most_tokens // tokens_a_round(limit, self.wire.size, top_k, num_local))


def apply_expert_parallel(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    options: DispatchOptions = _PLAIN,
    gradient_divisor: int | None = None,
    together: dist.ProcessGroup | None = None,
) -> nn.Module:
    """Give each rank of a one-dimensional `mesh` its block of the experts of every MoE in `module`, in place.

    The experts' parameters become DTensors sharded over their first dim, tied ones once; beforehand all ranks must hold
    equal values (or meta tensors). Ranks may have different numbers of tokens, including none, but must agree on
    whether x and the experts require gradients. The experts' gradients are *summed* over the losses of the group's
    ranks, as an all-to-all does; set gradient_divisor=P where the rest of the model is averaged over ranks, for
    instance by DistributedDataParallel.
    together: if FSDP2 then shards the experts over further ranks, all of these ranks: with options.rows_limit they
    gather the weights once per round and so must take the same number of rounds; None is `mesh`.
    Raises ValueError, and changes nothing, if the experts cannot be divided among the ranks or are already DTensors, or
    if options conflict with each other or the router.
    """
    _check_arguments(mesh, options, gradient_divisor)
    layers = [(name or type(layer).__name__, layer) for name, layer in module.named_modules() if isinstance(layer, MoE)]
    for name, layer in layers:
        _check_layer(name, layer, mesh, options)
    wire = make_wire(mesh, options)  # one for all layers: each level is a process group of its own
    sharded: dict[nn.Parameter, nn.Parameter] = {}
    for _, layer in layers:
        layer.dispatcher = ExpertParallelDispatcher(
            wire,
            mesh.get_group(),
            options=options,
            capacity=layer.router.capacity,
            backend=layer.experts.backend,
            together=together,
            gradient_divisor=gradient_divisor,
        ).train(layer.training)
        layer.router.check_scores = False  # an error on one rank would leave the others waiting: let NaN through
        _shard_experts(layer.experts, mesh, sharded)
    return module


def require_divisible_experts(num_experts: int, ep_size: int, *, where: str) -> None:
    """Raise ValueError, with valid choices, unless each of `ep_size` ranks gets the same number of experts."""
    if num_experts % ep_size == 0:
        return
    if ep_size > num_experts:
        raise ValueError(
            f"{where}: parallel.ep_size ({ep_size}) must be at most num_experts ({num_experts}). For one expert on "
            f"each of {ep_size} ranks, copies included, set parallel.ep_size={num_experts}: the other ranks hold "
            f"copies, expert e on the ranks with rank % {num_experts} == e"
        )
    divisors = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
    raise ValueError(
        f"{where}: parallel.ep_size ({ep_size}) must divide num_experts ({num_experts}); it may be one of "
        f"{', '.join(map(str, divisors))}"
    )


def make_wire(mesh: DeviceMesh, options: DispatchOptions) -> Wire:
    """The wire between the ranks of a one-dimensional mesh."""
    if options.ranks_per_node is None or options.ranks_per_node >= mesh.size():
        return FlatWire(mesh.get_group())
    if mesh.size() % options.ranks_per_node != 0:
        raise ValueError(
            f"ranks_per_node ({options.ranks_per_node}) must divide the ranks that share the experts ({mesh.size()})"
        )
    if mesh.mesh_dim_names is None:  # only a named axis can be split
        mesh = DeviceMesh.from_group(mesh.get_group(), mesh.device_type, mesh_dim_names=("ep",))
    grid = mesh._unflatten(0, (mesh.size() // options.ranks_per_node, options.ranks_per_node), ("node", "place"))
    return TwoLevelWire(grid["place"].get_group(), grid["node"].get_group())


def _check_arguments(mesh: DeviceMesh, options: DispatchOptions, gradient_divisor: int | None) -> None:
    if mesh.ndim != 1:
        raise ValueError(f"the mesh must have one axis, not {mesh.ndim} {mesh.mesh_dim_names}: give one, as mesh['ep']")
    numbers = {name: getattr(options, name) for name in ("ranks_per_node", "num_parts", "rows_limit")}
    for name, value in [*numbers.items(), ("gradient_divisor", gradient_divisor)]:
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    if options.fixed_capacity and options.rows_limit is not None:
        raise ValueError(
            f"rows_limit ({options.rows_limit}) must be None with fixed_capacity=True: the capacity of all tokens "
            f"bounds a rank's rows already, and says nothing of those of one round; leave one of them out"
        )


def _check_layer(name: str, layer: MoE, mesh: DeviceMesh, options: DispatchOptions) -> None:
    if isinstance(layer.experts.w_in, DTensor):
        raise ValueError(
            f"{name}: the experts' weights are DTensors already: call apply_expert_parallel once, before fully_shard"
        )
    require_divisible_experts(layer.experts.w_in.shape[0], mesh.size(), where=name)
    if options.rows_limit is not None:  # fail now, not when a load first exceeds it
        num_local = layer.router.num_experts // mesh.size()
        tokens_a_round(options.rows_limit, mesh.size(), layer.router.top_k, num_local)
    # evaluation has rules of its own, so ask a router in training mode, for a token count that any rule accepts
    router = copy.copy(layer.router).train()
    if options.fixed_capacity and router.capacity(router.num_experts) is None:
        raise ValueError(
            f"{name}: fixed_capacity sends a fixed number of rows to every expert, and this router drops nothing; "
            f"give it a capacity_factor or leave fixed_capacity off"
        )


def _shard_experts(experts: Experts, mesh: DeviceMesh, sharded: dict[nn.Parameter, nn.Parameter]) -> None:
    """Shard the parameters in place. sharded: the result for each parameter so far, which keeps tied ones tied."""
    num_local = experts.w_in.shape[0] // mesh.size()
    first = mesh.get_local_rank() * num_local
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if isinstance(parameter, DTensor):  # an earlier layer shares these experts
            continue
        if parameter not in sharded:
            own = parameter.detach()[first : first + num_local].clone()
            sharded[parameter] = nn.Parameter(
                DTensor.from_local(own, mesh, [Shard(0)], run_check=False), requires_grad=parameter.requires_grad
            )
        setattr(experts, name, sharded[parameter])


def _cut(num_experts: int, num_parts: int) -> list[slice]:
    """Split a rank's experts into at most `num_parts` parts, as evenly as possible."""
    num_parts = max(1, min(num_parts, num_experts))
    edges = [num_experts * part // num_parts for part in range(num_parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _offsets(received: list[list[int]], device: torch.device) -> Tensor:
    """(experts + 1,) int64: where each expert's rows begin when sorted by (expert, source)."""
    totals = torch.tensor([0] + [sum(column) for column in zip(*received, strict=True)], dtype=torch.int64)
    return totals.cumsum(0).to(device, non_blocking=True)


def _places(expert_offsets: Tensor, num_rows: int, capacity: int) -> Tensor:
    """(R,) int64: the place of each row in a block of `capacity` places per expert; dropped rows go after all of them.

    Raises RuntimeError (on a GPU a device assertion) if an expert has more rows, as a recorded routing may.
    """
    torch._assert_async(
        (expert_offsets.diff() <= capacity).all(),
        f"an expert has more rows than fixed_capacity sends ({capacity}): replay a recorded routing without it",
    )
    row = torch.arange(num_rows, device=expert_offsets.device)
    expert = torch.searchsorted(expert_offsets[1:].contiguous(), row, right=True)  # (R,)
    num_experts = expert_offsets.numel() - 1
    place = expert * capacity + row - expert_offsets[expert.clamp_max(num_experts - 1)]
    return torch.where(expert < num_experts, place, num_experts * capacity)
