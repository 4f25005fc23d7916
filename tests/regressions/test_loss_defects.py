"""Defects that other libraries shipped in balance losses and z-losses, each foreclosed here by name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe.config import ModelConfig, MoEConfig
from moe.layers import MoE, TopKRouter, load_balance_loss, router_z_loss
from moe.layers.initialization import WeightInit
from moe.layers.routing import Routing, count_assignments
from moe.model import ModelOutput, Transformer
from moe.training.loss import compute_loss

ROOT = Path(__file__).parents[2]
D, FF, E = 8, 12, 6


def routing_of(logits: Tensor, probs: Tensor, indices: Tensor, sequence_ids: Tensor | None = None) -> Routing:
    everything = torch.ones_like(indices, dtype=torch.bool)
    counts = count_assignments(indices, everything, logits.shape[1])
    weights = probs.gather(1, indices)
    return Routing(logits, probs, indices, weights, everything, everything, None, sequence_ids, counts)


def seeded_router(**options: object) -> TopKRouter:
    router = TopKRouter(D, E, **options)
    router.reset_parameters(seed=0, init=WeightInit(std=1.0))
    return router


@pytest.mark.parametrize("scope", ["local", "sequence"])
def test_tiny_sigmoid_scores_do_not_hide_an_imbalance(scope: str) -> None:
    """Megatron-LM#1545, OLMo-core#255: scores below the epsilon of 1e-20 made the loss 0 where it is at least 1."""
    indices = torch.zeros(10, 1, dtype=torch.int64)
    losses = []
    for shift in (0.0, 40.0, 60.0):
        logits = torch.arange(E).flip(0).expand(10, E) * 1.0 - 20.0 - shift  # sigmoid is about exp here
        routing = routing_of(logits, logits.sigmoid(), indices, torch.arange(10) // 5)
        losses.append(float(load_balance_loss(routing, scope=scope)))
    assert losses[0] > 3
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)


def test_scores_in_low_precision_are_normalised_in_float32() -> None:
    """Megatron-LM#2741, #2765: the sum of many sigmoid scores and the loss were left in bfloat16."""
    num_experts = 512
    scores = torch.rand(64, num_experts, generator=torch.Generator().manual_seed(0)).bfloat16()
    indices = scores.float().topk(4).indices
    loss = load_balance_loss(routing_of(scores, scores, indices))
    exact = load_balance_loss(routing_of(scores.double(), scores.double(), indices))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=1e-6)
    z = router_z_loss(routing_of(scores, scores, indices))
    assert float(z) == pytest.approx(float(scores.double().logsumexp(1).square().mean()), rel=1e-6)


def test_the_sequence_loss_knows_the_routers_own_scores() -> None:
    """Megatron-LM#1438: the sequence-level loss took a softmax where the router had chosen by sigmoid."""
    router = seeded_router(scores="sigmoid")
    routing = router(torch.randn(12, D), None, torch.arange(12) // 4)
    expected = 0.0
    for sequence in range(3):
        rows = slice(4 * sequence, 4 * sequence + 4)
        scores = torch.sigmoid(routing.router_logits[rows])
        mean = (scores / scores.sum(dim=1, keepdim=True)).mean(dim=0)
        share = torch.bincount(routing.expert_indices[rows].flatten(), minlength=E) / 8
        expected += float((E * (mean * share).sum()).detach()) / 3
    actual = float(load_balance_loss(routing, scope="sequence").detach())
    assert actual == pytest.approx(expected, rel=1e-5)
    soft = routing._replace(router_probs=routing.router_logits.softmax(dim=1))
    assert actual != pytest.approx(float(load_balance_loss(soft, scope="sequence").detach()), rel=1e-2)


def test_the_loss_depends_on_the_choice() -> None:
    """transformers#28093, #28255: the choices were counted wrongly, and the loss was a constant."""
    logits = torch.linspace(2.0, 0.0, E).expand(12, E)
    probs = logits.softmax(dim=1)
    losses = [float(load_balance_loss(routing_of(logits, probs, torch.full((12, 1), e)))) for e in range(E)]
    assert losses == pytest.approx([E * float(p) for p in probs[0]], rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3, 6])
def test_balance_is_one_for_any_number_of_choices(top_k: int) -> None:
    """OLMoE#45: the shares of experts added up to K instead of 1, so a weight meant another thing for each K."""
    indices = (torch.arange(E)[:, None] + torch.arange(top_k)) % E
    routing = routing_of(torch.zeros(E, E), torch.full((E, E), 1 / E), indices)
    assert float(load_balance_loss(routing)) == pytest.approx(1.0, rel=1e-6)


def test_layers_do_not_balance_each_other(model_config: Callable[..., ModelConfig], moe_config: MoEConfig) -> None:
    """transformers#31464: all layers in one mean, so that two collapsed layers look like two half-used experts."""
    model = Transformer(model_config(sparse=True))
    tokens = torch.randint(37, (2, 9))
    logits = torch.zeros(18, 5)
    collapsed = []
    for e in (0, 3):
        probs = torch.zeros(18, 5).index_fill(1, torch.tensor([e]), 1.0)
        collapsed.append(routing_of(logits, probs, torch.full((18, 1), e)))
    output: ModelOutput = model(tokens, tokens)._replace(routings=tuple(collapsed))
    loss = compute_loss(output, None, moe_config)
    assert float(loss.load_balance_loss) == pytest.approx(5.0, rel=1e-6)


