"""One layer of the decoder: attention, then a dense or sparse feed-forward part."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config.checks import require_choice
from moe.layers.arguments import require_dropout
from moe.layers.attention import Attention, LayerCache
from moe.layers.feed_forward import FeedForward
from moe.layers.initialization import DEFAULT_INIT, WeightInit
from moe.layers.moe import MoE
from moe.layers.norm import make_norm
from moe.layers.position import Rotation
from moe.layers.routing import Routing


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); with `norm_position` "post" the norm follows the sum.

    `feed_forward` is a FeedForward or an MoE: the only difference between a dense model and its sparse twin.
    """

    def __init__(
        self,
        attention: Attention,
        feed_forward: FeedForward | MoE,
        d_model: int,
        *,
        norm: str = "layernorm",
        norm_position: str = "pre",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_choice("norm_position", norm_position, ("pre", "post"))
        require_dropout(dropout)
        self.pre_norm = norm_position == "pre"
        self.dropout = dropout
        self.attention_norm = make_norm(norm, d_model, norm_eps, device=device, dtype=dtype)
        self.attention = attention
        self.feed_forward_norm = make_norm(norm, d_model, norm_eps, device=device, dtype=dtype)
        self.feed_forward = feed_forward

    def reset_parameters(self, seed: int | None = None, layer: int = 0, init: WeightInit = DEFAULT_INIT) -> None:
        """Draw every weight of the layer from (seed, layer); norms restart at the identity."""
        self.attention_norm.reset_parameters()
        self.feed_forward_norm.reset_parameters()
        self.attention.reset_parameters(seed, layer, init)
        self.feed_forward.reset_parameters(seed, layer, init)

    def forward(
        self,
        x: Tensor,
        *,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        cache_length: int = 0,
        noise_seed: int | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """(B, S, D) -> (B, S, D) and the routing of a sparse layer, None for a dense one.

        noise_seed: seeds the router's random draws; unlike a generator, a seed repeats them on recomputation.
        """
        attended = self.attention(
            self.attention_norm(x) if self.pre_norm else x,
            rotation=rotation,
            mask=mask,
            cache=cache,
            cache_length=cache_length,
        )
        x = x + F.dropout(attended, self.dropout, self.training)
        if not self.pre_norm:
            x = self.attention_norm(x)
        update, routing = self._feed(self.feed_forward_norm(x) if self.pre_norm else x, token_mask, noise_seed)
        x = x + update  # dropout is inside the feed-forward part, before the experts are combined (Artetxe et al. 2021)
        return (x if self.pre_norm else self.feed_forward_norm(x)), routing

    def _feed(self, x: Tensor, token_mask: Tensor | None, noise_seed: int | None) -> tuple[Tensor, Routing | None]:
        if not isinstance(self.feed_forward, MoE):
            return self.feed_forward(x), None
        generator = None if noise_seed is None else torch.Generator(x.device).manual_seed(noise_seed)
        return self.feed_forward(x, token_mask=token_mask, generator=generator)
