"""Which experts each token goes to, and with what weight. Routers return a Routing and store none of it.

This file has what all routers share, and token choice (top-k); gshard_router.py and expert_choice_router.py the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config.checks import require_choice
from moe.kernels.autocast import without_autocast
from moe.kernels.backend import choose_backend
from moe.kernels.topk_routing import keep_within_capacity, top_k_experts, top_k_routing
from moe.layers.arguments import require_backend, require_count
from moe.layers.capacity import CapacityFactor, ExactFactor, expert_capacity
from moe.layers.initialization import DEFAULT_INIT, WeightInit, parameter_generator
from moe.layers.noise import Randomness, require_generator, uniform
from moe.layers.routing import Load, Routing, count_assignments, valid_choices


class Router(nn.Module):
    """Base of all routers: one projection to E logits, in high precision even under autocast.

    A subclass makes its choices in `forward` and computes their weights in `weights`.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        router_dtype: torch.dtype | None,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        d_model, num_experts = require_count("d_model", d_model), require_count("num_experts", num_experts)
        top_k = require_count("top_k", top_k)
        require_backend(backend)
        if top_k > num_experts:
            raise ValueError(
                f"top_k ({top_k}) must be at least 1 and at most num_experts ({num_experts}); "
                f"a token cannot choose more experts than there are"
            )
        self.top_k = top_k
        self.router_dtype = router_dtype
        self.backend = backend
        self.check_scores = True  # off where an error on one of several ranks would leave the others waiting
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    def num_rows(self, num_tokens: int) -> int:
        """Rows that `num_tokens` tokens send to experts when nothing is dropped."""
        return num_tokens * self.top_k

    def capacity(self, num_tokens: int) -> int | None:
        """The most rows an expert may currently get from `num_tokens` tokens; None if nothing is dropped."""
        return None

    def reset_parameters(self, seed: int | None = None, layer: int = 0, init: WeightInit = DEFAULT_INIT) -> None:
        """Draw the weight from (seed, layer); "fairseq" is U(±1/√D)."""
        bound = self.weight.shape[1] ** -0.5
        init.draw(self.weight, bound, parameter_generator(seed, layer, "router.weight"))

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        *,
        generator: Randomness | None = None,
    ) -> Routing:
        """Route (T, D). token_mask: (T,) bool, false for padding. sequence_ids: (T,) int64.

        generator: the source of random numbers for routers that draw in training, or its seed as an int64 tensor,
        which torch.compile can trace; other routers ignore it.
        Raises ValueError if one is needed and missing, and NonFiniteScoresError (CPU) if scores are not finite.
        """
        raise NotImplementedError

    def router_logits(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E) in `router_dtype`, by default at least float32. ValueError if x is on another device."""
        if x.device != self.weight.device:  # torch accepts a meta tensor together with any other
            raise ValueError(
                f"x is on {x.device}, but the router's weight is on {self.weight.device}: move one of them"
            )
        dtype = torch.promote_types(x.dtype, torch.float32) if self.router_dtype is None else self.router_dtype
        with without_autocast(x.device.type):
            return F.linear(x.to(dtype), self.weight.to(dtype))

    def probabilities(self, logits: Tensor) -> Tensor:
        """(T, E) -> (T, E): the probabilities that weights are taken from."""
        return logits.softmax(dim=1)

    def weights(self, probs: Tensor, expert_indices: Tensor, kept: Tensor) -> Tensor:
        """(T, E), (T, K), (T, K) -> (T, K), zero where not kept."""
        return torch.where(kept, probs.gather(1, expert_indices), 0.0)

    def replay(self, x: Tensor, recorded: Routing) -> Routing:
        """The recorded choices and drops, with logits and weights recomputed from `x` (T, D)."""
        logits = self.router_logits(x)
        probs = self.probabilities(logits)
        weights = self.weights(probs, recorded.expert_indices, recorded.kept)
        return recorded._replace(router_logits=logits, router_probs=probs, expert_weights=weights)

    def _choosable(self, scores: Tensor) -> Tensor:
        """The scores to choose by. (T, E)

        Without `check_scores`, NaN and inf count as 0 and -inf as the lowest finite number (a token may have nothing
        else), for the choice only. Probabilities and weights stay NaN and reach the loss and the gradients of all
        ranks, so that every rank skips the update.
        """
        return scores if self.check_scores else scores.nan_to_num(0.0, posinf=0.0)

    def _routing(
        self,
        logits: Tensor,
        probs: Tensor,
        indices: Tensor,
        chosen: Tensor,
        kept: Tensor,
        token_mask: Tensor | None,
        sequence_ids: Tensor | None,
    ) -> Routing:
        weights = self.weights(probs, indices, kept)
        counts = count_assignments(indices, chosen, self.num_experts)
        return Routing(logits, probs, indices, weights, chosen, kept, token_mask, sequence_ids, counts)

    def extra_repr(self) -> str:
        num_experts, d_model = self.weight.shape
        return f"d_model={d_model}, num_experts={num_experts}, top_k={self.top_k}"


class TopKRouter(Router):
    """Token choice: each token takes its `top_k` highest-scoring experts.

    scores: "softmax" over the experts, or "sigmoid" of each (DeepSeek-V3, eq. 15).
    normalize: divide the weights by their sum over the chosen experts. `None` does so only for top_k > 1: a single
    weight divided by itself is 1, which leaves the router no gradient (Switch Transformer, eq. 2, keeps p).
    weight_scale: multiplies all weights (DeepSeek's routed_scaling_factor).
    capacity_factor: `None` is dropless; otherwise an expert keeps ceil(capacity_factor · T · K / E) of its rows in
    training, first choices before second, earlier tokens before later, and `normalize` divides by the sum over kept
    choices. eval_capacity_factor: the same in evaluation. T counts valid tokens.
    num_groups, top_groups: experts form `num_groups` equal blocks, and a token chooses within the `top_groups` blocks
    of highest group score: the "max" of a block's scores (DeepSeek-V2) or the sum of its "top2" (V3).
    bias_balanced: add a per-expert bias to the scores when choosing, never to the weights. `update_bias` adjusts it
    after a step (auxiliary-loss-free balancing, Wang et al. 2024).
    jitter: in training, the router alone sees x · U(1 - jitter, 1 + jitter) (Switch Transformer, 2.4), in at least
    float32.
    """

    expert_bias: Tensor | None  # (E,) float32, a buffer
    capacity_factor = CapacityFactor(off="dropless routing")
    eval_capacity_factor = CapacityFactor(off="dropless routing")
    _capacity_factor: ExactFactor | None
    _eval_capacity_factor: ExactFactor | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        scores: str = "softmax",
        normalize: bool | None = None,
        weight_scale: float = 1.0,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        num_groups: int | None = None,
        top_groups: int | None = None,
        group_score: str = "top2",
        bias_balanced: bool = False,
        jitter: float | None = None,
        router_dtype: torch.dtype | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, num_experts, top_k, router_dtype=router_dtype, backend=backend, device=device, dtype=dtype
        )
        if jitter is not None and not 0.0 < jitter < 1.0:
            raise ValueError(f"jitter ({jitter}) must be above 0 and below 1, or None for no jitter")
        if not weight_scale > 0:
            raise ValueError(f"weight_scale ({weight_scale}) must be above 0")
        require_choice("scores", scores, ("softmax", "sigmoid"))
        require_choice("group_score", group_score, ("max", "top2"))
        _check_groups(num_experts, top_k, num_groups, top_groups)
        self.scores = scores
        self.normalize = self.top_k > 1 if normalize is None else normalize
        self.weight_scale = weight_scale
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.group_score = group_score
        self.jitter = jitter
        bias = torch.zeros(num_experts, dtype=torch.float32, device=device) if bias_balanced else None
        self.register_buffer("expert_bias", bias)
        # a bias or groups come between scores and choice; a subclass may compute weights its own way
        own = type(self).weights is TopKRouter.weights and type(self).probabilities is TopKRouter.probabilities
        self._fuses = own and not bias_balanced and num_groups is None

    def reset_parameters(self, seed: int | None = None, layer: int = 0, init: WeightInit = DEFAULT_INIT) -> None:
        """Draw the weight from (seed, layer); the balancing bias restarts at zero."""
        super().reset_parameters(seed, layer, init)
        if getattr(self, "expert_bias", None) is not None:
            nn.init.zeros_(self.expert_bias)  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        *,
        generator: Randomness | None = None,
    ) -> Routing:
        """See `Router.forward`. Masked tokens take no capacity. Only `jitter` draws from the generator."""
        if self.jitter is not None and self.training:
            # in at least float32: bfloat16 steps by 0.0039 just below 1 and by 0.0078 above, with no finer factor
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            noise = uniform(x.shape, x, require_generator(generator, f"jitter={self.jitter}"))
            x = x * (1.0 + self.jitter * (2.0 * noise - 1.0))
        logits = self.router_logits(x)
        backend = choose_backend("top_k_routing", self.backend, x.device.type, has_triton=True)
        # on a CPU the fused op refuses non-finite scores
        if self._fuses and backend == "triton" and (self.check_scores or x.device.type != "cpu"):
            return self._fused_routing(logits, token_mask, sequence_ids)
        probs = self.probabilities(logits)
        scores = self._choice_scores(logits.detach(), probs.detach(), token_mask)
        indices = top_k_experts(scores, self.top_k, valid=token_mask, backend=self.backend)  # (T, K)
        chosen = valid_choices(indices, token_mask)
        kept = self._within_capacity(indices, chosen, token_mask)
        return self._routing(logits, probs, indices, chosen, kept, token_mask, sequence_ids)

    def capacity(self, num_tokens: int) -> int | None:
        """See `Router.capacity`."""
        factor = self._factor
        return None if factor is None else int(expert_capacity(num_tokens, self.num_experts, self.top_k, factor))

    def probabilities(self, logits: Tensor) -> Tensor:
        """(T, E) -> (T, E): softmax, or the sigmoid of each score."""
        return logits.softmax(dim=1) if self.scores == "softmax" else logits.sigmoid()

    def weights(self, probs: Tensor, expert_indices: Tensor, kept: Tensor) -> Tensor:
        """Probabilities of the kept choices, over their sum if `normalize`, times `weight_scale`. (T, K)"""
        return self._scaled(super().weights(probs, expert_indices, kept))

    @torch.no_grad()
    def update_bias(self, routings: Sequence[Load], rate: float = 1e-3, group: dist.ProcessGroup | None = None) -> None:
        """Raise the bias of experts below the mean load by `rate` and lower it for those above; call after a step.

        routings: this router's Routings, or their statistics, one per micro-batch of the step. group: data-parallel
        ranks whose loads are summed, so that all of them make the same update; `None` is this process alone.
        Recomputation changes nothing: loads come only from the given routings. Raises ValueError without
        bias_balanced, without routings, or if they have another number of experts.
        """
        if self.expert_bias is None:
            raise ValueError("update_bias needs a router with bias_balanced=True")
        if not routings:
            raise ValueError("update_bias needs the routings of the step, one per micro-batch, but got none")
        load = torch.stack([routing.tokens_per_expert for routing in routings]).sum(dim=0)  # (E,) int64
        if load.shape != self.expert_bias.shape:
            raise ValueError(f"the routings have {load.numel()} experts, but this router has {self.num_experts}")
        if group is not None:
            dist.all_reduce(load, group=group)
        # sign(mean - load) without a division: integers compare exactly
        self.expert_bias += rate * torch.sign(load.sum() - load * load.numel())

    def _fused_routing(self, logits: Tensor, token_mask: Tensor | None, sequence_ids: Tensor | None) -> Routing:
        """What `forward` composes, in one op. With a capacity, weights are normalised after dropping, outside it."""
        has_capacity = self._factor is not None
        probs, indices, weights, counts = top_k_routing(
            logits,
            self.top_k,
            scores=self.scores,
            normalize=self.normalize and not has_capacity,
            weight_scale=1.0 if has_capacity else self.weight_scale,
            smallest_sum=self._smallest_sum,
            valid=token_mask,
            backend=self.backend,
        )
        chosen = valid_choices(indices, token_mask)
        kept = self._within_capacity(indices, chosen, token_mask)
        if has_capacity:
            weights = self._scaled(torch.where(kept, weights, 0.0))
        return Routing(logits, probs, indices, weights, chosen, kept, token_mask, sequence_ids, counts)

    @property
    def _smallest_sum(self) -> float | None:
        return _SIGMOID_FLOOR if self.scores == "sigmoid" else None

    @property
    def _factor(self) -> ExactFactor | None:
        return self._capacity_factor if self.training else self._eval_capacity_factor

    def _within_capacity(self, indices: Tensor, chosen: Tensor, token_mask: Tensor | None) -> Tensor:
        """Which chosen pairs find room; all of them without a capacity. (T, K) -> (T, K)."""
        if self._factor is None:
            return chosen
        num_tokens = indices.shape[0] if token_mask is None else token_mask.sum()
        capacity = expert_capacity(num_tokens, self.num_experts, self.top_k, self._factor)
        return keep_within_capacity(indices, chosen, self.num_experts, capacity, backend=self.backend)

    def _scaled(self, weights: Tensor) -> Tensor:
        """Weights of the kept choices, over their sum if `normalize`, times weight_scale. (T, K) -> (T, K)."""
        if self.normalize:
            weights = over_their_sum(weights, self._smallest_sum)
        return weights if self.weight_scale == 1.0 else weights * self.weight_scale

    def _choice_scores(self, logits: Tensor, probs: Tensor, token_mask: Tensor | None) -> Tensor:
        """(T, E): the scores compared. Logits if nothing is added: softmax can round near-equal logits to a tie."""
        if self.expert_bias is None and self.num_groups is None:
            return self._choosable(logits)
        scores = self._choosable(probs if self.expert_bias is None else probs + self.expert_bias)
        if self.num_groups is None or self.top_groups is None:
            return scores
        grouped = scores.unflatten(1, (self.num_groups, -1))  # (T, groups, experts of a group)
        best = min(2 if self.group_score == "top2" else 1, grouped.shape[2])
        group_scores = self._choosable(grouped.topk(best, dim=2).values.sum(dim=2))  # two lowest numbers add to -inf
        groups = top_k_experts(group_scores, self.top_groups, valid=token_mask, backend=self.backend)  # (T, top_groups)
        allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, groups, True)
        return torch.where(allowed[:, :, None], grouped, -torch.inf).flatten(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As nn.Module's, but the bias stays in float32: in bfloat16 a step of 0.001 vanishes beside 0.25."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias is not None and self.expert_bias.dtype.itemsize < 4:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """As nn.Module's, but a bias that is assigned (assign=True) becomes float32 too."""
        super()._load_from_state_dict(*args)
        if self.expert_bias is not None and self.expert_bias.dtype.itemsize < 4:
            self.expert_bias = self.expert_bias.float()

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, scores={self.scores}, normalize={self.normalize}"
        for name in ("capacity_factor", "eval_capacity_factor", "num_groups", "top_groups", "jitter"):
            value = getattr(self, name)
            text += "" if value is None else f", {name}={value}"
        return text + (", bias_balanced=True" if self.expert_bias is not None else "")


_SIGMOID_FLOOR = 1e-20


def over_their_sum(weights: Tensor, floor: float | None = None) -> Tensor:
    """Divide each row by its sum. (T, K) -> (T, K). A sum below `floor` counts as `floor`, so zeros stay zeros.

    Computed in at least float32. `None` is the machine epsilon of that dtype, as in fairseq. The softmax probabilities
    of a token's best experts exceed it, but with some hundred experts they need not exceed bfloat16's; sigmoid scores
    may all be tiny and need a lower floor (DeepSeek-V3 adds 1e-20).
    """
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    limits = torch.finfo(wide.dtype)
    smallest = limits.eps if floor is None else max(floor, limits.tiny)
    return (wide / wide.sum(dim=1, keepdim=True).clamp_min(smallest)).to(weights.dtype)


def _check_groups(num_experts: int, top_k: int, num_groups: int | None, top_groups: int | None) -> None:
    if (num_groups is None) != (top_groups is None):
        raise ValueError(f"num_groups ({num_groups}) and top_groups ({top_groups}) must be given together")
    if num_groups is None or top_groups is None:
        return
    if num_groups < 1 or num_experts % num_groups != 0:
        raise ValueError(f"num_groups ({num_groups}) must divide num_experts ({num_experts})")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"top_groups ({top_groups}) must be at least 1 and at most num_groups ({num_groups})")
    room = top_groups * (num_experts // num_groups)
    if top_k > room:
        raise ValueError(f"top_k ({top_k}) must be at most the {room} experts of {top_groups} of {num_groups} groups")
