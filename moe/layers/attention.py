"""Causal self-attention with grouped key-value heads, for training and for generation with a cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config.checks import require_choice
from moe.kernels.linear import linear
from moe.layers.arguments import require_count, require_dropout
from moe.layers.initialization import DEFAULT_INIT, WeightInit, draw_whole, parameter_generator
from moe.layers.norm import make_norm
from moe.layers.position import Rotation, rotate


class LayerCache(NamedTuple):
    """Keys and values of one layer, allocated once at the maximum length. Written in place by `Attention`."""

    keys: Tensor  # (B, num_kv_heads, max_len, head_dim)
    values: Tensor  # (B, num_kv_heads, max_len, head_dim)


class Linear(nn.Linear):
    """nn.Linear with the faster product of `moe.kernels.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return linear(input, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head attention with one fused input projection: rows of `qkv.weight` are queries, then keys, then values.

    `num_kv_heads` below `num_heads` shares each key-value head among an equal group of query heads.
    `qk_norm` normalises queries and keys with RMSNorm: "head" over head_dim (Qwen3), "full" over all heads
    together (OLMoE), None not at all. Raises ValueError for invalid or inconsistent numbers.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: str | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_model = require_count("d_model", d_model)
        self.num_heads = require_count("num_heads", num_heads)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else require_count("num_kv_heads", num_kv_heads)
        self.head_dim = self._width_of_heads(d_model) if head_dim is None else require_count("head_dim", head_dim)
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"num_heads ({num_heads}) must be divisible by num_kv_heads ({num_kv_heads}): "
                f"each key-value head serves an equal group"
            )
        if qk_norm is not None:
            require_choice("qk_norm", qk_norm, ("head", "full"))
        require_dropout(dropout)
        self.dropout = dropout
        self.query_width = self.num_heads * self.head_dim
        self.kv_width = self.num_kv_heads * self.head_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = Linear(d_model, self.query_width + 2 * self.kv_width, bias=bias, **factory)
        self.out = Linear(self.query_width, d_model, bias=bias, **factory)
        self.qk_norm = qk_norm
        if qk_norm is not None:
            widths = (self.head_dim, self.head_dim) if qk_norm == "head" else (self.query_width, self.kv_width)
            self.q_norm = make_norm("rmsnorm", widths[0], norm_eps, **factory)
            self.k_norm = make_norm("rmsnorm", widths[1], norm_eps, **factory)

    def _width_of_heads(self, d_model: int) -> int:
        if d_model % self.num_heads != 0:
            raise ValueError(f"d_model ({d_model}) must be divisible by num_heads ({self.num_heads}); or set head_dim")
        return d_model // self.num_heads

    def reset_parameters(self, seed: int | None = None, layer: int = 0, init: WeightInit = DEFAULT_INIT) -> None:
        """Draw the weights from (seed, layer); biases start at zero.

        "fairseq" is Xavier-uniform, U(±gain √(6 / (fan_in + fan_out))), with gain 1/√2 for queries, keys and values,
        each as a matrix of its own (Artetxe et al. 2021).
        """

        def draw(weight: Tensor) -> None:
            parts = weight.split([self.query_width, self.kv_width, self.kv_width])
            for name, part in zip(("w_q", "w_k", "w_v"), parts, strict=True):
                init.draw(part, (3.0 / sum(part.shape)) ** 0.5, parameter_generator(seed, layer, f"attention.{name}"))

        draw_whole(self.qkv.weight.detach(), draw)
        bound = (6.0 / sum(self.out.weight.shape)) ** 0.5
        init.draw(self.out.weight, bound, parameter_generator(seed, layer, "attention.out"), output=True)
        for projection in (self.qkv, self.out):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.qk_norm is not None:
            self.q_norm.reset_parameters()
            self.k_norm.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        cache_length: int = 0,
    ) -> Tensor:
        """(B, S, D) -> (B, S, D).

        `mask` is True where a query may look, broadcast to (B, H, S, keys); None is the plain causal mask.
        The S new positions are appended to a `cache` that holds `cache_length`. Raises ValueError if several follow
        cached ones without a mask, since torch's causal mask would let the first query see only the first key.
        """
        batch, length, _ = x.shape
        if mask is None and length > 1 and cache_length > 0:
            raise ValueError(
                f"{length} positions that follow {cache_length} cached ones need `mask`: it says which keys each may "
                "see"
            )
        query, key, value = self.qkv(x).split([self.query_width, self.kv_width, self.kv_width], dim=-1)
        if self.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query = query.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, S, head_dim)
        key = key.view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        value = value.view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            end = cache_length + length
            cache.keys[:, :, cache_length:end] = key
            cache.values[:, :, cache_length:end] = value
            key, value = cache.keys[:, :, :end].to(query.dtype), cache.values[:, :, :end].to(query.dtype)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            # a single query sees every key; a conditional, since torch.compile makes a changing length symbolic
            is_causal=True if mask is None and length > 1 else False,  # noqa: SIM210
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.out(attended.transpose(1, 2).reshape(batch, length, self.query_width))
