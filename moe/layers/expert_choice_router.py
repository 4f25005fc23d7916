"""Experts choose tokens (Zhou et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels.topk_routing import require_finite
from moe.layers.capacity import CapacityFactor, ExactFactor, expert_capacity
from moe.layers.noise import Randomness
from moe.layers.router import Router
from moe.layers.routing import Routing


class ExpertChoiceRouter(Router):
    """Each expert takes the ceil(capacity_factor · T / E) tokens with the highest softmax probability for it.

    Load is equal by construction: nothing is dropped for lack of room and no balance loss is needed, but a token may
    get many experts or none. capacity_factor is the mean number of experts per token.

    An expert compares all tokens of the routing group, **future ones included**: whether a token is chosen depends on
    what comes after it, so a causal language model trained this way sees the future. It suits encoders and vision
    models. The choice also depends on batch mates, in evaluation too.

    The Routing has K = E: pair (t, e) is kept where expert e chose token t.
    """

    capacity_factor = CapacityFactor()
    _capacity_factor: ExactFactor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        capacity_factor: float = 2.0,
        router_dtype: torch.dtype | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, num_experts, num_experts, router_dtype=router_dtype, backend=backend, device=device, dtype=dtype
        )
        self.capacity_factor = capacity_factor

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        *,
        generator: Randomness | None = None,
    ) -> Routing:
        """See `Router.forward`. T counts valid tokens; between equal probabilities the earlier token wins."""
        logits = self.router_logits(x)
        probs = self.probabilities(logits)
        num_tokens = x.shape[0]
        with torch.no_grad():
            if self.check_scores and not torch.compiler.is_compiling():
                require_finite(logits.amax(dim=1), token_mask)
            wishes = probs if token_mask is None else torch.where(token_mask[:, None], probs, -1.0)
            order = wishes.argsort(dim=0, descending=True, stable=True)  # (T, E), NaN first: unchecked, it propagates
            valid_tokens = num_tokens if token_mask is None else token_mask.sum()
            capacity = expert_capacity(valid_tokens, self.num_experts, 1, self._capacity_factor)
            rank = torch.arange(num_tokens, device=x.device)[:, None]
            kept = torch.zeros_like(order, dtype=torch.bool)
            kept.scatter_(0, order, ((rank < capacity) & (rank < valid_tokens)).expand_as(order))
            indices = torch.arange(self.num_experts, device=x.device).expand(num_tokens, -1)
        return self._routing(logits, probs, indices, kept, kept, token_mask, sequence_ids)

    def num_rows(self, num_tokens: int) -> int:
        """The capacity of all experts, each limited to `num_tokens`."""
        capacity = expert_capacity(num_tokens, self.num_experts, 1, self._capacity_factor)
        return self.num_experts * min(int(capacity), num_tokens)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, capacity_factor={self.capacity_factor}"
