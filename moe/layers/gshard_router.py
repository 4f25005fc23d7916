"""The top-2 gate of GShard, as fairseq and fairscale wrote it and as the paper used it (Artetxe et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe.config.checks import require_choice
from moe.kernels.topk_routing import keep_within_capacity, top_k_experts
from moe.layers.arguments import require_count
from moe.layers.capacity import CapacityFactor, ExactFactor
from moe.layers.noise import Randomness, gumbel, require_generator, uniform
from moe.layers.router import Router, over_their_sum
from moe.layers.routing import Routing, valid_choices

RULES = ("fairseq", "fairscale")
SECOND_POLICIES = ("all", "sampling", "random")
_FAIRSEQ_EVAL_FRACTION = 0.25  # fairseq's default


class GShardRouter(Router):
    """Two experts per token, with a capacity; all first choices are served before any second choice.

    If one of a token's choices is dropped, the other gets weight 1; if both are, the layer adds nothing.

    rules: "fairseq" (the paper): an expert keeps 2·ceil(T/E) rows in training; "fairscale": 2·floor(T/E), and T must
    be divisible by E. T counts every token, masked ones included, as the originals do.
    second_policy: "all" takes the second-best expert (the paper); "sampling" the best by logits plus Gumbel noise;
    "random" takes the second-best with probability 2·weight, and otherwise none (GShard, meant for normalised
    weights). `None` follows `rules`: "all" for fairseq (the paper's setting), "sampling" for fairscale.
    normalize_before_dropping: weights are p1/(p1+p2) and p2/(p1+p2) whatever is dropped, not p over the kept sum.
    batch_prioritized: tokens are served in order of highest first probability rather than position (V-MoE).
    eval_capacity_fraction: in evaluation an expert keeps ceil(fraction · T) rows; `None` drops nothing.
    eval_as_original: evaluate as the originals do: second choices drawn as in training (a generator is needed), and a
    capacity: for fairseq the fraction above (a quarter if not given), for fairscale that of training.
    """

    eval_capacity_fraction = CapacityFactor(off="dropless evaluation", most=1)
    _eval_capacity_fraction: ExactFactor | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        rules: str = "fairseq",
        second_policy: str | None = None,
        normalize_before_dropping: bool = False,
        batch_prioritized: bool = False,
        eval_capacity_fraction: float | None = None,
        eval_as_original: bool = False,
        router_dtype: torch.dtype | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_choice("rules", rules, RULES)
        if second_policy is not None:
            require_choice("second_policy", second_policy, SECOND_POLICIES)
        if require_count("num_experts", num_experts) == 1:
            raise ValueError("num_experts (1) must be at least 2: GShardRouter chooses two of them")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(d_model, num_experts, 2, router_dtype=router_dtype, backend=backend, **factory)
        self.rules = rules
        self.second_policy = second_policy or ("all" if rules == "fairseq" else "sampling")
        self.normalize_before_dropping = normalize_before_dropping
        self.batch_prioritized = batch_prioritized
        self.eval_capacity_fraction = eval_capacity_fraction
        if eval_as_original and rules == "fairseq" and eval_capacity_fraction is None:
            self.eval_capacity_fraction = _FAIRSEQ_EVAL_FRACTION
        self.eval_as_original = eval_as_original

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        *,
        generator: Randomness | None = None,
    ) -> Routing:
        """See `Router.forward`. Masked tokens are not served but count in T; "sampling" and "random" draw."""
        logits = self.router_logits(x)
        probs = self.probabilities(logits)
        draws = self.training or self.eval_as_original
        with torch.no_grad():
            first = top_k_experts(self._choosable(probs), 1, valid=token_mask, backend=self.backend)  # (T, 1)
            contest = logits.detach()
            if self.second_policy == "sampling" and draws:
                contest = contest + gumbel(contest.shape, contest, require_generator(generator, "sampling"))
            contest = self._choosable(contest).scatter(1, first, -torch.inf)
            second = top_k_experts(contest, 1, valid=token_mask, backend=self.backend)
            indices = torch.cat([first, second], dim=1)  # (T, 2)
            chosen = valid_choices(indices, token_mask)
            if self.second_policy == "random" and draws:
                chosen = torch.stack([chosen[:, 0], chosen[:, 1] & self._lucky(probs, indices, generator)], dim=1)
            kept = self._keep(probs, indices, chosen, self.capacity(x.shape[0]))
        return self._routing(logits, probs, indices, chosen, kept, token_mask, sequence_ids)

    def weights(self, probs: Tensor, expert_indices: Tensor, kept: Tensor) -> Tensor:
        """The kept p1 and p2 over their sum; with normalize_before_dropping, over the sum of both. (T, 2)"""
        if self.normalize_before_dropping:
            return torch.where(kept, over_their_sum(probs.gather(1, expert_indices)), 0.0)
        return over_their_sum(super().weights(probs, expert_indices, kept))

    def _lucky(self, probs: Tensor, indices: Tensor, generator: Randomness | None) -> Tensor:
        """(T,) bool: where twice the second weight is above a uniform draw (Artetxe et al. 2021)."""
        pair = probs.detach().gather(1, indices)
        if self.normalize_before_dropping:
            pair = over_their_sum(pair)
        second = pair[:, 1]
        return 2.0 * second > uniform(second.shape, second, require_generator(generator, "second_policy=random"))

    def _keep(self, probs: Tensor, indices: Tensor, chosen: Tensor, capacity: int | Tensor | None) -> Tensor:
        if capacity is None:
            return chosen
        if not self.batch_prioritized:
            return keep_within_capacity(indices, chosen, self.num_experts, capacity, backend=self.backend)
        order = probs.detach().amax(dim=1).argsort(descending=True, stable=True)
        kept = keep_within_capacity(indices[order], chosen[order], self.num_experts, capacity, backend=self.backend)
        return torch.empty_like(kept).index_copy_(0, order, kept)

    def capacity(self, num_tokens: int) -> int | None:
        """See `Router.capacity`. Raises ValueError with rules=fairscale if num_experts does not divide T."""
        if not self.training:
            if self._eval_capacity_fraction is not None:
                return int(self._eval_capacity_fraction.ceil_of(num_tokens))
            if not self.eval_as_original:
                return None
        if self.rules == "fairseq":
            return 2 * -(-num_tokens // self.num_experts)
        if num_tokens % self.num_experts != 0:
            raise ValueError(
                f"the number of tokens ({num_tokens}) must be divisible by num_experts ({self.num_experts}) "
                f"with rules=fairscale; pad the batch or use rules=fairseq"
            )
        return 2 * num_tokens // self.num_experts

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rules={self.rules}, second_policy={self.second_policy}"
