"""Choosing experts: checks, choice of backend and, for the router as a whole, the gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import choose_backend, is_traced
from . import reference, torch_impl


class NonFiniteScoresError(ValueError):
    """A token's best score is NaN or infinite: a top-k choice among such scores would be arbitrary."""


@torch.no_grad()
def top_k_experts(scores: Tensor, top_k: int, *, valid: Tensor | None = None, backend: str = "auto") -> Tensor:
    """The `top_k` highest-scoring experts of each token. (T, E) -> (T, K) int64.

    Best first; of equal scores the lower index comes first, on every device. A score of -inf is chosen last. Raises
    ValueError unless 1 <= top_k <= E, and on a CPU NonFiniteScoresError if a token's best score is NaN or infinite
    (with a GPU the host would have to wait). `valid` (T,) bool: tokens outside it may hold anything.
    """
    if scores.dim() != 2 or not 1 <= top_k <= scores.shape[1]:
        raise ValueError(f"top_k ({top_k}) must be between 1 and the E of scores (T, E), here {tuple(scores.shape)}")
    backend = choose_backend("top_k_experts", backend, scores.device.type, has_triton=True)
    if backend == "reference":
        require_finite(scores.amax(dim=1), valid)
        return reference.top_k_experts(scores, top_k)
    return (_choose if backend == "torch" and not is_traced(scores) else _top_k_experts)(scores, top_k, valid, backend)


@torch.no_grad()
def keep_within_capacity(
    expert_indices: Tensor, valid: Tensor, num_experts: int, capacity: int | Tensor, *, backend: str = "auto"
) -> Tensor:
    """Which choices find room in experts that accept `capacity` rows each. (T, K) -> (T, K) bool.

    valid: (T, K) bool; other choices take no room and are not kept. capacity: a number, or a scalar int64 tensor if
    it depends on data. First choices of all tokens are served before any second choice, and earlier tokens before
    later ones (Artetxe et al. 2021). Raises ValueError for shapes that differ or a negative capacity.
    """
    if expert_indices.shape != valid.shape:
        raise ValueError(f"expert_indices {tuple(expert_indices.shape)} and valid {tuple(valid.shape)} must agree")
    if not isinstance(capacity, Tensor):
        if capacity < 0:
            raise ValueError(f"capacity ({capacity}) must not be negative")
        # filled on the device: copying a number from the host would make the host wait
        capacity = torch.full((), capacity, dtype=torch.int64, device=valid.device)
    backend = choose_backend("keep_within_capacity", backend, valid.device.type, has_triton=True)
    if backend == "reference":
        return reference.keep_within_capacity(expert_indices, valid, num_experts, int(capacity))
    return _keep_within_capacity(expert_indices, valid, num_experts, capacity, backend)


