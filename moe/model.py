"""The one Transformer of the project. A dense model is `config.moe = None`; everything else is shared."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config import ModelConfig, MoEConfig
from moe.kernels.linear_cross_entropy import linear_cross_entropy
from moe.kernels.topk_routing import NonFiniteScoresError
from moe.layers.attention import Attention, LayerCache
from moe.layers.feed_forward import FeedForward
from moe.layers.gshard_router import GShardRouter
from moe.layers.initialization import WeightInit, draw_normal, parameter_generator
from moe.layers.moe import MoE
from moe.layers.norm import make_norm
from moe.layers.position import Rotation, document_positions, rotary_rotation, sinusoidal_embedding
from moe.layers.router import Router, TopKRouter
from moe.layers.routing import Load, Routing
from moe.layers.transformer_layer import TransformerLayer


class ModelOutput(NamedTuple):
    """The result of a forward pass: logits without targets, losses with them, and routings in layer order."""

    logits: Tensor | None  # (B, S, V)
    token_losses: Tensor | None  # (B, S) float32 cross-entropy in nats
    routings: tuple[Routing, ...]  # one per sparse layer


class KeyValueCache:
    """Keys and values of a batch during generation, and the length filled so far.

    Prompts of unequal length are padded on the left by `num_padding` (B,) tokens. Each row counts positions from its
    own first token.
    """

    def __init__(self, layers: list[LayerCache], num_padding: Tensor, *, has_padding: bool = True) -> None:
        self.layers = layers
        self.num_padding = num_padding  # (B,)
        self.has_padding = has_padding  # False: the host knows that num_padding is all zero
        self.length = 0


class Transformer(nn.Module):
    """A decoder-only language model with the shape of `config`, whose `vocab_size` must be set."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: str = "auto",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is null: set it to the tokenizer's vocabulary before building the model")
        self.config = config
        self.backend = backend
        self.recompute = recompute
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = config.embedding_width
        self.embedding = nn.Embedding(config.vocab_size, width, **factory)
        if config.position == "learned":
            self.position = nn.Embedding(config.max_seq_len + config.position_offset, config.d_model, **factory)
        self.project_in = self.project_out = None
        if width != config.d_model:
            self.project_in = nn.Linear(width, config.d_model, bias=False, **factory)
            self.project_out = nn.Linear(config.d_model, width, bias=False, **factory)
        self.layers = nn.ModuleList(_layer(config, i, backend, factory) for i in range(config.num_layers))
        self.final_norm = None
        if config.norm_position == "pre":
            self.final_norm = make_norm(config.norm, config.d_model, config.norm_eps, **factory)
        self.head = None
        if not config.tie_embeddings:
            self.head = nn.Linear(width, config.vocab_size, bias=False, **factory)

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw every weight from `seed`, each with its own generator.

        "normal": N(0, init_std²), scaled by 1/√(2L) in the two projections that write to the residual stream (GPT-2).
        "fairseq": the paper's rule (Artetxe et al. 2021), embeddings N(0, 1/D).
        """
        config = self.config
        fairseq = config.init == "fairseq"
        init = WeightInit(config.init, config.init_std, 1.0 if fairseq else (2 * config.num_layers) ** -0.5)
        embedding_std = config.embedding_width**-0.5 if fairseq else config.init_std
        draw_normal(self.embedding.weight, embedding_std, parameter_generator(seed, "embedding"))
        if config.position == "learned":
            draw_normal(self.position.weight, embedding_std, parameter_generator(seed, "position"))
        for name in ("project_in", "project_out", "head"):
            linear = getattr(self, name)
            if linear is not None:
                init.draw(linear.weight, linear.in_features**-0.5, parameter_generator(seed, name))
        if isinstance(self.final_norm, (nn.LayerNorm, nn.RMSNorm)):
            self.final_norm.reset_parameters()
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, TransformerLayer)
            layer.reset_parameters(seed, i, init)

    def update_router_biases(self, loads: Sequence[Load], rate: float, group: dist.ProcessGroup | None = None) -> None:
        """Update balancing biases after a step (TopKRouter.update_bias). loads: the step's, one per sparse layer."""
        routers = [m.router for m in self.modules() if isinstance(m, MoE)]
        for router, load in zip(routers, loads, strict=True):
            assert isinstance(router, TopKRouter)
            router.update_bias([load], rate, group)

    def new_cache(self, batch_size: int, max_len: int, num_padding: Tensor | None = None) -> KeyValueCache:
        """An empty cache for `batch_size` sequences of at most `max_len` positions, padding included."""
        weight = self.embedding.weight
        shape = (batch_size, self.config.kv_heads, max_len, self.config.head_width)
        # not weight.new_zeros: the weight may be a shard
        factory: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        layers = [LayerCache(torch.zeros(shape, **factory), torch.zeros(shape, **factory)) for _ in self.layers]
        if num_padding is not None:
            return KeyValueCache(layers, num_padding)
        none = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return KeyValueCache(layers, none, has_padding=False)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        generator: torch.Generator | None = None,
        last_only: bool = False,
    ) -> ModelOutput:
        """Next-token logits, or the loss of each of `targets`.

        tokens, targets: (B, S) int64. document_ids: (B, S), restarts positions and blocks attention across documents;
        None attends to the whole sequence. token_mask: (B, S) bool, False for padding, which takes no expert capacity.
        loss_mask: (B, S) bool, the positions whose losses the caller counts, by default those of token_mask; all losses
        are computed, but gradients may be skipped where they cannot count. With `cache`, `tokens` continue its content,
        and logits are returned for them. last_only: logits (B, 1, V) of the last position only. generator: a CPU
        generator for routers that draw in training (jitter, sampling); each layer gets a seed from it, so that
        recomputation sees the same noise. Raises ValueError for other shapes, for masks that are not bool, for more
        positions than the cache or the table of learned positions holds, and for a token_mask with a cache, which knows
        its padding; NonFiniteScoresError (CPU), naming the layer, if a router's scores are not finite.
        """
        _require_shapes(tokens, targets, document_ids, token_mask, loss_mask)
        if last_only and targets is not None:
            raise ValueError(
                "last_only returns the last position's logits and targets all losses: give only one of them"
            )
        if cache is not None:
            _require_room_in(cache, tokens, token_mask)
        if self.config.position == "learned" and document_ids is None:
            self._require_positions(tokens.shape[1] if cache is None else cache.length + tokens.shape[1], cache)
        positions, mask = _positions_and_mask(tokens, document_ids, cache)
        if cache is not None:
            token_mask = _cached_token_mask(tokens, cache) if cache.has_padding else None
        x = self._embed(tokens, positions)  # (B, S, D)
        rotation = None
        if self.config.position == "rope":
            rotation = rotary_rotation(
                positions, self.config.head_width, self.config.rope_theta, self.config.rope_scaling
            )
        x, routings = self._run_layers(x, rotation, mask, token_mask, cache, generator)
        if last_only:
            x = x[:, -1:]
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        head = self.embedding.weight if self.head is None else self.head.weight  # (V, D)
        if targets is None:
            return ModelOutput(F.linear(x, head), None, routings)
        mask = token_mask if loss_mask is None else loss_mask
        counted = None if mask is None else mask.flatten()
        losses = linear_cross_entropy(
            x.flatten(0, 1), head, targets.flatten(), token_mask=counted, backend=self.backend
        )
        # a tensor of its own: FSDP2 hangs its backward hook on what the model returns, and warns of views
        return ModelOutput(None, losses.view_as(targets).clone(), routings)

    def _require_positions(self, count: int, cache: KeyValueCache | None) -> None:
        """Raise ValueError if `count` exceeds the table; with padding, only the device knows the real count."""
        has_padding = cache is not None and cache.has_padding
        if count > self.config.max_seq_len and not has_padding:
            raise ValueError(
                f"{count} positions exceed model.max_seq_len ({self.config.max_seq_len}), and position=learned has "
                f"none beyond it; give shorter sequences"
            )

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        config = self.config
        x = self.embedding(tokens)
        if self.project_in is not None:
            x = self.project_in(x)
        if config.scale_embeddings:
            x = x * config.d_model**0.5
        if config.position == "learned":
            x = x + self.position(positions + config.position_offset)
        elif config.position == "sinusoidal":
            x = x + sinusoidal_embedding(positions + config.position_offset, config.d_model).type_as(x)
        return F.dropout(x, config.dropout, self.training)

    def _run_layers(
        self,
        x: Tensor,
        rotation: Rotation | None,
        mask: Tensor | None,
        token_mask: Tensor | None,
        cache: KeyValueCache | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        routings = []
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            options: dict[str, Any] = {"rotation": rotation, "mask": mask, "token_mask": token_mask}
            if generator is not None:
                options["noise_seed"] = int(torch.randint(2**62, (), generator=generator))
            if cache is not None:
                options |= {"cache": cache.layers[i], "cache_length": cache.length}
            try:
                x, routing = checkpoint(layer, x, use_reentrant=False, **options) if recompute else layer(x, **options)
            except NonFiniteScoresError as error:
                raise NonFiniteScoresError(f"layer {i}: {error}") from error
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.length += x.shape[1]
        return x, tuple(routings)


def _layer(config: ModelConfig, index: int, backend: str, factory: dict) -> TransformerLayer:
    attention = Attention(
        config.d_model,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        bias=config.bias,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        dropout=config.attention_dropout,
        **factory,
    )
    shared = {
        "activation": config.activation,
        "gated": config.gated,
        "bias": config.bias,
        "dropout": config.dropout,
        **factory,
    }
    feed_forward: FeedForward | MoE
    if config.moe is not None and index in config.moe_layers:
        feed_forward = _sparse_feed_forward(config, config.moe, backend, shared)
    else:
        feed_forward = FeedForward(config.d_model, config.d_ff, **shared)
    return TransformerLayer(
        attention,
        feed_forward,
        config.d_model,
        norm=config.norm,
        norm_position=config.norm_position,
        norm_eps=config.norm_eps,
        dropout=config.dropout,
        **factory,
    )


def _sparse_feed_forward(config: ModelConfig, moe: MoEConfig, backend: str, shared: dict) -> MoE:
    factory: dict[str, Any] = {"backend": backend, "device": shared["device"], "dtype": shared["dtype"]}
    router: Router
    if moe.router == "gshard":
        router = GShardRouter(config.d_model, moe.num_experts, second_policy=moe.second_policy, **factory)
    else:
        router = TopKRouter(
            config.d_model,
            moe.num_experts,
            moe.top_k,
            scores=moe.scores,
            normalize=moe.normalize_weights,
            weight_scale=moe.weight_scale,
            capacity_factor=moe.capacity_factor,
            eval_capacity_factor=moe.eval_capacity_factor,
            num_groups=moe.num_groups,
            top_groups=moe.top_groups,
            bias_balanced=moe.bias_balance_rate is not None,
            jitter=moe.jitter,
            **factory,
        )
    return MoE(
        config.d_model,
        config.expert_width,
        moe.num_experts,
        moe.top_k,
        router=router,
        shared_d_ff=moe.shared_d_ff,
        shared_gate=moe.shared_gate,
        backend=backend,
        **shared,
    )


def _positions_and_mask(
    tokens: Tensor, document_ids: Tensor | None, cache: KeyValueCache | None
) -> tuple[Tensor, Tensor | None]:
    """Positions (B or 1, S), and a mask (B, 1, S, keys) of the keys each query may see; None is plain causal."""
    length = tokens.shape[1]
    index = torch.arange(length, device=tokens.device)
    if cache is not None:
        if document_ids is not None:
            raise ValueError("document_ids and cache exclude each other: a cache holds one document per row")
        query = index + cache.length  # (S,)
        if not cache.has_padding and (length == 1 or cache.length == 0):
            return query[None, :], None  # a single query sees every key; a first pass is plain causal
        key = torch.arange(cache.length + length, device=tokens.device)
        causal = key[None, :] <= query[:, None]  # (S, keys)
        real = key[None, None, :] >= cache.num_padding[:, None, None]  # (B, 1, keys)
        # a padding query sees itself: a row without keys would be NaN and poison whatever it is added to
        itself = key[None, :] == query[:, None]
        mask = (causal & real) | itself  # (B, S, keys)
        return (query[None, :] - cache.num_padding[:, None]).clamp_min(0), mask[:, None]
    if document_ids is None:
        return index[None, :], None
    same_document = document_ids[:, :, None] == document_ids[:, None, :]  # (B, S, S)
    causal = index[None, :] <= index[:, None]
    return document_positions(document_ids), (same_document & causal)[:, None]


def _require_shapes(
    tokens: Tensor,
    targets: Tensor | None,
    document_ids: Tensor | None,
    token_mask: Tensor | None,
    loss_mask: Tensor | None,
) -> None:
    """Raise ValueError unless tokens are (B, S), everything else has their shape and masks are bool."""
    if tokens.dim() != 2:
        raise ValueError(f"tokens {tuple(tokens.shape)} must be (B, S): B sequences of S token ids")
    masks = {"token_mask": token_mask, "loss_mask": loss_mask}
    for name, tensor in {"targets": targets, "document_ids": document_ids, **masks}.items():
        if tensor is not None and tensor.shape != tokens.shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must have the shape of tokens, {tuple(tokens.shape)}")
    for name, mask in masks.items():
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"{name} ({mask.dtype}) must be bool, True for positions that count: use {name}.bool()")


def _require_room_in(cache: KeyValueCache, tokens: Tensor, token_mask: Tensor | None) -> None:
    """Raise ValueError unless `tokens` (B, S) can continue what the cache holds."""
    if token_mask is not None:
        raise ValueError("token_mask and cache exclude each other: a cache has num_padding, left of each row")
    rows, _, max_len, _ = cache.layers[0].keys.shape
    batch, length = tokens.shape
    if batch != rows:
        raise ValueError(f"the cache has {rows} sequences, but tokens has {batch}: make another cache (new_cache)")
    if cache.length + length > max_len:
        raise ValueError(
            f"the cache holds {max_len} positions, of which {cache.length} are filled: {length} more do not fit; make "
            f"a longer one (new_cache)"
        )


def _cached_token_mask(tokens: Tensor, cache: KeyValueCache) -> Tensor:
    """(B, S) bool: True for tokens, False for the padding left of a short prompt."""
    index = torch.arange(tokens.shape[1], device=tokens.device) + cache.length
    return index[None, :] >= cache.num_padding[:, None]


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Autocasting for `train.precision` in one process; "fp32" changes nothing."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
