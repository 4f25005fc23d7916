"""Choosing experts: checks and choice of backend. Integers come out, so there is no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose_backend
from . import reference, torch_impl


class NonFiniteScoresError(ValueError):
    """A token's best score is NaN or infinite: a top-k choice among such scores would be arbitrary."""


@torch.no_grad()
def top_k_experts(scores: Tensor, top_k: int, *, valid: Tensor | None = None, backend: str = "auto") -> Tensor:
    """The experts of the `top_k` highest scores of each token. (T, E) -> (T, K) int64.

    Best first; of equal scores the lower index comes first, on every device. A score of -inf is chosen last. Raises
    ValueError unless 1 <= top_k <= E, and on a CPU NonFiniteScoresError where the best score of a token is NaN or
    infinite (a GPU would have to wait for the answer). `valid` (T,) bool: tokens outside it may hold anything.
    """
    if scores.dim() != 2 or not 1 <= top_k <= scores.shape[1]:
        raise ValueError(f"top_k ({top_k}) must be between 1 and the E of scores (T, E), here {tuple(scores.shape)}")
    if choose_backend("top_k_experts", backend, scores.device.type) == "reference":
        require_finite(scores.amax(dim=1), valid)
        return reference.top_k_experts(scores, top_k)
    return _top_k_experts(scores, top_k, valid)


@torch.no_grad()
def keep_within_capacity(
    expert_indices: Tensor, valid: Tensor, num_experts: int, capacity: int | Tensor, *, backend: str = "auto"
) -> Tensor:
    """Which choices find room in experts that accept `capacity` rows each. (T, K) -> (T, K) bool.

    valid: (T, K) bool; the others take no room and are not kept. capacity: a number, or a scalar int64 tensor where
    it depends on data. First choices of all tokens are served before any second choice, and earlier tokens before
    later ones (moe_lm.md 4.2, step 12). Raises ValueError for shapes that differ or a negative capacity.
    """
    if expert_indices.shape != valid.shape:
        raise ValueError(f"expert_indices {tuple(expert_indices.shape)} and valid {tuple(valid.shape)} must agree")
    if not isinstance(capacity, Tensor):
        if capacity < 0:
            raise ValueError(f"capacity ({capacity}) must not be negative")
        capacity = torch.tensor(capacity, device=valid.device)
    if choose_backend("keep_within_capacity", backend, valid.device.type) == "reference":
        return reference.keep_within_capacity(expert_indices, valid, num_experts, int(capacity))
    return _keep_within_capacity(expert_indices, valid, num_experts, capacity)


def require_finite(best: Tensor, valid: Tensor | None) -> None:
    """Raise NonFiniteScoresError, naming the first token, unless the best score of each valid token is finite.

    best, valid: (T,). Looks on a CPU only: on a GPU the host would have to wait.
    """
    if best.device.type != "cpu":
        return
    bad = ~best.isfinite()
    if valid is not None:
        bad = bad & valid
    if bool(bad.any()):
        raise NonFiniteScoresError(
            f"the router's scores are not finite for {int(bad.sum())} of {bad.numel()} tokens, first for token "
            f"{int(bad.nonzero()[0])}: its input or the router's weight holds NaN or infinity"
        )


@torch.library.custom_op(
    "moe::top_k_experts", mutates_args=(), schema="(Tensor scores, int top_k, Tensor? valid) -> Tensor"
)
def _top_k_experts(scores: Tensor, top_k: int, valid: Tensor | None) -> Tensor:
    chosen = torch_impl.top_k_experts(scores, top_k)
    require_finite(scores.gather(1, chosen[:, :1]).squeeze(1), valid)  # argmax prefers NaN to every number
    return chosen


@_top_k_experts.register_fake
def _(scores: Tensor, top_k: int, valid: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape[0], top_k, dtype=torch.int64)


@torch.library.custom_op(
    "moe::keep_within_capacity",
    mutates_args=(),
    schema="(Tensor expert_indices, Tensor valid, int num_experts, Tensor capacity) -> Tensor",
)
def _keep_within_capacity(expert_indices: Tensor, valid: Tensor, num_experts: int, capacity: Tensor) -> Tensor:
    return torch_impl.keep_within_capacity(expert_indices, valid, num_experts, capacity).contiguous()


@_keep_within_capacity.register_fake
def _(expert_indices: Tensor, valid: Tensor, num_experts: int, capacity: Tensor) -> Tensor:
    return valid.new_empty(valid.shape)
