"""Reduce per-token losses and routings to one differentiable loss, and report its parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe.config import MoEConfig
from moe.layers.router_losses import load_balance_loss, router_z_loss
from moe.model import ModelOutput


class LossOutput(NamedTuple):
    """The loss of one micro-batch. All scalars; the parts for reporting are unweighted and detached."""

    cross_entropy: Tensor  # nats per target, differentiable
    auxiliary: Tensor | None  # the weighted auxiliary losses, differentiable; None for a dense model
    load_balance_loss: Tensor | None  # over sparse layers; None for a dense model
    router_z_loss: Tensor | None  # mean over sparse layers; None for a dense model
    num_targets: int | Tensor  # counted losses: the weight of `cross_entropy` in the global mean
    num_tokens: int | Tensor  # routed tokens: the weight of `auxiliary`

    @property
    def loss(self) -> Tensor:
        """The loss of this micro-batch alone, differentiable."""
        return self.cross_entropy if self.auxiliary is None else self.cross_entropy + self.auxiliary

    def share(self, num_targets: int, num_tokens: int) -> Tensor:
        """This micro-batch's part of the loss of a step with these totals, differentiable."""
        part = self.cross_entropy * (int(self.num_targets) / num_targets)
        return part if self.auxiliary is None else part + self.auxiliary * (int(self.num_tokens) / num_tokens)


def compute_loss(
    output: ModelOutput,
    token_mask: Tensor | None,
    moe: MoEConfig | None,
    group: dist.ProcessGroup | None = None,
    *,
    loss_mask: Tensor | None = None,
) -> LossOutput:
    """Mean cross-entropy over the targets plus the auxiliary losses of `moe` (docs/gradient_contract.md).

    token_mask: (B, S) bool, False for padding. loss_mask: (B, S) bool, True where the target counts; None counts all
    but padding. The auxiliary losses cover all routed tokens. group: the ranks over which `moe.load_balance_scope`
    "global" counts; None is this process alone.

    Both auxiliary losses are means over the sparse layers, except that `moe.load_balance_reduction` "sum" sums the
    load-balance losses, as the paper does (Artetxe et al. 2021).
    """
    losses = output.token_losses
    if losses is None:
        raise ValueError("the model output has no token_losses: call the model with targets")
    num_tokens: int | Tensor = losses.numel() if token_mask is None else token_mask.sum()
    counted = token_mask if loss_mask is None else loss_mask
    if counted is None:
        num_targets = num_tokens
        cross_entropy = losses.sum() / losses.numel()
    else:
        num_targets = counted.sum()
        cross_entropy = torch.where(counted, losses, 0.0).sum() / num_targets.clamp_min(1)
    if moe is None or not output.routings:
        return LossOutput(cross_entropy, None, None, None, num_targets, num_tokens)
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
    auxiliary = moe.load_balance_weight * load_balance + moe.router_z_loss_weight * router_z
    return LossOutput(cross_entropy, auxiliary, load_balance.detach(), router_z.detach(), num_targets, num_tokens)


def _reduce(per_layer: list[Tensor], reduction: str) -> Tensor:
    total = torch.stack(per_layer).sum()
    return total if reduction == "sum" else total / len(per_layer)
