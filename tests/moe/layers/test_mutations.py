"""The comparison of test_properties.py fails on every one of many broken layers, so that its passing means something.

Each function below replaces one of the project's, its target, which it gets as `original`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.layers import ExpertChoiceRouter, GShardRouter, Routing, TopKRouter

Function = Callable[..., Any]


def _load_properties() -> ModuleType:
    """From its file: test folders are no packages."""
    spec = spec_from_file_location("layer_properties", Path(__file__).with_name("test_properties.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


properties = _load_properties()
Case = properties.Case

DEEPSEEK = {
    "scores": "sigmoid",
    "num_groups": 4,
    "top_groups": 2,
    "bias_balanced": True,
    "weight_scale": 2.5,
    "jitter": 0.2,
}
# few, but every option that some mutant below needs to be seen is in one of them
CASES = [
    (TopKRouter, Case(t=9, e=5, k=2, seed=1)),
    (TopKRouter, Case(t=9, e=12, k=3, gated=True, activation="silu", bias=True, layout="sequences")),
    (TopKRouter, Case(t=16, e=4, k=2, mask="some", shared="gate", bias=True, router={"capacity_factor": 0.5})),
    (TopKRouter, Case(t=7, e=6, k=2, ties="twins", upstream="ones")),
    (TopKRouter, Case(t=16, e=8, k=3, router=DEEPSEEK)),
    (GShardRouter, Case(t=23, e=4, mask="some", router={"second_policy": "sampling"})),
    (GShardRouter, Case(t=23, e=4, router={"second_policy": "random"})),
    (GShardRouter, Case(t=24, e=4, training=False, router={"batch_prioritized": True, "eval_capacity_fraction": 0.1})),
    (GShardRouter, Case(t=16, e=4, layout="expanded", router={"normalize_before_dropping": True})),
    (ExpertChoiceRouter, Case(t=16, e=4, mask="some", ties="zero", router={"capacity_factor": 1.0})),
]
MUTANTS: dict[str, tuple[tuple[str, ...], Function]] = {}


def breaks(*targets: str) -> Callable[[Function], Function]:
    """Register a function as the mutant of each target."""

    def register(mutant: Function) -> Function:
        MUTANTS[mutant.__name__] = (targets, mutant)
        return mutant

    return register


# ---- to the experts and back ----

PERMUTE = "moe.kernels.permute.torch_impl"


@breaks(f"{PERMUTE}.unpermute")
def zeros(original: Function, *args: Any) -> Tensor:
    return torch.zeros_like(original(*args))


@breaks(f"{PERMUTE}.unpermute")
def unscaled(original: Function, rows: Tensor, weights: Tensor, order: Any) -> Tensor:
    return original(rows, torch.ones_like(weights), order)


@breaks(f"{PERMUTE}.unpermute_backward")
def unscaled_gradient_of_rows(original: Function, grad: Tensor, rows: Tensor, weights: Tensor, order: Any) -> Any:
    return original(grad, rows, torch.ones_like(weights), order)


@breaks(f"{PERMUTE}.unpermute_backward")
def gradient_of_the_neighbouring_slot(original: Function, *args: Any) -> Any:
    of_rows, of_weights = original(*args)
    return of_rows, of_weights.roll(1, 1)


@breaks(f"{PERMUTE}.sort_by_expert")
def a_dropped_slot(original: Function, indices: Tensor, kept: Tensor, num_experts: int) -> Any:
    kept = kept.clone()
    kept.view(-1)[kept.flatten().nonzero()[-1]] = False
    return original(indices, kept, num_experts)


@breaks(f"{PERMUTE}.sort_by_expert")
def offsets_off_by_one(original: Function, indices: Tensor, kept: Tensor, num_experts: int) -> Any:
    order = original(indices, kept, num_experts)
    offsets = order.expert_offsets.clone()
    offsets[1:-1] = (offsets[1:-1] + 1).clamp_max(offsets[-1])
    return order._replace(expert_offsets=offsets)


@breaks(f"{PERMUTE}.permute")
def rows_of_the_next_token(original: Function, x: Tensor, order: Any) -> Tensor:
    return original(x, order).roll(1, 0)


@breaks(f"{PERMUTE}.permute_backward")
def one_row_without_gradient(original: Function, grad: Tensor, order: Any) -> Tensor:
    grad = grad.clone()
    grad[-1:] = 0.0
    return original(grad, order)


@breaks("moe.layers.dispatch.LocalDispatcher.forward")
def tokens_in_reverse(original: Function, self: Any, x: Tensor, *others: Any) -> Tensor:
    return original(self, x.flip(0), *others)


# ---- the experts ----

FFN = "moe.kernels.expert_ffn.torch_impl"


@breaks(f"{FFN}.forward")
def swapped_experts(original: Function, rows: Tensor, bounds: Any, w_in: Tensor, *rest: Any) -> Any:
    return original(rows, bounds, w_in.roll(1, 0), *rest)


@breaks(f"{FFN}._activate")
def another_gelu(original: Function, x: Tensor, activation: str) -> Tensor:
    return F.gelu(x, approximate="tanh") if activation == "gelu" else original(x, activation)


@breaks(f"{FFN}._activation_backward")
def activation_taken_for_linear(original: Function, grad: Tensor, x: Tensor, activation: str, *, out: Tensor) -> Tensor:
    return out.copy_(grad)


@breaks(f"{FFN}.backward")
def one_upstream_row_for_all(original: Function, grad: Tensor, *rest: Any) -> Any:
    return original(grad[:1].expand_as(grad), *rest)


@breaks(f"{FFN}.backward")
def unwritten_gradient_of_empty_experts(
    original: Function, grad: Tensor, saved: Any, rows: Any, bounds: list[int], *rest: Any
) -> Any:
    gradients = original(grad, saved, rows, bounds, *rest)
    for e in range(len(bounds) - 1):
        if bounds[e] == bounds[e + 1]:
            gradients.w_in[e] = torch.nan
    return gradients


@breaks(f"{FFN}.backward")
def gate_and_input_gradients_exchanged(original: Function, *args: Any) -> Any:
    gradients = original(*args)
    if gradients.w_gate is None:
        return gradients
    return gradients._replace(w_in=gradients.w_gate, w_gate=gradients.w_in)


@breaks(f"{FFN}._grouped_sum")
def bias_gradient_misses_a_row(original: Function, rows: Tensor, *others: Any) -> Tensor:
    rows = rows.clone()
    rows[-1:] = 0.0
    return original(rows, *others)


@breaks("moe.layers.moe.MoE._shared")
def shared_network_on_masked_tokens(original: Function, self: Any, tokens: Tensor, token_mask: Any) -> Tensor:
    return original(self, tokens, None)


# ---- choosing ----

TOP_K = "moe.kernels.topk_routing.torch_impl"


@breaks(f"{TOP_K}.top_k_experts")
def ties_to_the_higher_index(original: Function, scores: Tensor, top_k: int) -> Tensor:
    return scores.shape[1] - 1 - original(scores.flip(1), top_k)


@breaks(f"{TOP_K}.top_k_experts")
def worst_choice_first(original: Function, scores: Tensor, top_k: int) -> Tensor:
    return original(scores, top_k).flip(1)


@breaks(f"{TOP_K}.keep_within_capacity")
def room_for_one_more(original: Function, indices: Any, valid: Any, num_experts: int, capacity: Tensor) -> Tensor:
    return original(indices, valid, num_experts, capacity + 1)


@breaks(f"{TOP_K}.keep_within_capacity")
def second_choices_of_early_tokens_first(
    original: Function, indices: Tensor, valid: Tensor, num_experts: int, capacity: Tensor
) -> Tensor:
    return original(indices.reshape(-1, 1), valid.reshape(-1, 1), num_experts, capacity).view_as(valid)


@breaks(f"{TOP_K}.keep_within_capacity")
def masked_tokens_take_room(
    original: Function, indices: Any, valid: Tensor, num_experts: int, capacity: Tensor
) -> Tensor:
    return original(indices, torch.ones_like(valid), num_experts, capacity) & valid


@breaks("moe.layers.router.expert_capacity", "moe.layers.expert_choice_router.expert_capacity")
def capacity_rounded_down(original: Function, *args: Any) -> Any:
    return original(*args) - 1


@breaks("moe.layers.gshard_router.GShardRouter.capacity")
def mean_load_rounded_down(original: Function, self: GShardRouter, num_tokens: int) -> int:
    return 2 * (num_tokens // self.num_experts)


@breaks("moe.layers.gshard_router.GShardRouter._keep")
def nobody_has_priority(original: Function, self: GShardRouter, probs: Tensor, *args: Any) -> Tensor:
    return original(self, torch.zeros_like(probs), *args)


@breaks("moe.layers.gshard_router.gumbel", "moe.layers.router.uniform")
def no_noise(original: Function, *args: Any) -> Tensor:
    return torch.zeros_like(original(*args))


@breaks("moe.layers.gshard_router.uniform")
def everyone_is_lucky(original: Function, *args: Any) -> Tensor:
    return torch.zeros_like(original(*args))


@breaks("moe.layers.router.TopKRouter._choice_scores")
def groups_and_bias_forgotten(original: Function, self: Any, logits: Tensor, *_: Any) -> Tensor:
    return logits


# ---- weights and losses ----


@breaks("moe.layers.router.Router.weights")
def dropped_choices_have_a_weight(original: Function, self: Any, probs: Tensor, indices: Tensor, kept: Any) -> Tensor:
    return probs.gather(1, indices)


@breaks("moe.layers.router.TopKRouter.weights")
def normalised_over_all_not_kept(original: Function, self: Any, probs: Tensor, indices: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, original(self, probs, indices, torch.ones_like(kept)), 0.0)


@breaks("moe.layers.router.TopKRouter.weights")
def scale_forgotten(original: Function, self: Any, *args: Any) -> Tensor:
    return original(self, *args) / self.weight_scale


@breaks("moe.layers.router.over_their_sum", "moe.layers.gshard_router.over_their_sum")
def sum_without_gradient(original: Function, weights: Tensor, floor: float | None = None) -> Tensor:
    sums = weights.detach().sum(dim=1, keepdim=True)
    return weights / torch.where(sums == 0, 1.0, sums)


@breaks("moe.layers.router.TopKRouter.probabilities")
def bias_in_the_weights(original: Function, self: Any, logits: Tensor) -> Tensor:
    return original(self, logits) + (0.0 if self.expert_bias is None else self.expert_bias)


@breaks("moe.layers.router_losses._masked_mean")
def losses_ignore_the_mask(original: Function, values: Tensor, token_mask: Any) -> Tensor:
    return original(values, None)


@breaks("moe.layers.router.count_assignments")
def only_first_choices_counted(original: Function, indices: Tensor, chosen: Tensor, num_experts: int) -> Tensor:
    return original(indices[:, :1], chosen[:, :1], num_experts)


@breaks("moe.layers.router.count_assignments")
def masked_tokens_counted(original: Function, indices: Tensor, chosen: Tensor, num_experts: int) -> Tensor:
    return original(indices, torch.ones_like(chosen), num_experts)


@breaks("moe.layers.router_losses._normalized_probs")
def probabilities_not_normalised(original: Function, routing: Routing) -> Tensor:
    return routing.router_probs


# ---- every one is caught ----


def test_whole_layers_pass() -> None:
    for kind, case in CASES:
        properties.compare(case, kind)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_catches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, mutant = MUTANTS[name]
    for target in targets:  # alone: one that is caught would hide another
        owner_path, _, attribute = target.rpartition(".")
        owner = resolve_name(owner_path)
        original = getattr(owner, attribute)
        with monkeypatch.context() as patch:
            patch.setattr(
                owner, attribute, lambda *args, _original=original, **options: mutant(_original, *args, **options)
            )
            assert any(_differs(kind, case) for kind, case in CASES), f"{name} of {target} passes every comparison"


def _differs(kind: type, case: Any) -> bool:
    """By the comparison's own assertion; a mutant that stops with another error proves nothing and fails the test."""
    try:
        properties.compare(case, kind)
    except AssertionError:
        return True
    return False
