"""The layers compared, with one set of weights and one batch of tokens: ours, the dense twin and plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.kernels.backend import choose_backend
from moe.layers import FeedForward, GShardRouter, MoE

from . import counts
from .contender import Contender, Cost
from .loads import Shape, make_router_weight, make_tokens

DRAWN = 64  # experts with drawn weights; further ones are copies with shifted rows, which take a tenth of the time
SAMPLED_EXPERTS = 3  # experts whose gradients are checked; all of 512 would take longer than the measurement


@dataclass(frozen=True)
class LayerCase:
    """Weights in nn.Linear's orientation, tokens and an upstream gradient, on one device in one dtype."""

    shape: Shape
    routing: str
    router: Tensor  # (E, D)
    w_in: Tensor  # (E, F, D)
    w_gate: Tensor | None  # (E, F, D): SiLU-gated; without it the activation is GELU
    w_out: Tensor  # (E, D, F)
    x: Tensor  # (T, D)
    upstream: Tensor  # (T, D)

    @classmethod
    def make(cls, shape: Shape, routing: str, *, gated: bool, device: torch.device, seed: int = 0) -> LayerCase:
        """Draw a case in float32. The scale keeps every intermediate near 1."""
        generator = torch.Generator().manual_seed(seed)
        router = make_router_weight(shape, generator)

        def stack(rows: int, columns: int) -> Tensor:
            drawn = torch.randn(min(shape.E, DRAWN), rows, columns, generator=generator).mul_(columns**-0.5)
            shifted = [drawn[: shape.E - e].roll(e // DRAWN, dims=1) for e in range(0, shape.E, DRAWN)]
            return torch.cat(shifted).to(device)

        w_in, w_out = stack(shape.F, shape.D), stack(shape.D, shape.F)
        w_gate = stack(shape.F, shape.D) if gated else None
        x = make_tokens(routing, shape, router, generator).to(device)
        upstream = torch.randn(shape.T, shape.D, generator=generator).to(device)
        return cls(shape, routing, router.to(device), w_in, w_gate, w_out, x, upstream)

    def to(self, dtype: torch.dtype) -> LayerCase:
        """The same numbers rounded to `dtype`; the same tensors if they already have it."""
        gate = None if self.w_gate is None else self.w_gate.to(dtype)
        tensors = (self.router, self.w_in, self.w_out, self.x, self.upstream)
        router, w_in, w_out, x, upstream = (tensor.to(dtype) for tensor in tensors)
        return LayerCase(self.shape, self.routing, router, w_in, gate, w_out, x, upstream)

    def with_routing(self, routing: str, seed: int = 1) -> LayerCase:
        """The same weights with another load."""
        generator = torch.Generator().manual_seed(seed)
        x = make_tokens(routing, self.shape, self.router.cpu(), generator).to(self.x)
        return LayerCase(self.shape, routing, self.router, self.w_in, self.w_gate, self.w_out, x, self.upstream)

    @property
    def gated(self) -> bool:
        return self.w_gate is not None

    @property
    def load(self) -> Tensor:
        """(E,) rows of each expert by top-k of the logits."""
        chosen = F.linear(self.x.float(), self.router.float()).topk(self.shape.K, dim=1).indices
        return torch.bincount(chosen.flatten(), minlength=self.shape.E)

    def sampled(self) -> list[int]:
        """The experts whose gradients are checked: the busiest, and the last of the others that have rows."""
        load = self.load
        busy = load.nonzero().flatten().tolist()
        return sorted({int(load.argmax()), *busy[-(SAMPLED_EXPERTS - 1) :]})

    def cost(self, *, formula: bool = False, note: str = "") -> Cost:
        return counts.layer_cost(
            self.shape,
            gated=self.gated,
            busy_experts=int((self.load > 0).sum()),
            element_bytes=self.w_in.element_size(),
            formula=formula,
            note=note,
        )

    def leaf(self) -> Tensor:
        """The tokens as an input that requires a gradient, as inside a model."""
        return self.x.clone().requires_grad_()


def uniform_case(shape: Shape, device: torch.device, *, gated: bool = False) -> LayerCase:
    """A layer under uniform load. GELU's is drawn once and shared by all benchmarks; SwiGLU's is rarely used."""
    return LayerCase.make(shape, "uniform", gated=True, device=device) if gated else _shared_case(shape, device)


@lru_cache(maxsize=3)
def _shared_case(shape: Shape, device: torch.device) -> LayerCase:
    return LayerCase.make(shape, "uniform", gated=False, device=device)


Split = Callable[[Sequence[Tensor]], Mapping[str, Tensor]]  # parameter gradients -> gradients by canonical name


def contend(
    case: LayerCase,
    name: str,
    call: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    split: Split | None,
    cost: Cost,
    *,
    x: Tensor | None = None,
    upstream: Tensor | None = None,
    **options: Any,
) -> Contender:
    """Forward and backward of `call`, for x and all `parameters`; `split` names the gradients for the check."""
    x = case.leaf() if x is None else x
    upstream = case.upstream if upstream is None else upstream
    leaves = [x, *parameters]

    def outcome(y: Tensor, grads: Sequence[Tensor]) -> Mapping[str, Tensor]:
        assert split is not None
        named = {"y": y.reshape(case.x.shape), "gradient of x": grads[0].reshape(case.x.shape)}
        return named | dict(split(grads[1:]))

    return Contender(
        name=name,
        forward=lambda: call(x),
        backward=lambda y: torch.autograd.grad(y, leaves, upstream),
        outcome=None if split is None else outcome,
        cost=cost,
        dtype=case.w_in.dtype,
        routing=case.routing,
        parameters=tuple(parameters),
        **options,
    )


def canonical(case: LayerCase, experts: Sequence[int]) -> Split:
    """For gradients in the order router, w_in, w_out and, if gated, w_gate: only those of the sampled experts."""
    names = ("router", "w_in", "w_out", "w_gate")

    def split(grads: Sequence[Tensor]) -> dict[str, Tensor]:
        return {
            f"gradient of {name}": grad if name == "router" else grad[list(experts)]
            for name, grad in zip(names, grads, strict=False)
        }

    return split


def parameters_of(case: LayerCase) -> list[nn.Parameter]:
    """Router, w_in, w_out and, if gated, w_gate, sharing the case's memory: weights are read, never written."""
    tensors = [case.router, case.w_in, case.w_out, *([] if case.w_gate is None else [case.w_gate])]
    return [nn.Parameter(tensor) for tensor in tensors]


def ours(
    case: LayerCase,
    experts: Sequence[int],
    *,
    name: str = "ours",
    backend: str = "auto",
    persistent: bool = True,
) -> Contender:
    """moe.layers.MoE. persistent: keep gradient memory across steps, as the trainer does."""
    layer, parameters = _our_layer(case, None, backend)
    layer.experts.persistent_grad(persistent)
    runs_on = choose_backend("expert_ffn", backend, case.x.device.type, has_triton=True)
    cost = _our_cost(case, runs_on)
    return contend(case, name, lambda x: layer(x)[0], parameters, canonical(case, experts), cost, backend=runs_on)


def ours_under_loads(case: LayerCase, routings: Sequence[str], *, backend: str = "auto") -> list[Contender]:
    """One layer, and so one gradient memory, under several loads; each with its own reference."""
    layer, parameters = _our_layer(case, None, backend)
    layer.experts.persistent_grad(True)
    runs_on = choose_backend("expert_ffn", backend, case.x.device.type, has_triton=True)
    contenders = []
    for routing in routings:
        loaded = case if routing == case.routing else case.with_routing(routing)
        experts = loaded.sampled()
        contender = contend(
            loaded,
            f"ours {case.shape} {routing}",
            lambda x: layer(x)[0],
            parameters,
            canonical(loaded, experts),
            _our_cost(loaded, runs_on),
            backend=runs_on,
        )
        contenders.append(replace(contender, reference=reference_loop(loaded, experts)))
    return contenders


def _our_cost(case: LayerCase, runs_on: str) -> Cost:
    return _with_tile_padding(case, case.cost()) if runs_on == "triton" else case.cost(formula=runs_on == "torch")


def ours_gshard(case: LayerCase) -> Contender:
    """The same experts with the paper's gate, which drops tokens beyond its capacity."""
    router = GShardRouter(case.shape.D, case.shape.E, device="meta")
    layer, parameters = _our_layer(case, router, "auto")
    layer.experts.persistent_grad(True)
    why = "capacity drops rows: another function"
    return contend(
        case, "ours, GShard gate", lambda x: layer(x)[0], parameters, None, case.cost(note=why), unchecked=why
    )


def _our_layer(case: LayerCase, router: GShardRouter | None, backend: str) -> tuple[MoE, list[nn.Parameter]]:
    shape = case.shape
    activation = "silu" if case.gated else "gelu"
    layer = MoE(
        shape.D, shape.F, shape.E, shape.K, activation=activation, gated=case.gated, router=router, backend=backend,
        device="meta", dtype=case.w_in.dtype,
    )  # fmt: skip
    parameters = parameters_of(case)
    layer.router.weight, layer.experts.w_in, layer.experts.w_out = parameters[:3]
    if case.gated:
        layer.experts.w_gate = parameters[3]
    return layer, parameters


def _with_tile_padding(case: LayerCase, cost: Cost) -> Cost:
    """On a GPU every expert's rows are padded to whole tiles of the grouped GEMM."""
    from moe.kernels.grouped_gemm.triton_tiles import choose_tile  # loads Triton

    shape = case.shape
    rows = shape.T * shape.K
    tile = choose_tile(rows, shape.E, shape.F, shape.D, case.x.dtype).rows
    executed = int((-(-case.load // tile) * tile).sum())
    padded = executed / rows
    routed = counts.TRAINING * counts.experts_forward_flops(rows, shape, gated=case.gated)
    return Cost(
        flops=cost.flops,
        bytes=cost.bytes,
        forward_flops=cost.forward_flops,
        executed_flops=cost.flops + routed * (padded - 1),
        padded_share=1 - 1 / padded,
    )


def dense(case: LayerCase, *, name: str = "dense") -> Contender:
    """One network of width K·F in plain torch: equal active FLOPs, no router."""
    w_in, w_out, *gate = parameters = _dense_parameters(case)

    def call(x: Tensor) -> Tensor:
        hidden = F.linear(x, w_in)
        hidden = F.silu(F.linear(x, gate[0])) * hidden if gate else F.gelu(hidden)
        return F.linear(hidden, w_out)

    cost = counts.dense_cost(case.shape, gated=case.gated, element_bytes=w_in.element_size())
    return contend(case, name, call, parameters, None, cost, unchecked="no experts")


def our_dense(case: LayerCase) -> Contender:
    """The same network as moe.layers.FeedForward, which our dense models use."""
    shape = case.shape
    layer = FeedForward(
        shape.D, shape.K * shape.F, activation="silu" if case.gated else "gelu", gated=case.gated, device="meta"
    )
    parameters = _dense_parameters(case)
    layer.w_in, layer.w_out = parameters[:2]
    if case.gated:
        layer.w_gate = parameters[2]
    cost = counts.dense_cost(shape, gated=case.gated, element_bytes=case.w_in.element_size())
    return contend(case, "dense, FeedForward", layer, parameters, None, cost, unchecked="no experts")


def _dense_parameters(case: LayerCase) -> list[nn.Parameter]:
    """w_in (K·F, D), w_out (D, K·F) and, if gated, w_gate: K experts side by side."""
    shape, k = case.shape, case.shape.K
    stacks = [case.w_in, *([] if case.w_gate is None else [case.w_gate])]
    w_in, *gate = [nn.Parameter(stack[:k].reshape(k * shape.F, shape.D).clone()) for stack in stacks]
    w_out = nn.Parameter(case.w_out[:k].transpose(0, 1).reshape(shape.D, k * shape.F).clone())
    return [w_in, w_out, *gate]


def plain_routing(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax top-k with normalised weights, in plain torch.

    (T, D), (E, D) -> token of each row (R,), weight of each row (R,), rows of each expert (E,), its end (E,) int32.
    """
    probs = F.linear(x.float(), router.float()).softmax(dim=1)  # (T, E)
    weights, experts = probs.topk(top_k, dim=1)
    weights = weights / weights.sum(dim=1, keepdim=True)
    order = experts.flatten().argsort(stable=True)
    load = torch.bincount(experts.flatten(), minlength=router.shape[0])
    return order // top_k, weights.flatten()[order].to(x.dtype), load, load.cumsum(0).to(torch.int32)


def _plain(
    case: LayerCase, name: str, experts: Sequence[int], network: Callable[..., Tensor], *, peer: bool = True
) -> Contender:
    parameters = parameters_of(case)
    router, *weights = parameters

    def call(x: Tensor) -> Tensor:
        token, row_weights, load, ends = plain_routing(x, router, case.shape.K)
        y = network(x[token], load, ends, *weights)
        return torch.zeros_like(x).index_add(0, token, y * row_weights[:, None])

    return contend(case, name, call, parameters, canonical(case, experts), case.cost(), peer=peer)


def loop_over_unbind(case: LayerCase, experts: Sequence[int]) -> Contender:
    """A loop over `w.unbind(0)`, differentiated by autograd: one gradient per whole stack."""

    def network(rows: Tensor, load: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        return _loop(rows, load, [weight.unbind(0) for weight in weights])

    return _plain(case, "loop over w.unbind", experts, network)


def reference_loop(case: LayerCase, experts: Sequence[int]) -> Contender:
    """The reference for the check: a loop over `w.unbind(0)`, with gradients for the sampled experts' matrices only.

    The others are constants, so that no gradient of a whole stack is computed: 512 experts would take seconds for it.
    """
    router = nn.Parameter(case.router)
    stacks = [case.w_in, case.w_out, *([] if case.w_gate is None else [case.w_gate])]
    leaves = [[nn.Parameter(stack[e]) for e in experts] for stack in stacks]
    matrices = [list(stack.unbind(0)) for stack in stacks]
    for own, each in zip(matrices, leaves, strict=True):
        for e, leaf in zip(experts, each, strict=True):
            own[e] = leaf

    def call(x: Tensor) -> Tensor:
        token, row_weights, load, _ = plain_routing(x, router, case.shape.K)
        y = _loop(x[token], load, matrices)
        return torch.zeros_like(x).index_add(0, token, y * row_weights[:, None])

    def split(grads: Sequence[Tensor]) -> Mapping[str, Tensor]:
        n = len(experts)
        of_stacks = [torch.stack(list(grads[1 + i * n : 1 + (i + 1) * n])) for i in range(len(stacks))]
        return canonical(case, range(n))([grads[0], *of_stacks])

    parameters = [router, *(leaf for each in leaves for leaf in each)]
    return contend(case, "loop", call, parameters, split, case.cost())


def loop_over_index(case: LayerCase, experts: Sequence[int]) -> Contender:
    """A loop over `w[e]`, as in torchtitan: the backward of each index fills a gradient of the whole stack."""

    def network(rows: Tensor, load: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        return _loop(rows, load, weights)

    return _plain(case, "loop over w[e]", experts, network)


def _loop(rows: Tensor, load: Tensor, weights: Sequence[Any]) -> Tensor:
    outputs = []
    for e, part in enumerate(rows.split(load.tolist())):
        if part.shape[0] == 0:
            continue
        hidden = F.linear(part, weights[0][e])
        hidden = F.gelu(hidden) if len(weights) == 2 else F.silu(F.linear(part, weights[2][e])) * hidden
        outputs.append(F.linear(hidden, weights[1][e]))
    return torch.cat(outputs)


def grouped_mm(case: LayerCase, experts: Sequence[int]) -> Contender:
    """torch's F.grouped_mm, differentiated by autograd."""

    def network(rows: Tensor, load: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        hidden = F.grouped_mm(rows, weights[0].mT, offs=ends)
        hidden = F.gelu(hidden) if len(weights) == 2 else F.silu(F.grouped_mm(rows, weights[2].mT, offs=ends)) * hidden
        return F.grouped_mm(hidden, weights[1].mT, offs=ends)

    return _plain(case, "F.grouped_mm", experts, network)
