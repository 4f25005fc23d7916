"""One decoding step of a batch on a CPU: the arithmetic of `Transformer.forward` without its overhead.

A small model spends most of a step between operations: modules calling modules, masks and positions rebuilt, rows
sorted for experts that get one row each. Here views of the weights, the rotary table and the padding mask are built
once per generation, and a layer takes about twenty operations. Weights are views, or transposed copies where those pay
off (`moe.generation.products`).

Anything unknown to this module is left to the model's own forward; `decode_step` chooses between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.distributed.world import World
from moe.generation.few_rows import FewRows
from moe.generation.products import copies_pay, product
from moe.layers.attention import Attention, LayerCache, Linear
from moe.layers.feed_forward import ACTIVATIONS, FeedForward
from moe.layers.moe import MoE
from moe.layers.norm import RMSNorm
from moe.layers.position import rotary_rotation
from moe.layers.transformer_layer import TransformerLayer
from moe.model import KeyValueCache, Transformer

Step = Callable[[Tensor], Tensor]  # (B,) int64 tokens -> (B, V) logits; the cache grows by one

# The fields of ModelConfig that are implemented below. A model that sets any other, including ones added to the
# configuration later, runs through its own forward.
_KNOWN = frozenset(
    (
        *("name", "d_model", "d_ff", "num_layers", "num_heads", "max_seq_len", "num_kv_heads", "head_dim"),
        *("vocab_size", "embedding_dim", "norm", "norm_position", "norm_eps", "position", "position_offset"),
        *("rope_theta", "activation", "gated", "bias", "qk_norm", "tie_embeddings", "scale_embeddings", "dropout"),
        *("attention_dropout", "init", "init_std", "expert_d_ff", "moe_placement", "moe"),
        *("rope_scaling", "dense_layers"),
    )
)
_KNOWN_MODULES: tuple[type[nn.Module], ...] = (
    *(Transformer, TransformerLayer, Attention, FeedForward, MoE),
    *(nn.LayerNorm, RMSNorm, nn.Linear, Linear, nn.Embedding, nn.ModuleList),
)


def decode_step(model: Transformer, cache: KeyValueCache, num_steps: int, world: World | None = None) -> Step:
    """The fastest way to run `num_steps` steps: `DecodeStep` if it supports the model, else the model's forward."""
    if reason_against(model, world) is None:
        return DecodeStep(model, cache, num_steps)
    return _by_forward(model, cache)


def reason_against(model: Transformer, world: World | None = None) -> str | None:
    """Why `DecodeStep` cannot run this model; None when it can."""
    weight = model.embedding.weight
    if world is not None and world.size > 1:
        return f"{world.size} processes share the model"
    if weight.device.type != "cpu":
        return f"the model is on {weight.device}"
    if model.backend not in ("auto", "torch"):
        return f"backend={model.backend} asks for other kernels"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the arithmetic"
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype != weight.dtype:
            return f"{name} is a {type(parameter).__name__} of {parameter.dtype}"
    return _unknown_field(model.config) or _unknown_module(model)


def _unknown_field(config: ModelConfig) -> str | None:
    for field in fields(config):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name not in _KNOWN and getattr(config, field.name) != default:
            return f"model.{field.name} is set"
    return None


def _unknown_module(model: Transformer) -> str | None:
    for name, module in model.named_modules():
        inside_moe = ".router" in name or ".experts" in name or ".dispatcher" in name  # FewRows checks those
        if type(module) not in _KNOWN_MODULES and not inside_moe:
            return f"{name} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has hooks"
    return None


def _by_forward(model: Transformer, cache: KeyValueCache) -> Step:
    def step(tokens: Tensor) -> Tensor:
        logits = model(tokens[:, None], cache=cache).logits
        assert logits is not None
        return logits[:, -1]

    return step


class DecodeStep:
    """Decodes one token per row with a model in evaluation mode. Its weights must not change in the meantime."""

    def __init__(self, model: Transformer, cache: KeyValueCache, num_steps: int) -> None:
        config = model.config
        self.model = model
        self.cache = cache
        weight = model.embedding.weight
        self.max_len = cache.layers[0].keys.shape[2]
        positions = torch.arange(self.max_len)
        self.positions = positions
        self.rotation = None
        with torch.inference_mode():
            if config.position == "rope":
                self.rotation = _rotary_table(positions, config, torch.promote_types(weight.dtype, torch.float32))
            self.real: Tensor | None = None
            if cache.has_padding:
                self.real = (positions >= cache.num_padding[:, None])[:, None, None]  # (B, 1, 1, max_len)
            layers = [layer for layer in model.layers if isinstance(layer, TransformerLayer)]
            num_bytes = sum(parameter.nbytes for parameter in model.parameters())
            batch = len(cache.num_padding)
            copied = copies_pay(num_bytes, batch, num_steps)
            copied_experts = False
            if config.moe is not None:  # an expert may have few rows even in a large batch
                copied_experts = copies_pay(num_bytes, batch * config.moe.top_k / config.moe.num_experts, num_steps)
            self.layers = [
                _Layer(layer, own, copied, copied_experts) for layer, own in zip(layers, cache.layers, strict=True)
            ]
            self.head = product(weight if model.head is None else model.head.weight, None, copied)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """(B,) int64 -> (B, V). Raises ValueError when the cache is full."""
        cache, model = self.cache, self.model
        place = cache.length
        if place >= self.max_len:
            raise ValueError(f"all {self.max_len} positions of the cache are in use: make a longer one (new_cache)")
        rotation = mask = None
        if self.real is None:
            positions = self.positions[place : place + 1]  # (1,)
            if self.rotation is not None:
                rotation = self.rotation[:, place]  # (2, head_dim)
        else:
            positions = place - cache.num_padding  # (B,)
            mask = self.real[..., : place + 1]
            if self.rotation is not None:
                rotation = self.rotation.index_select(1, positions)[:, :, None]  # (2, B, 1, head_dim)
        x = model._embed(tokens[:, None], positions[:, None])[:, 0]  # (B, D)
        for layer in self.layers:
            x = layer(x, place, rotation, mask)
        cache.length = place + 1
        if model.final_norm is not None:
            x = model.final_norm(x)
        if model.project_out is not None:
            x = model.project_out(x)
        return self.head(x)


