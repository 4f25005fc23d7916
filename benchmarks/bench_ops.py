"""Each op alone next to plain torch: the experts under three loads, the permutation, routing and the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.backend import choose_backend
from moe.kernels.expert_ffn import GradientMemory, expert_ffn
from moe.kernels.grouped_gemm import grouped_gemm
from moe.kernels.linear_cross_entropy import linear_cross_entropy
from moe.kernels.permute import permute, sort_by_expert, unpermute
from moe.kernels.topk_routing import top_k_routing

from . import counts
from . import layer_contenders as layers
from .contender import Contender, Cost
from .loads import ROUTINGS, Shape
from .suite import Ratio, Suite


def op(
    name: str,
    forward: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    upstream: Tensor,
    cost: Cost,
    **options: Any,
) -> Contender:
    """Forward and all gradients of an op with inputs `leaves`."""
    inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves]

    def outcome(y: Tensor, grads: Sequence[Tensor]) -> Mapping[str, Tensor]:
        return {"y": y, **{f"gradient {i}": grad for i, grad in enumerate(grads)}}

    return Contender(
        name=name,
        forward=lambda: forward(*inputs),
        backward=lambda y: torch.autograd.grad(y, inputs, upstream.to(y)),
        outcome=outcome,
        cost=cost,
        dtype=leaves[0].dtype,
        parameters=tuple(inputs[1:]),
        **options,
    )


def middle(suite: Suite) -> Shape:
    """The shape for ops: the middle one of the layer shapes."""
    shapes = suite.options.layer_shapes
    return shapes[len(shapes) // 2]


def backends(suite: Suite, name: str) -> list[tuple[str, str]]:
    """(requested, resolved) for each requested backend."""
    asked = suite.options.backends
    return [(each, choose_backend(name, each, suite.device.type, has_triton=True)) for each in asked]


@pytest.mark.parametrize("routing", ROUTINGS)
def bench_expert_ffn(routing: str, suite: Suite) -> None:
    shape = middle(suite)
    uniform = layers.uniform_case(shape, suite.device)
    case = uniform if routing == "uniform" else uniform.with_routing(routing)
    load = case.load
    offsets = F.pad(load.cumsum(0), (1, 0))
    ends, bounds = offsets[1:].to(torch.int32), load.tolist()
    num_rows = shape.T * shape.K
    generator = torch.Generator().manual_seed(2)
    rows, upstream = (torch.randn(num_rows, shape.D, generator=generator).to(suite.device) for _ in range(2))

    def loop(rows: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        parts = zip(rows.split(bounds), w_in.unbind(0), w_out.unbind(0), strict=True)
        return torch.cat([F.linear(F.gelu(F.linear(x, a)), b) for x, a, b in parts])

    def grouped(rows: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return F.grouped_mm(F.gelu(F.grouped_mm(rows, w_in.mT, offs=ends)), w_out.mT, offs=ends)

    def ours(backend: str) -> Callable[..., Tensor]:
        memory = GradientMemory()
        return lambda rows, w_in, w_out: expert_ffn(
            rows, offsets, w_in, None, w_out, None, None, activation="gelu", backend=backend, gradient_memory=memory
        )

    def one(rows: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(rows, w_in)), w_out)

    options: dict[str, Any] = {"routing": routing}
    contenders: list[Contender] = []
    reference: Contender | None = None
    for dtype in dict.fromkeys([torch.float32, *suite.options.torch_dtypes]):
        leaves = [each.to(dtype) for each in (rows, case.w_in, case.w_out)]
        size = leaves[0].element_size()
        cost = counts.experts_cost(num_rows, shape, gated=False, busy_experts=int((load > 0).sum()), element_bytes=size)
        if reference is None:
            reference = op("loop", loop, leaves, upstream, cost, **options)
        if dtype not in suite.options.torch_dtypes:
            continue
        options["reference"] = reference
        for asked, found in backends(suite, "expert_ffn"):
            name = "ours" if asked == "auto" else f"ours, {asked}"
            contenders.append(op(name, ours(asked), leaves, upstream, cost, backend=found, **options))
        contenders.append(op("F.grouped_mm", grouped, leaves, upstream, cost, peer=True, **options))
        single = replace(cost, bytes=size * (3.0 * 2 * shape.D * shape.F + 5 * num_rows * shape.D), padded_share=None)
        twin = op("dense", one, [leaves[0], leaves[1][0], leaves[2][0]], upstream, single, routing=routing)
        contenders.append(replace(twin, outcome=None, unchecked="one network"))
    suite.run(
        f"expert_ffn, {shape}, {routing}", contenders, ratios=[Ratio("ours [fp32]", "F.grouped_mm [fp32]")], few=True
    )


def bench_grouped_gemm(suite: Suite) -> None:
    shape = middle(suite)
    case = layers.uniform_case(shape, suite.device)
    load = case.load
    offsets = F.pad(load.cumsum(0), (1, 0))
    ends = offsets[1:].to(torch.int32)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(shape.T * shape.K, shape.D, generator=generator).to(suite.device)
    upstream = torch.randn(shape.T * shape.K, shape.F, generator=generator).to(suite.device)
    leaves = [rows, case.w_in]
    numbers = 3 * case.w_in.numel() + 3 * (rows.numel() + upstream.numel())
    cost = Cost(flops=6.0 * rows.shape[0] * shape.D * shape.F, bytes=4.0 * numbers, padded_share=0.0)

    def loop(rows: Tensor, weight: Tensor) -> Tensor:
        parts = zip(rows.split(load.tolist()), weight.unbind(0), strict=True)
        return torch.cat([F.linear(x, w) for x, w in parts])

    reference = op("loop over unbind", loop, leaves, upstream, cost)
    contenders = [
        op(
            "ours" if asked == "auto" else f"ours, {asked}",
            lambda rows, weight, asked=asked: grouped_gemm(rows, weight, offsets, backend=asked),
            leaves,
            upstream,
            cost,
            backend=found,
            reference=reference,
        )
        for asked, found in backends(suite, "grouped_gemm")
    ]
    contenders.append(
        op("F.grouped_mm", lambda rows, weight: F.grouped_mm(rows, weight.mT, offs=ends), leaves, upstream, cost,
           peer=True, reference=reference)
    )  # fmt: skip
    contenders.append(replace(reference, peer=True, unchecked="the reference"))
    suite.run(f"grouped_gemm, {shape}", contenders, ratios=[Ratio("ours [fp32]", "F.grouped_mm [fp32]")], few=True)


def bench_permutation(suite: Suite) -> None:
    """To the experts' rows and back, including the sort, with no experts in between."""
    shape = middle(suite)
    case = layers.uniform_case(shape, suite.device)
    indices = F.linear(case.x, case.router).topk(shape.K, dim=1).indices
    kept = torch.ones_like(indices, dtype=torch.bool)
    weights = torch.rand(shape.T, shape.K, generator=torch.Generator().manual_seed(3)).to(suite.device)

    def plain(x: Tensor, weights: Tensor) -> Tensor:
        order = indices.flatten().argsort(stable=True)
        token = order // shape.K
        return torch.zeros_like(x).index_add(0, token, x[token] * weights.flatten()[order, None])

    def ours(backend: str) -> Callable[..., Tensor]:
        def call(x: Tensor, weights: Tensor) -> Tensor:
            order = sort_by_expert(indices, kept, shape.E, backend=backend)
            return unpermute(permute(x, order, backend=backend), weights, order, backend=backend)

        return call

    moved = counts.permutation_bytes(shape.T, shape.D, shape.K, element_bytes=4, training=True)
    cost = counts.moved_cost(moved)
    reference = op("plain torch", plain, [case.x, weights], case.upstream, cost, unchecked="the reference")
    contenders = [
        op("ours" if asked == "auto" else f"ours, {asked}", ours(asked), [case.x, weights], case.upstream, cost,
           backend=found, reference=reference)
        for asked, found in backends(suite, "permute")
    ]  # fmt: skip
    suite.run(
        f"sort, permute, unpermute, {shape}",
        [*contenders, reference],
        ratios=[Ratio("ours [fp32]", "plain torch [fp32]")],
        few=True,
    )


