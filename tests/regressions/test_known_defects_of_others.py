"""Defects that other libraries shipped, each foreclosed here by name. The thread or file is cited with the test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe.config import ModelConfig, MoEConfig
from moe.layers import GShardRouter, MoE, TopKRouter, load_balance_loss, router_z_loss, routing_statistics
from moe.layers.initialization import WeightInit
from moe.model import Transformer
from moe.scaling.flops import flops_per_token
from moe.training.loss import compute_loss

D, FF, E = 8, 12, 6


def layer(**options: object) -> MoE:
    made = MoE(D, FF, E, **options)
    made.reset_parameters(seed=0, init=WeightInit(std=0.5))
    return made


def test_auxiliary_losses_live_on_no_global() -> None:
    """megablocks#113: losses in module-global lists break with recompute and need a manual clear."""
    module, x = layer(), torch.randn(10, D)
    once = load_balance_loss(module(x)[1])
    for _ in range(3):
        checkpoint(module, x.clone().requires_grad_(), use_reentrant=False)[0].sum().backward()
    assert torch.equal(load_balance_loss(module(x)[1]), once)


def test_recompute_counts_no_token_twice() -> None:
    """torchtitan moe.py: token counts of a recomputed layer are doubled and halved again by hand."""
    module, x = layer(), torch.randn(10, D, requires_grad=True)
    y, routing = checkpoint(module, x, use_reentrant=False)
    y.sum().backward()
    assert int(routing.tokens_per_expert.sum()) == 10 * 2


def test_balance_does_not_depend_on_the_number_of_experts() -> None:
    """FastMoE gates/gshard_gate.py: the loss shrinks with the square of the expert-parallel degree."""
    for num_experts in (2, 8, 64):
        router = TopKRouter(D, num_experts)
        torch.nn.init.zeros_(router.weight)
        routing = router(torch.randn(num_experts, D))
        even = (torch.arange(num_experts)[:, None] + torch.arange(2)) % num_experts
        counts = torch.full((num_experts,), 2)
        balanced = routing._replace(expert_indices=even, tokens_per_expert=counts)
        assert float(load_balance_loss(balanced).detach()) == pytest.approx(1.0, rel=1e-6)


def test_auxiliary_gradients_reach_the_router() -> None:
    """Megatron-LM#3768, #5007: an auxiliary loss that never arrives at the gate."""
    module = layer()
    _, routing = module(torch.randn(10, D))
    for loss in (load_balance_loss(routing), router_z_loss(routing)):
        (gradient,) = torch.autograd.grad(loss, module.router.weight, retain_graph=True)
        assert gradient.abs().max() > 0


def test_padding_takes_no_capacity_and_skews_no_loss() -> None:
    """Megatron-LM#1984, #5542: padding tokens eat capacity and enter the balance loss."""
    module = layer(capacity_factor=1.0)
    real, padding = torch.randn(8, D), torch.randn(24, D)
    mask = torch.arange(32) < 8
    y, padded = module(torch.cat([real, padding]), token_mask=mask)
    alone, routing = module(real)
    torch.testing.assert_close(y[:8], alone, rtol=1e-6, atol=1e-6)
    assert torch.equal(padded.kept[:8], routing.kept)
    for loss in (load_balance_loss, router_z_loss):
        torch.testing.assert_close(loss(padded), loss(routing), rtol=1e-6, atol=1e-6)
    assert torch.equal(routing_statistics(padded).tokens_per_expert, routing.tokens_per_expert)


@pytest.mark.parametrize("router", [None, "gshard"])
def test_evaluation_does_not_depend_on_batch_mates(router: str | None) -> None:
    """fairseq#4788, lm-evaluation-harness#3203: results that change with the batch, because capacity does."""
    module = layer() if router is None else layer(router=GShardRouter(D, E))
    module.eval()
    x = torch.randn(40, D)
    x[1:] = x[1]  # everybody wants the same experts
    torch.testing.assert_close(module(x)[0][0], module(x[:1])[0][0], rtol=1e-6, atol=1e-6)


def test_evaluation_is_deterministic() -> None:
    """fairseq top2gate.py: the second expert is sampled in evaluation too."""
    module = layer(router=GShardRouter(D, E)).eval()
    x = torch.randn(20, D)
    assert torch.equal(module(x)[0], module(x)[0])


def test_the_capacity_rule_drops_the_last_not_an_arbitrary_token() -> None:
    """OLMo-core parallel_mlp.py: which token is dropped is left open."""
    module = layer(capacity_factor=0.5, top_k=1)
    x = torch.randn(1, D).expand(12, D)
    kept = module(x)[1].kept[:, 0]
    assert kept.tolist() == [True] + [False] * 11  # ceil(0.5 * 12 / 6) = 1


def test_top_1_leaves_the_router_a_gradient() -> None:
    """A single weight divided by itself is 1: the gate then learns from the auxiliary losses alone."""
    module = layer(top_k=1)
    module(torch.randn(10, D))[0].square().sum().backward()
    assert module.router.weight.grad.abs().max() > 0


def test_a_layer_is_built_without_a_gpu_and_without_a_word() -> None:
    """megablocks arguments.py asks for the current CUDA device; sonic-moe captures a stream in the constructor."""
    code = "from moe.layers import MoE; import torch; MoE(8, 12, 6); print(torch.cuda.is_initialized())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("False", "")


def test_flops_count_active_experts_attention_and_head(model_config: Callable[..., ModelConfig]) -> None:
    """prime-rl#778, trl#5698: 6 x total parameters, which counts every expert for every token."""
    sparse = model_config(sparse=True, expert_d_ff=10)
    more = replace(sparse, moe=replace(sparse.moe, num_experts=50))
    router = 3 * 2 * sparse.d_model * (50 - sparse.moe.num_experts) * len(sparse.moe_layers)
    assert flops_per_token(more, 8).training - flops_per_token(sparse, 8).training == router
    assert flops_per_token(sparse, 16).training > flops_per_token(sparse, 8).training


def test_perplexity_holds_no_auxiliary_loss(model_config: Callable[..., ModelConfig], moe_config: MoEConfig) -> None:
    """Artetxe et al. 2021: the logged loss of the paper's trainer is 0.12 nat above the cross-entropy at balance."""
    model = Transformer(model_config(sparse=True))
    model.reset_parameters(0)
    tokens = torch.randint(37, (2, 9))
    output = model(tokens, tokens)
    heavy = compute_loss(output, None, replace(moe_config, load_balance_weight=5.0))
    light = compute_loss(output, None, replace(moe_config, load_balance_weight=0.0))
    assert torch.equal(heavy.cross_entropy, light.cross_entropy)
    assert float(heavy.loss.detach()) > float(light.loss.detach()) + 4