class _Layer:
    """One TransformerLayer and its cache, for tokens (B, D)."""

    def __init__(self, layer: TransformerLayer, cache: LayerCache, copied: bool, copied_experts: bool) -> None:
        attention = layer.attention
        self.pre_norm = layer.pre_norm
        self.attention_norm = _norm(layer.attention_norm)
        self.feed_norm = _norm(layer.feed_forward_norm)
        self.attention = attention
        self.qkv = product(attention.qkv.weight, attention.qkv.bias, copied)
        self.out = product(attention.out.weight, attention.out.bias, copied)
        self.keys, self.values = cache
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.head_dim = attention.head_dim
        self.query_width = attention.query_width
        self.qk_width = attention.query_width + attention.kv_width
        feed_forward = layer.feed_forward
        self.feed: Callable[[Tensor], Tensor] = (
            FewRows(feed_forward, copied_experts) if isinstance(feed_forward, MoE) else _dense(feed_forward, copied)
        )

    def __call__(self, x: Tensor, place: int, rotation: Tensor | None, mask: Tensor | None) -> Tensor:
        """(B, D) -> (B, D); keys and values are written to position `place` of the cache."""
        if self.pre_norm:
            x = x + self._attend(self.attention_norm(x), place, rotation, mask)
            return x + self.feed(self.feed_norm(x))
        x = self.attention_norm(x + self._attend(x, place, rotation, mask))
        return self.feed_norm(x + self.feed(x))

    def _attend(self, x: Tensor, place: int, rotation: Tensor | None, mask: Tensor | None) -> Tensor:
        batch = x.shape[0]
        qkv = self.qkv(x)  # (B, (H + 2 num_kv_heads) head_dim)
        qk = qkv[:, : self.qk_width]
        heads = self.num_heads + self.num_kv_heads
        qk = qk.view(batch, heads, self.head_dim) if self.attention.qk_norm is None else self._normalised(qk)
        if rotation is not None:
            qk = _rotated(qk, rotation)
        query, key = qk.split([self.num_heads, self.num_kv_heads], dim=1)
        self.keys.select(2, place).copy_(key)
        self.values.select(2, place).copy_(qkv[:, self.qk_width :].view(batch, self.num_kv_heads, self.head_dim))
        # the query heads that share a key-value head become rows of one query, so keys are not repeated
        attended = F.scaled_dot_product_attention(
            query.reshape(batch, self.num_kv_heads, -1, self.head_dim),
            self.keys.narrow(2, 0, place + 1),
            self.values.narrow(2, 0, place + 1),
            attn_mask=mask,
        )
        return self.out(attended.reshape(batch, self.query_width))

    def _normalised(self, qk: Tensor) -> Tensor:
        """Queries and keys after their norms. (B, width) -> (B, H + num_kv_heads, head_dim)."""
        query, key = qk.split([self.query_width, self.qk_width - self.query_width], dim=1)
        q_norm, k_norm = self.attention.q_norm, self.attention.k_norm
        if self.attention.qk_norm == "full":
            return torch.cat([q_norm(query), k_norm(key)], dim=1).view(len(qk), -1, self.head_dim)
        query = query.reshape(len(qk), self.num_heads, self.head_dim)
        return torch.cat([q_norm(query), k_norm(key.reshape(len(qk), self.num_kv_heads, self.head_dim))], dim=1)


def _rotary_table(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of every position, with the first half of the sines negated. (2, max_len, head_dim)"""
    rotation = rotary_rotation(positions[None], config.head_width, config.rope_theta, config.rope_scaling)
    cos, sin = rotation.cos[0, 0], rotation.sin[0, 0]  # (max_len, head_dim)
    low, high = sin.chunk(2, dim=-1)
    return torch.stack([cos, torch.cat([-low, high], dim=-1)]).to(dtype)


def _rotated(qk: Tensor, rotation: Tensor) -> Tensor:
    """`moe.layers.position.rotate` for one position per row. (B, heads, head_dim) -> same."""
    cos, sin = rotation.unbind(0)
    wide = qk.to(cos.dtype)
    swapped = wide.roll(qk.shape[-1] // 2, dims=-1)
    return torch.addcmul(wide * cos, swapped, sin).to(qk.dtype)


def _norm(norm: nn.LayerNorm | RMSNorm) -> Callable[[Tensor], Tensor]:
    """The norm as a single torch call."""
    shape, weight, eps = norm.normalized_shape, norm.weight, norm.eps
    if isinstance(norm, RMSNorm):
        return lambda x: torch.rms_norm(x, shape, weight, eps)
    bias, shift = norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, shift)


def _dense(network: FeedForward, copied: bool) -> Callable[[Tensor], Tensor]:
    into = product(network.w_in, network.b_in, copied)
    out = product(network.w_out, network.b_out, copied)
    act: Any = ACTIVATIONS[network.activation]
    if network.w_gate is None:
        return lambda x: out(act(into(x)))
    gate = product(network.w_gate, None, copied)
    return lambda x: out(act(gate(x)).mul_(into(x)))
