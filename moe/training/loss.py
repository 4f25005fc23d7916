"""From per-token losses and routings to one number to differentiate, and the parts it is made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe.config import MoEConfig
from moe.layers.router_losses import load_balance_loss, router_z_loss
from moe.model import ModelOutput


class LossOutput(NamedTuple):
    """The loss of one micro-batch. All scalars; the auxiliary parts are unweighted, reduced over sparse layers."""

    loss: Tensor  # to differentiate: cross_entropy plus the weighted auxiliary losses
    cross_entropy: Tensor  # nats per valid token, detached
    load_balance_loss: Tensor | None  # detached; None for a dense model
    router_z_loss: Tensor | None  # detached; None for a dense model
    num_tokens: int | Tensor  # valid tokens: the weight of this micro-batch in the global mean


def compute_loss(
    output: ModelOutput, token_mask: Tensor | None, moe: MoEConfig | None, group: dist.ProcessGroup | None = None
) -> LossOutput:
    """Cross-entropy over valid tokens plus the auxiliary losses of `moe` (docs/gradient_contract.md).

    group: the ranks over which `moe.load_balance_scope` "global" counts; None is this process alone.

    Both auxiliary losses are means over the sparse layers, except that `moe.load_balance_reduction` "sum" adds
    the load-balance losses up, as the paper does (moe_lm.md 4.4).
    """
    losses = output.token_losses
    if losses is None:
        raise ValueError("the model output has no token_losses: call the model with targets")
    if token_mask is None:
        num_tokens: int | Tensor = losses.numel()
        cross_entropy = losses.sum() / num_tokens
    else:
        num_tokens = token_mask.sum()
        cross_entropy = torch.where(token_mask, losses, 0.0).sum() / num_tokens.clamp_min(1)
    if moe is None or not output.routings:
        return LossOutput(cross_entropy, cross_entropy.detach(), None, None, num_tokens)
    scope, over = moe.load_balance_scope, None
    if scope == "global":
        scope, over = ("local", None) if group is None else (scope, group)
    load_balance = _reduce(
        [
            load_balance_loss(routing, choices=moe.load_balance_choices, scope=scope, group=over)
            for routing in output.routings
        ],
        moe.load_balance_reduction,
    )
    router_z = _reduce([router_z_loss(routing) for routing in output.routings], "mean")
    loss = cross_entropy + moe.load_balance_weight * load_balance + moe.router_z_loss_weight * router_z
    return LossOutput(loss, cross_entropy.detach(), load_balance.detach(), router_z.detach(), num_tokens)


def _reduce(per_layer: list[Tensor], reduction: str) -> Tensor:
    total = torch.stack(per_layer).sum()
    return total if reduction == "sum" else total / len(per_layer)
