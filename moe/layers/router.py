"""Which experts a token goes to and with what weight. Routers return a Routing; they store nothing."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.kernels.topk_routing import keep_within_capacity, top_k_experts
from moe.layers.initialization import DEFAULT_INIT, WeightInit, parameter_generator


class Routing(NamedTuple):
    """The decision for T tokens. Losses, statistics and replays are functions of it alone."""

    router_logits: Tensor  # (T, E)
    router_probs: Tensor  # (T, E), before the top-k choice
    expert_indices: Tensor  # (T, K) int64, best first
    expert_weights: Tensor  # (T, K), zero where not kept
    kept: Tensor  # (T, K) bool: false for dropped choices and masked tokens
    token_mask: Tensor | None  # (T,) bool, false for padding; None is all tokens
    sequence_ids: Tensor | None  # (T,) int64, which sequence a token belongs to; None is one sequence
    tokens_per_expert: Tensor  # (E,) int64 assignments before drops, masked tokens left out


class _LinearRouter(nn.Module):
    """What the softmax routers share: one projection to E logits, in high precision whatever autocast says."""

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        normalize: bool,
        router_dtype: torch.dtype | None,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.normalize = normalize
        self.router_dtype = router_dtype
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    def reset_parameters(self, seed: int | None = None, layer: int = 0, init: WeightInit = DEFAULT_INIT) -> None:
        """Draw the weight from (seed, layer); "fairseq" is U(±1/√D)."""
        bound = self.weight.shape[1] ** -0.5
        init.draw(self.weight, bound, parameter_generator(seed, layer, "router.weight"))

    def router_logits(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E) in `router_dtype`, by default at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32) if self.router_dtype is None else self.router_dtype
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))

    def replay(self, x: Tensor, recorded: Routing) -> Routing:
        """The recorded choices and drops with logits and weights computed anew from `x` (T, D)."""
        return self._routing(
            self.router_logits(x),
            recorded.expert_indices,
            recorded.kept,
            recorded.token_mask,
            recorded.sequence_ids,
        )

    def _routing(
        self,
        logits: Tensor,
        indices: Tensor,
        kept: Tensor,
        token_mask: Tensor | None,
        sequence_ids: Tensor | None,
    ) -> Routing:
        probs = logits.softmax(dim=1)
        weights = _kept_weights(probs, indices, kept, self.normalize)
        counts = count_assignments(indices, token_mask, self.num_experts)
        return Routing(logits, probs, indices, weights, kept, token_mask, sequence_ids, counts)

    def extra_repr(self) -> str:
        num_experts, d_model = self.weight.shape
        return f"d_model={d_model}, num_experts={num_experts}, top_k={self.top_k}, normalize={self.normalize}"


class TopKRouter(_LinearRouter):
    """The `top_k` experts of highest softmax probability; all other routers are exceptions to this one.

    normalize: divide the weights by their sum over the chosen experts. `None` means for top_k > 1: a single chosen
    weight divided by itself is 1, which leaves the router no gradient (Switch Transformer, eq. 2, keeps p).
    capacity_factor: `None` is dropless; otherwise an expert keeps ceil(capacity_factor · T · K / E) of its rows in
    training, first choices before second, earlier tokens before later, and normalised weights are divided by the sum
    over what was kept. eval_capacity_factor: the same in evaluation.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        normalize: bool | None = None,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        router_dtype: torch.dtype | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_expert_count(num_experts)
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"top_k ({top_k}) must be at least 1 and at most num_experts ({num_experts}); "
                f"a token cannot choose more experts than there are"
            )
        for name, value in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} ({value}) must be above 0, or None for dropless routing")
        super().__init__(
            d_model,
            num_experts,
            top_k,
            normalize=top_k > 1 if normalize is None else normalize,
            router_dtype=router_dtype,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor

    def forward(self, x: Tensor, token_mask: Tensor | None = None, sequence_ids: Tensor | None = None) -> Routing:
        """Route (T, D). token_mask: (T,) bool; masked tokens take no capacity and have no kept choice."""
        logits = self.router_logits(x)
        # chosen by logits: softmax rounds near-equal logits to equal probabilities
        indices = top_k_experts(logits.detach(), self.top_k, backend=self.backend)  # (T, K)
        kept = _valid_choices(indices, token_mask)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is not None:
            num_tokens = x.shape[0] if token_mask is None else int(token_mask.sum())
            capacity = expert_capacity(num_tokens, self.num_experts, self.top_k, factor)
            kept = keep_within_capacity(indices, kept, self.num_experts, capacity, backend=self.backend)
        return self._routing(logits, indices, kept, token_mask, sequence_ids)


class GShardRouter(_LinearRouter):
    """The paper's top-2 gate (moe_lm.md 4.2) with second-expert policy `all` and weights normalised after dropping.

    A token whose one choice is dropped gives the other one weight 1; with both dropped the layer adds nothing.

    rules: "fairseq" (the paper): an expert keeps 2·ceil(T/E) rows in training; "fairscale": 2·floor(T/E), and T must
    be divisible by E. T counts every token, masked ones included, as the originals do.
    eval_capacity_fraction: in evaluation an expert keeps ceil(fraction · T) rows; `None` drops nothing.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        rules: str = "fairseq",
        eval_capacity_fraction: float | None = None,
        router_dtype: torch.dtype | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_expert_count(num_experts)
        if num_experts < 2:
            raise ValueError(f"num_experts ({num_experts}) must be at least 2: GShardRouter chooses two of them")
        if rules not in ("fairseq", "fairscale"):
            raise ValueError(f"rules ({rules!r}) must be one of: fairseq, fairscale")
        if eval_capacity_fraction is not None and not 0.0 < eval_capacity_fraction <= 1.0:
            raise ValueError(
                f"eval_capacity_fraction ({eval_capacity_fraction}) must be above 0 and at most 1, "
                f"or None for dropless evaluation"
            )
        super().__init__(
            d_model,
            num_experts,
            2,
            normalize=True,
            router_dtype=router_dtype,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.rules = rules
        self.eval_capacity_fraction = eval_capacity_fraction

    def forward(self, x: Tensor, token_mask: Tensor | None = None, sequence_ids: Tensor | None = None) -> Routing:
        """Route (T, D). token_mask: (T,) bool; masked tokens have no kept choice but count in T."""
        logits = self.router_logits(x)
        indices = top_k_experts(logits.detach(), 2, backend=self.backend)
        kept = _valid_choices(indices, token_mask)
        capacity = self._capacity(x.shape[0])
        if capacity is not None:
            kept = keep_within_capacity(indices, kept, self.num_experts, capacity, backend=self.backend)
        return self._routing(logits, indices, kept, token_mask, sequence_ids)

    def _capacity(self, num_tokens: int) -> int | None:
        if not self.training:
            fraction = self.eval_capacity_fraction
            return None if fraction is None else _exact_ceil(fraction, num_tokens)
        if self.rules == "fairseq":
            return 2 * -(-num_tokens // self.num_experts)
        if num_tokens % self.num_experts != 0:
            raise ValueError(
                f"the number of tokens ({num_tokens}) must be divisible by num_experts ({self.num_experts}) "
                f"with rules=fairscale; pad the batch or use rules=fairseq"
            )
        return 2 * num_tokens // self.num_experts


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Rows one expert accepts from `num_tokens` tokens: ceil(capacity_factor · T · K / E), exact in decimals.

    A factor of 1.0 is the mean load for any K. Binary floating point would turn 1.1 · 10 into 12.
    """
    return math.ceil(Decimal(str(capacity_factor)) * num_tokens * top_k / num_experts)


def count_assignments(expert_indices: Tensor, token_mask: Tensor | None, num_experts: int) -> Tensor:
    """Choices per expert, dropped ones included and masked tokens left out. (T, K) -> (E,) int64."""
    chosen = expert_indices if token_mask is None else expert_indices[token_mask]
    return torch.bincount(chosen.flatten(), minlength=num_experts)


def require_expert_count(num_experts: object) -> None:
    """Raise ValueError unless `num_experts` is an integer of at least 1."""
    if not isinstance(num_experts, int) or isinstance(num_experts, bool) or num_experts < 1:
        raise ValueError(f"num_experts ({num_experts!r}) must be an integer of at least 1")


def _exact_ceil(fraction: float, count: int) -> int:
    return math.ceil(Decimal(str(fraction)) * count)


def _valid_choices(expert_indices: Tensor, token_mask: Tensor | None) -> Tensor:
    """(T, K) bool: true but for masked tokens."""
    if token_mask is None:
        return torch.ones_like(expert_indices, dtype=torch.bool)
    return token_mask[:, None].expand_as(expert_indices)


def _kept_weights(probs: Tensor, expert_indices: Tensor, kept: Tensor, normalize: bool) -> Tensor:
    """Probabilities of the kept choices, over their sum where `normalize`. (T, K)"""
    weights = torch.where(kept, probs.gather(1, expert_indices), 0.0)
    if not normalize:
        return weights
    # the clamp is fairseq's: a token without kept choices keeps its zeros
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps)
