"""To the experts and back on one device. `moe.distributed` replaces this dispatcher with its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from moe.kernels.backend import choose_backend
from moe.kernels.permute import permute, sort_by_expert, unpermute
from moe.layers.experts import Experts
from moe.layers.routing import Routing


class Dispatcher(Protocol):
    """Takes tokens to their experts and returns the weighted sums: `layer.dispatcher` may be anything that does so."""

    def __call__(
        self, x: Tensor, routing: Routing, experts: Experts, alongside: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """(T, D) -> (T, D): Σ_k expert_weights[t, k] · expert(x_t) over kept choices, plus what `alongside` returns.

        alongside: work on the same tokens that needs no expert, such as the shared network; a dispatcher that sends
        rows to other ranks does it meanwhile.
        """
        ...


class LocalDispatcher(nn.Module):
    """Sorts rows by (expert, token, choice), runs the experts and sums each token's rows in choice order."""

    def __init__(self, *, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend

    def forward(
        self, x: Tensor, routing: Routing, experts: Experts, alongside: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """See `Dispatcher`; for a token with no kept choice the sum is zero."""
        y = self._dispatch(x, routing, experts)
        return y if alongside is None else y + alongside()

    def _dispatch(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        num_experts = routing.tokens_per_expert.numel()
        order = sort_by_expert(routing.expert_indices, routing.kept, num_experts, backend=self.backend)
        fused = choose_backend("routed_expert_ffn", self.backend, x.device.type, has_triton=True) == "triton"
        if fused and not experts.drops_out:
            return experts(x, order.expert_offsets, order=order, expert_weights=routing.expert_weights)
        rows = permute(x, order, backend=self.backend)  # (R, D)
        rows = experts(rows, order.expert_offsets)
        return unpermute(rows, routing.expert_weights, order, backend=self.backend)
