"""To the experts and back on one device. `moe.distributed` puts another dispatcher in this one's place."""

from __future__ import annotations

from torch import Tensor, nn

from moe.kernels.backend import choose_backend
from moe.kernels.permute import permute, sort_by_expert, unpermute
from moe.layers.experts import Experts
from moe.layers.routing import Routing


class LocalDispatcher(nn.Module):
    """Sorts rows by (expert, token, choice), runs the experts and adds each token's rows up in choice order."""

    def __init__(self, *, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend

    def forward(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """(T, D) -> (T, D): Σ_k expert_weights[t, k] · expert(x_t) over the kept choices; zeros where none is kept."""
        num_experts = routing.tokens_per_expert.numel()
        order = sort_by_expert(routing.expert_indices, routing.kept, num_experts, backend=self.backend)
        fused = choose_backend("routed_expert_ffn", self.backend, x.device.type, has_triton=True) == "triton"
        if fused and not experts.drops_out:
            return experts(x, order.expert_offsets, order=order, expert_weights=routing.expert_weights)
        rows = permute(x, order, backend=self.backend)  # (R, D)
        rows = experts(rows, order.expert_offsets)
        return unpermute(rows, routing.expert_weights, order, backend=self.backend)