def bench_top_k_routing(suite: Suite) -> None:
    """From logits to normalised weights, including the gradient of the weights."""
    shape = middle(suite)
    case = layers.uniform_case(shape, suite.device)
    logits = F.linear(case.x, case.router)
    upstream = torch.rand(shape.T, shape.K, generator=torch.Generator().manual_seed(3)).to(suite.device)

    def plain(logits: Tensor) -> Tensor:
        weights = logits.softmax(dim=1).topk(shape.K, dim=1).values
        return weights / weights.sum(dim=1, keepdim=True)

    def ours(backend: str) -> Callable[[Tensor], Tensor]:
        return lambda logits: top_k_routing(logits, shape.K, normalize=True, backend=backend).expert_weights

    cost = counts.moved_cost(4.0 * shape.T * (4 * shape.E + 4 * shape.K))  # logits, probabilities, two gradients
    reference = op("plain torch", plain, [logits], upstream, cost, unchecked="the reference")
    contenders = [
        op("ours" if asked == "auto" else f"ours, {asked}", ours(asked), [logits], upstream, cost, backend=found,
           reference=reference)
        for asked, found in backends(suite, "top_k_routing")
    ]  # fmt: skip
    suite.run(f"top_k_routing, {shape}", [*contenders, reference], few=True)


def bench_linear_cross_entropy(suite: Suite) -> None:
    small = suite.options.small
    tokens, width, vocab = (512, 64, 2048) if small else (2048, 256, 8192)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(tokens, width, generator=generator).to(suite.device)
    weight = torch.randn(vocab, width, generator=generator).mul_(width**-0.5).to(suite.device)
    targets = torch.randint(vocab, (tokens,), generator=generator).to(suite.device)
    upstream = torch.full((tokens,), 1 / tokens, device=suite.device)
    cost = counts.head_cost(tokens, width, vocab, element_bytes=4)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")

    def ours(backend: str) -> Callable[..., Tensor]:
        return lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, backend=backend)

    again = replace(cost, executed_flops=cost.flops * 4 / 3)  # the backward recomputes the logits
    leaves = [hidden, weight]
    reference = op("F.linear, F.cross_entropy", plain, leaves, upstream, cost, unchecked="the reference")
    contenders = []
    for asked, found in backends(suite, "linear_cross_entropy"):
        name = "ours" if asked == "auto" else f"ours, {asked}"
        early = found == "torch" and suite.device.type == "cpu"  # gradients are computed in the forward
        needed = cost if early or found == "reference" else again
        contenders.append(op(name, ours(asked), leaves, upstream, needed, backend=found, reference=reference))
    suite.run(
        f"linear_cross_entropy, T={tokens} D={width} V={vocab}",
        [*contenders, reference],
        ratios=[Ratio("ours [fp32]", "F.linear, F.cross_entropy [fp32]")],
        few=True,
    )
