"""The Mixture-of-Experts layer: a router, a dispatcher and experts, in place of a feed-forward network."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.layers.arguments import require_backend, require_count
from moe.layers.dispatch import Dispatcher, LocalDispatcher
from moe.layers.expert_choice_router import ExpertChoiceRouter
from moe.layers.experts import Experts
from moe.layers.feed_forward import FeedForward
from moe.layers.foreign_names import refuses_foreign_names
from moe.layers.initialization import DEFAULT_INIT, WeightInit, parameter_generator
from moe.layers.noise import Randomness
from moe.layers.router import Router, TopKRouter
from moe.layers.routing import Routing
from moe.scaling.flops import ffn_flops, router_flops
from moe.scaling.params import ffn_params


class MoE(nn.Module):
    """y = Σ_k weight_k · expert_k(x), with the experts and weights that a router chooses for each token.

    d_model, d_ff and num_experts are all that must be given: the default router is a dropless softmax top-k.
    capacity_factor and eval_capacity_factor give that router a capacity and are refused beside `router`, which owns
    its capacity. shared_d_ff adds a dense network of that width for every token; `shared_gate` scales it by
    sigmoid(x · w) (Qwen2-MoE). Dropout is inside the experts, before they are combined. The auxiliary losses are
    functions of the returned Routing; nothing is stored on the module. Recompute with
    torch.utils.checkpoint(..., use_reentrant=False): the reentrant variant does not see the tensors inside a Routing,
    so auxiliary losses would get no gradient.
    Raises ValueError for invalid or inconsistent numbers, TypeError for another library's argument names.
    """

    @refuses_foreign_names
    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        router: Router | None = None,
        router_dtype: torch.dtype | None = None,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        shared_d_ff: int | None = None,
        shared_gate: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_backend(backend)
        d_model, num_experts = require_count("d_model", d_model), require_count("num_experts", num_experts)
        top_k = require_count("top_k", top_k)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if router is None:
            router = TopKRouter(
                d_model,
                num_experts,
                top_k,
                capacity_factor=capacity_factor,
                eval_capacity_factor=eval_capacity_factor,
                router_dtype=router_dtype,
                backend=backend,
                **factory,
            )
        else:
            _check_router(router, d_model, num_experts, top_k)
            given = {
                "capacity_factor": capacity_factor,
                "eval_capacity_factor": eval_capacity_factor,
                "router_dtype": router_dtype,
            }
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name} ({value}) is for the default router only; build `router` with it instead")
        if shared_d_ff is not None:
            shared_d_ff = require_count("shared_d_ff", shared_d_ff)
        elif shared_gate:
            raise ValueError("shared_gate needs shared_d_ff, the width of the shared network that it scales")
        ffn = {"activation": activation, "gated": gated, "bias": bias, "dropout": dropout, **factory}
        self.router = router
        self.experts = Experts(d_model, d_ff, num_experts, backend=backend, **ffn)
        self.dispatcher: Dispatcher = LocalDispatcher(backend=backend)
        self.shared = None if shared_d_ff is None else FeedForward(d_model, shared_d_ff, **ffn)
        self.shared_gate = nn.Parameter(torch.empty(1, d_model, **factory)) if shared_gate else None
        self._draw_shared_gate()

    def reset_parameters(self, seed: int | None = None, layer: int = 0, init: WeightInit = DEFAULT_INIT) -> None:
        """Draw every weight from (seed, layer), experts also from their index; None uses torch's generator."""
        self.router.reset_parameters(seed, layer, init)
        self.experts.reset_parameters(seed, layer, init)
        if self.shared is not None:
            self.shared.reset_parameters(seed, layer, init)
        self._draw_shared_gate(seed, layer, init)

    def _draw_shared_gate(self, seed: int | None = None, layer: int = 0, init: WeightInit = DEFAULT_INIT) -> None:
        if self.shared_gate is not None:
            bound = self.shared_gate.shape[1] ** -0.5
            init.draw(self.shared_gate, bound, parameter_generator(seed, layer, "shared_gate"))

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        routing: Routing | None = None,
        recorded_weights: bool = False,
        generator: Randomness | None = None,
    ) -> tuple[Tensor, Routing]:
        """(..., D) -> (..., D) and the Routing of its T tokens.

        token_mask: (...) bool, false for padding, which may hold anything, takes no capacity, enters no loss, gives 0.
        routing: a recorded Routing to replay, with the same numbers of tokens, experts and choices. Its weights are
        recomputed from x, or with recorded_weights reused; sequence ids always come from x.
        generator: for routers that draw in training (jitter, sampling), on the device of x, or its seed as an int64
        tensor, which compiles without a graph break. It must be in the same state again when the layer is recomputed.
        Raises ValueError if the shapes of x, token_mask and routing do not agree.
        """
        if recorded_weights and routing is None:
            raise ValueError("recorded_weights=True needs the recorded `routing` that holds them")
        tokens = x.reshape(-1, self._check_input(x))  # (T, D)
        mask = None if token_mask is None else _flat_mask(token_mask, x)
        valid = mask if routing is None else routing.token_mask
        if valid is not None:  # padding may hold NaN or overflow to it, and 0 · NaN would reach the gradients
            tokens = torch.where(valid[:, None], tokens, 0.0)
        if routing is None:
            routing = self.router(tokens, mask, _sequence_ids(x), generator=generator)
        else:
            _check_recorded(routing, self.router, tokens.shape[0], mask)
            routing = routing if recorded_weights else self.router.replay(tokens, routing)
            routing = routing._replace(sequence_ids=_sequence_ids(x))
        alongside = None if self.shared is None else partial(self._shared, tokens, routing.token_mask)
        y = self.dispatcher(tokens, routing, self.experts, alongside)
        return y.view(x.shape), routing

    @property
    def total_params(self) -> int:
        """All parameters of the layer."""
        return self.active_params + (self.router.num_experts - self.router.top_k) * self._expert_params

    @property
    def active_params(self) -> int:
        """Parameters that one token uses: the router, top_k experts and everything shared."""
        num_experts, d_model = self.router.weight.shape
        count = d_model * num_experts + self.router.top_k * self._expert_params
        if self.shared is not None:
            count += ffn_params(d_model, self.shared.w_in.shape[0], **self._shape)
        return count + (d_model if self.shared_gate is not None else 0)

    def flops(self, num_tokens: int) -> int:
        """Useful forward FLOPs for `num_tokens` tokens without drops (moe.scaling.flops)."""
        num_experts, d_model = self.router.weight.shape
        gated = self.experts.w_gate is not None
        count = router_flops(d_model, num_experts)
        if self.shared is not None:
            count += ffn_flops(d_model, self.shared.w_in.shape[0], gated=gated)
        if self.shared_gate is not None:
            count += 2 * d_model
        expert = ffn_flops(d_model, self.experts.w_in.shape[1], gated=gated)
        return num_tokens * count + self.router.num_rows(num_tokens) * expert

    @property
    def _shape(self) -> dict[str, bool]:
        return {"gated": self.experts.w_gate is not None, "bias": self.experts.b_in is not None}

    @property
    def _expert_params(self) -> int:
        _, d_ff, d_model = self.experts.w_in.shape
        return ffn_params(d_model, d_ff, **self._shape)

    def _shared(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        assert self.shared is not None
        y = self.shared(tokens)
        if self.shared_gate is not None:
            y = torch.sigmoid(F.linear(tokens, self.shared_gate)) * y
        return y if token_mask is None else torch.where(token_mask[:, None], y, 0.0)

    def _check_input(self, x: Tensor) -> int:
        d_model = self.router.weight.shape[1]
        if not x.is_floating_point():
            raise ValueError(f"x must hold floating-point numbers, not {x.dtype}: embed token ids first")
        if x.dim() == 0 or x.shape[-1] != d_model:
            raise ValueError(f"the last dimension of x {tuple(x.shape)} must be d_model ({d_model})")
        return d_model


def _check_router(router: Router, d_model: int, num_experts: int, top_k: int) -> None:
    if isinstance(router, ExpertChoiceRouter):
        top_k = router.top_k  # experts choose, so the layer's own top_k does not apply
    for name, expected, found in (
        ("d_model", d_model, router.weight.shape[1]),
        ("num_experts", num_experts, router.num_experts),
        ("top_k", top_k, router.top_k),
    ):
        if expected != found:
            raise ValueError(f"{name} ({expected}) must equal the router's ({found})")


def _flat_mask(token_mask: Tensor, x: Tensor) -> Tensor:
    if token_mask.shape != x.shape[:-1] or token_mask.dtype != torch.bool:
        raise ValueError(
            f"token_mask ({token_mask.dtype}, {tuple(token_mask.shape)}) must be bool with the shape of x "
            f"without its last dimension, {tuple(x.shape[:-1])}"
        )
    return token_mask.reshape(-1)


def _sequence_ids(x: Tensor) -> Tensor | None:
    """(T,): each leading index of (..., S, D) is one sequence; None for a (T, D) input, a single sequence."""
    if x.dim() <= 2:
        return None
    length = x.shape[-2]
    num_sequences = x.shape[:-2].numel()
    return torch.arange(num_sequences, device=x.device).repeat_interleave(length)


def _check_recorded(routing: Routing, router: Router, num_tokens: int, token_mask: Tensor | None) -> None:
    recorded_tokens, recorded_k = routing.expert_indices.shape
    if recorded_tokens != num_tokens:
        raise ValueError(f"the recorded routing has {recorded_tokens} tokens, but x has {num_tokens}")
    if recorded_k != router.top_k:
        raise ValueError(
            f"the recorded routing has {recorded_k} choices per token, but this layer's router has top_k={router.top_k}"
        )
    if routing.tokens_per_expert.numel() != router.num_experts:
        raise ValueError(
            f"the recorded routing has {routing.tokens_per_expert.numel()} experts, "
            f"but this layer has {router.num_experts}"
        )
    if token_mask is not None and (routing.token_mask is None or not torch.equal(token_mask, routing.token_mask)):
        raise ValueError("token_mask must equal the mask of the recorded routing; leave it out to use that mask")
