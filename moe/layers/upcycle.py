"""Turn a dense network into experts that compute the same function, so that training continues from where it was.

Komatsuzaki et al. 2023 (sparse upcycling) copy the network; He et al. 2024 (arXiv 2410.07524) also split it into
finer experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe.layers.feed_forward import FeedForward
from moe.layers.initialization import DEFAULT_INIT, WeightInit
from moe.layers.moe import MoE
from moe.layers.router import TopKRouter


@torch.no_grad()
def upcycle(
    feed_forward: FeedForward,
    num_experts: int,
    top_k: int = 2,
    *,
    granularity: int = 1,
    seed: int | None = None,
    layer: int = 0,
    init: WeightInit = DEFAULT_INIT,
    backend: str = "auto",
) -> MoE:
    """An MoE of `num_experts` experts that computes what `feed_forward` computes, whichever experts a token chooses.

    granularity G cuts the network into G slices of d_ff / G: expert c·G + g is slice g of copy c, and all slices of one
    copy start with the same router weight, so that a token's top_k experts are top_k / G whole copies. Weights are
    normalised over the chosen and multiplied by G. With G = 1 every expert is a copy. Equality is up to rounding: the
    mathematics is exact, but sums are taken in another order.

    The router is drawn from (seed, layer) and all copies are equal: the router's choices make experts diverge.
    feed_forward is left unchanged; dropout, activation, biases, device and dtype carry over. Raises ValueError for
    numbers that would not preserve the function, TypeError for a network of another class.
    """
    if not isinstance(feed_forward, FeedForward):
        raise TypeError(
            f"upcycle copies a moe.layers.FeedForward, not a {type(feed_forward).__name__}: build one of that "
            f"shape and load the weights of its nn.Linear layers as w_in, w_gate and w_out (docs/layers.md)"
        )
    d_model, d_ff = feed_forward.w_out.shape
    require_function_preserving(d_ff, num_experts, top_k, granularity)
    factory: dict[str, Any] = {"device": feed_forward.w_out.device, "dtype": feed_forward.w_out.dtype}
    moe = MoE(
        d_model,
        d_ff // granularity,
        num_experts,
        top_k,
        activation=feed_forward.activation,
        gated=feed_forward.w_gate is not None,
        bias=feed_forward.b_in is not None,
        dropout=feed_forward.dropout,
        router=TopKRouter(
            d_model, num_experts, top_k, normalize=True, weight_scale=float(granularity), backend=backend, **factory
        ),
        backend=backend,
        **factory,
    )
    moe.router.reset_parameters(seed, layer, init)
    first_of_copy = moe.router.weight[::granularity].clone()  # (copies, D)
    moe.router.weight.copy_(first_of_copy.repeat_interleave(granularity, dim=0))
    copies = num_experts // granularity
    for name, dense in feed_forward.named_parameters():
        slices = _slices(name, dense, granularity)  # (G, ...)
        getattr(moe.experts, name).copy_(slices.repeat(copies, *[1] * (slices.dim() - 1)))
    return moe.train(feed_forward.training)


def require_function_preserving(d_ff: int, num_experts: int, top_k: int, granularity: int) -> None:
    """Raise ValueError unless experts cut from a network of width d_ff can add up to it again."""
    if granularity < 1 or d_ff % granularity != 0:
        raise ValueError(f"granularity ({granularity}) must be at least 1 and divide d_ff ({d_ff})")
    for name, value in (("num_experts", num_experts), ("top_k", top_k)):
        if value % granularity != 0:
            raise ValueError(
                f"{name} ({value}) must be a multiple of granularity ({granularity}): "
                f"a token needs all {granularity} slices of a copy to compute the dense function"
            )
    if top_k == 1:
        raise ValueError(
            "top_k (1) must be at least 2: a single normalised weight is always 1, so the router would get no "
            "gradient, and an unnormalised weight would scale the dense function by a probability"
        )


def _slices(name: str, dense: Tensor, granularity: int) -> Tensor:
    """One parameter of the dense network, cut into its G slices. -> (G, ...)"""
    if name == "b_out":  # each slice adds its share
        return (dense / granularity).expand(granularity, -1)
    if name == "w_out":  # (D, F) -> (G, D, F/G)
        return dense.unflatten(1, (granularity, -1)).transpose(0, 1)
    return dense.unflatten(0, (granularity, -1))  # (F, ...) -> (G, F/G, ...)