def require_finite(best: Tensor, valid: Tensor | None) -> None:
    """Raise NonFiniteScoresError, naming the first token, unless the best score of each valid token is finite.

    best, valid: (T,). Checks on a CPU only: on a GPU the host would have to wait.
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


class TopKRouting(NamedTuple):
    """The experts chosen for each token, and their weights."""

    probs: Tensor  # (T, E), in the dtype of the logits
    expert_indices: Tensor  # (T, K) int64, best first
    expert_weights: Tensor  # (T, K), zero for invalid tokens
    tokens_per_expert: Tensor  # (E,) int64, valid tokens only


def top_k_routing(
    logits: Tensor,
    top_k: int,
    *,
    scores: str = "softmax",
    normalize: bool = True,
    weight_scale: float = 1.0,
    smallest_sum: float | None = None,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> TopKRouting:
    """Scores, choice, weights and load in one op: what a dropless top-k router does with its logits (T, E).

    scores: "softmax" over the experts or "sigmoid" of each. The choice is that of `top_k_experts` on the logits.
    Weights are the chosen scores, over their sum if `normalize`, times weight_scale, computed in at least float32. A
    sum below smallest_sum counts as smallest_sum; `None` is the machine epsilon of the computation's dtype, and the
    least is its smallest normal number. valid: (T,) bool; other tokens get zero weights and are not counted. Gradients
    reach the logits through `probs` and `expert_weights`. Raises ValueError as `top_k_experts` does, and for unknown
    scores.
    """
    if scores not in ("softmax", "sigmoid"):
        raise ValueError(f"scores ({scores!r}) must be one of: softmax, sigmoid")
    wide = torch.promote_types(logits.dtype, torch.float32)
    limits = torch.finfo(wide)
    smallest = limits.eps if smallest_sum is None else max(smallest_sum, limits.tiny)
    if choose_backend("top_k_routing", backend, logits.device.type, has_triton=True) == "triton":
        if logits.dim() != 2 or not 1 <= top_k <= logits.shape[1]:
            raise ValueError(f"top_k ({top_k}) must be between 1 and the E of logits (T, E), {tuple(logits.shape)}")
        options = (top_k, scores == "softmax", normalize, weight_scale, smallest)
        return TopKRouting(*_top_k_routing(logits, valid, *options))
    probs = logits.softmax(dim=1) if scores == "softmax" else logits.sigmoid()
    indices = top_k_experts(logits, top_k, valid=valid, backend=backend)
    weights = probs.gather(1, indices).to(wide)
    counted = indices.new_ones(indices.shape)
    if valid is not None:
        weights = torch.where(valid[:, None], weights, 0.0)
        counted = valid[:, None].to(torch.int64).expand_as(indices)
    if normalize:
        weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(smallest)
    weights = (weights * weight_scale).to(logits.dtype)
    load = indices.new_zeros(logits.shape[1]).scatter_add_(0, indices.flatten(), counted.flatten())
    return TopKRouting(probs, indices, weights, load)


def _implementation(backend: str) -> Any:
    if backend == "triton":
        from . import triton_impl  # Triton is loaded by the first op that runs on it

        return triton_impl
    return torch_impl


@torch.library.custom_op(
    "moe::top_k_experts", mutates_args=(), schema="(Tensor scores, int top_k, Tensor? valid, str backend) -> Tensor"
)
def _top_k_experts(scores: Tensor, top_k: int, valid: Tensor | None, backend: str) -> Tensor:
    return _choose(scores, top_k, valid, backend)


def _choose(scores: Tensor, top_k: int, valid: Tensor | None, backend: str) -> Tensor:
    chosen: Tensor = _implementation(backend).top_k_experts(scores, top_k)
    require_finite(scores.gather(1, chosen[:, :1]).squeeze(1), valid)  # argmax prefers NaN to every number
    return chosen


@_top_k_experts.register_fake
def _(scores: Tensor, top_k: int, valid: Tensor | None, backend: str) -> Tensor:
    return scores.new_empty(scores.shape[0], top_k, dtype=torch.int64)


@torch.library.custom_op(
    "moe::keep_within_capacity",
    mutates_args=(),
    schema="(Tensor expert_indices, Tensor valid, int num_experts, Tensor capacity, str backend) -> Tensor",
)
def _keep_within_capacity(
    expert_indices: Tensor, valid: Tensor, num_experts: int, capacity: Tensor, backend: str
) -> Tensor:
    kept: Tensor = _implementation(backend).keep_within_capacity(expert_indices, valid, num_experts, capacity)
    return kept.contiguous()


@_keep_within_capacity.register_fake
def _(expert_indices: Tensor, valid: Tensor, num_experts: int, capacity: Tensor, backend: str) -> Tensor:
    return valid.new_empty(valid.shape)


# Only Triton has a fused router: torch's path is the composition in `top_k_routing`.


@torch.library.custom_op(
    "moe::top_k_routing",
    mutates_args=(),
    schema="(Tensor logits, Tensor? valid, int top_k, bool softmax, bool normalize, float weight_scale, "
    "float smallest_sum) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _top_k_routing(
    logits: Tensor, valid: Tensor | None, top_k: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    routing: tuple[Tensor, Tensor, Tensor, Tensor] = _implementation("triton").route(logits, valid, top_k, *options)
    require_finite(logits.gather(1, routing[1][:, :1]).squeeze(1), valid)
    return routing


@_top_k_routing.register_fake
def _(logits: Tensor, valid: Tensor | None, top_k: int, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    indices = logits.new_empty(num_tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(num_tokens, top_k)
    load = logits.new_empty(num_experts, dtype=torch.int64)
    return logits.new_empty(logits.shape), indices, weights, load


@torch.library.custom_op(
    "moe::top_k_routing_backward",
    mutates_args=(),
    schema="(Tensor grad_probs, Tensor grad_weights, Tensor probs, Tensor expert_indices, Tensor? valid, "
    "bool softmax, bool normalize, float weight_scale, float smallest_sum) -> Tensor",
)
def _top_k_routing_backward(*inputs: Any) -> Tensor:
    grad: Tensor = _implementation("triton").route_backward(*inputs)
    return grad


@_top_k_routing_backward.register_fake
def _(grad_probs: Tensor, grad_weights: Tensor, probs: Tensor, *_: Any) -> Tensor:
    return probs.new_empty(probs.shape)


def _routing_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, valid, _, *ctx.options = inputs
    ctx.save_for_backward(*output[:2], valid)


def _routing_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad = _top_k_routing_backward(grads[0], grads[2], *ctx.saved_tensors, *ctx.options)
    return grad, None, None, None, None, None, None


_top_k_routing.register_autograd(_routing_gradient, setup_context=_routing_context)