def test_micro_batches_of_any_size_give_one_gradient(
    model_config: Callable[..., ModelConfig], moe_config: MoEConfig
) -> None:
    """Megatron-LM#5798, Automodel#3359: the weight of the auxiliary losses depended on the number or the size of
    micro-batches."""
    moe = replace(moe_config, load_balance_scope="sequence", load_balance_weight=1.0, router_z_loss_weight=0.1)
    model = Transformer(model_config(sparse=True, moe=moe), dtype=torch.float64)
    model.reset_parameters(0)
    tokens = torch.randint(37, (4, 9))
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[1, 3:] = mask[3, 7:] = False

    def gradients(sizes: list[int]) -> list[Tensor]:
        total = torch.zeros((), dtype=torch.float64)
        for part, part_mask in zip(tokens.split(sizes), mask.split(sizes), strict=True):
            loss = compute_loss(model(part, part, token_mask=part_mask), part_mask, moe)
            total = total + loss.loss * loss.num_tokens / mask.sum()
        return list(torch.autograd.grad(total, list(model.parameters())))

    whole = gradients([4])
    for sizes in ([2, 2], [1, 3], [1, 1, 1, 1]):
        for actual, expected in zip(gradients(sizes), whole, strict=True):
            scale = float(expected.abs().max())
            assert scale > 0
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * scale)  # token losses are float32


def test_more_of_the_same_tokens_change_no_auxiliary_loss() -> None:
    """Megatron-LM#1652, #5047: auxiliary gradients multiplied by a number of tokens that was divided by another."""
    router = seeded_router()
    x = torch.randn(12, D)
    for loss in (load_balance_loss, router_z_loss):
        once, twice = loss(router(x)), loss(router(x.repeat(2, 1)))
        torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)
        gradients = [torch.autograd.grad(value, router.weight)[0] for value in (once, twice)]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6 * float(gradients[0].abs().max()))


def test_drops_and_capacity_do_not_reach_the_balance_loss() -> None:
    """Megatron-LM#1617: the map of what was kept, padded to capacity, made every expert look equally loaded."""
    x = torch.randn(30, D)
    dropless, tight = seeded_router(), seeded_router(capacity_factor=0.3)
    dropped = tight(x)
    assert dropped.kept.sum() < dropped.chosen.sum()
    for scope in ("local", "sequence"):
        for choices in ("all", "first"):
            losses = [load_balance_loss(r, scope=scope, choices=choices) for r in (dropless(x), dropped)]
            assert torch.equal(losses[0], losses[1])


def test_a_mask_is_read_in_the_order_of_the_tokens() -> None:
    """transformers#28505, #29363: the loss knew no mask, and when it did the mask had to be corrected once more."""
    layer = MoE(D, FF, E)
    layer.reset_parameters(seed=0, init=WeightInit(std=1.0))
    x = torch.randn(3, 5, D)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    padded, alone = layer(x, token_mask=mask)[1], layer(x[mask])[1]
    assert torch.equal(padded.tokens_per_expert, alone.tokens_per_expert)
    for loss in (load_balance_loss, router_z_loss):
        torch.testing.assert_close(loss(padded), loss(alone), rtol=1e-6, atol=0)


GLOBAL_BALANCE = """
import sys, torch, torch.distributed as dist
from moe.distributed.world import end_process
from moe.layers import TopKRouter, load_balance_loss
from moe.layers.initialization import WeightInit
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
router = TopKRouter(8, 6, dtype=torch.float64)
router.reset_parameters(seed=0, init=WeightInit(std=1.0))
whole = torch.randn(20, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
mine = whole.split([14, 6])[rank]
loss = load_balance_loss(router(mine), scope="global", group=dist.group.WORLD)
(gradient,) = torch.autograd.grad(loss, router.weight)
gradient *= mine.shape[0] / whole.shape[0]  # the mean over ranks, weighted by tokens, as for the cross-entropy
dist.all_reduce(gradient)
expected = load_balance_loss(router(whole))
(of_one,) = torch.autograd.grad(expected, router.weight)
local = load_balance_loss(router(mine))
assert abs(float(local.detach() - expected.detach())) > 1e-3
torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=0)
torch.testing.assert_close(gradient, of_one, rtol=0, atol=1e-12 * float(of_one.abs().max()))
print("equal")
end_process()
"""


def test_the_global_balance_is_that_of_one_process_with_its_gradient(tmp_path: Path) -> None:
    """Megatron-LM#1498: balance over micro-batches alone forbids experts that specialise. Megatron-LM#3672: over the
    global batch its gradient came out too small by the number of ranks."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", GLOBAL_BALANCE, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [output.strip().splitlines()[-1:] for output in outputs] == [["equal"]] * 2, "\n".join(outputs)
