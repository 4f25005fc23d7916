"""Defects that other libraries shipped around whole models with experts, each foreclosed here by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe.config import ModelConfig, MoEConfig
from moe.generation import generate
from moe.kernels.topk_routing import NonFiniteScoresError
from moe.model import ModelOutput, Transformer
from moe.scaling.flops import flops_per_token
from moe.training.loss import compute_loss

MakeConfig = Callable[..., ModelConfig]


@pytest.fixture
def steered(model_config: MakeConfig, moe_config: MoEConfig) -> MakeConfig:
    """Sparse configs whose experts are chosen as in DeepSeek-V3: sigmoid scores and balancing biases."""

    def make(**changes: object) -> ModelConfig:
        moe = replace(moe_config, scores="sigmoid", bias_balance_rate=0.01, **changes)
        return model_config(sparse=True, moe_placement="first", moe=moe)

    return make


def build(config: ModelConfig, **options: object) -> Transformer:
    model = Transformer(config, **options)
    model.reset_parameters(seed=0)
    return model


def some_tokens(*shape: int) -> Tensor:
    return torch.randint(37, shape, generator=torch.Generator().manual_seed(1))


def biases(model: Transformer) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")]


def test_recomputation_moves_the_biases_no_further(steered: MakeConfig) -> None:
    """torchtitan#1593: under activation checkpointing the tokens of each expert were counted twice."""
    moved, loads = [], []
    for recompute in (False, True):
        model = build(steered(), recompute=recompute)
        output = model(some_tokens(2, 9), some_tokens(2, 9))
        output.token_losses.sum().backward()
        model.update_router_biases(output.routings, rate=0.01)
        moved.append(biases(model))
        loads.append([routing.tokens_per_expert for routing in output.routings])
    assert [int(load.sum()) for load in loads[1]] == [2 * 9 * 2] * 2
    assert all(torch.equal(a, b) for a, b in zip(loads[0] + moved[0], loads[1] + moved[1], strict=True))
    assert all(bias.any() for bias in moved[1])


def test_each_bias_follows_the_load_of_its_own_layer(steered: MakeConfig) -> None:
    """torchtitan#1593: one update for the counts of all layers, which must find their way back to their routers."""
    model = build(steered())
    output = model(some_tokens(2, 9), some_tokens(2, 9))
    model.update_router_biases(output.routings, rate=0.5)
    for bias, routing in zip(biases(model), output.routings, strict=True):
        load = routing.tokens_per_expert
        assert torch.equal(bias, 0.5 * torch.sign(load.sum() / 5 - load))
    assert not torch.equal(*biases(model))


@pytest.mark.parametrize("jitter", [None, 0.3])
def test_recomputation_sees_the_same_noise(
    model_config: MakeConfig, moe_config: MoEConfig, jitter: float | None
) -> None:
    """RL#1203, VeOmni#979: a recomputed layer that routes otherwise saves other tensors, or silently other gradients.
    With dropout, capacity and a jittered router."""
    config = model_config(
        sparse=True, dropout=0.2, moe=replace(moe_config, jitter=jitter, capacity_factor=0.7), num_layers=2
    )
    gradients = []
    for recompute in (False, True):
        model = build(config, recompute=recompute, dtype=torch.float64)
        torch.manual_seed(5)
        output = model(some_tokens(2, 9), some_tokens(2, 9), generator=torch.Generator().manual_seed(3))
        compute_loss(output, None, config.moe).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_noise_differs_from_layer_to_layer_and_step_to_step(model_config: MakeConfig, moe_config: MoEConfig) -> None:
    """A seed that is fixed so that recomputation repeats must not repeat elsewhere: the other side of
    torchtitan#1117, where the random state of the forward pass is kept for the second one."""
    model = build(model_config(sparse=True, moe_placement="first", moe=replace(moe_config, jitter=0.5)))
    with torch.no_grad():  # both sparse layers see equal tokens: what differs is noise
        for parameter in (model.layers[0].feed_forward.experts.w_out, *model.layers[1].parameters()):
            parameter.zero_()
        for layer in model.layers:
            layer.attention.out.weight.zero_()
        model.layers[2].feed_forward.router.weight.copy_(model.layers[0].feed_forward.router.weight)
    generator = torch.Generator().manual_seed(0)
    steps: list[ModelOutput] = [model(some_tokens(2, 9), generator=generator) for _ in range(2)]
    logits = [routing.router_logits for output in steps for routing in output.routings]
    quiet = [routing.router_logits for routing in model.eval()(some_tokens(2, 9)).routings]
    torch.testing.assert_close(quiet[0], quiet[1], rtol=1e-5, atol=1e-6)
    assert all(not torch.allclose(logits[i], logits[j], rtol=1e-3) for i in range(4) for j in range(i))


def test_no_two_layers_start_equal_and_none_depends_on_its_neighbours(model_config: MakeConfig) -> None:
    """modalities#426, OLMo-core#307: stages of a pipeline drew from one seed and started with equal layers."""
    short, deep = (
        build(model_config(sparse=True, moe_placement="first", num_layers=n, init="fairseq")) for n in (3, 5)
    )
    experts = [deep.layers[i].feed_forward.experts.w_in for i in (0, 2, 4)]
    routers = [deep.layers[i].feed_forward.router.weight for i in (0, 2, 4)]
    for weights in (experts, routers):
        assert not any(torch.equal(weights[i], weights[j]) for i in range(3) for j in range(i))
    shared = [name for name in short.state_dict() if name.startswith("layers.")]
    assert all(torch.equal(short.state_dict()[name], deep.state_dict()[name]) for name in shared)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_count_the_shared_network_at_its_own_width_and_no_lookup(
    model_config: MakeConfig, moe_config: MoEConfig, tied: bool
) -> None:
    """maxtext#4017: the shared expert was counted at the width of the routed ones, and so in its test's reference.
    trl#5698: an untied embedding, a lookup, was counted as a product. The reference here is torch's counter."""
    moe = replace(moe_config, shared_d_ff=9, shared_gate=True)
    config = model_config(sparse=True, moe=moe, expert_d_ff=4, gated=True, tie_embeddings=tied)
    model = build(config, backend="reference")
    tokens = some_tokens(2, 8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens)
    assert flops_per_token(config, 8).forward * tokens.numel() == counter.get_total_flops()


def test_a_router_that_sees_nan_names_its_layer(model_config: MakeConfig) -> None:
    """colibri#558, vllm#39391: one NaN before the gate ended in broken memory far from where it began."""
    model = build(model_config(sparse=True, moe_placement="first"))
    with torch.no_grad():
        model.layers[1].attention.out.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteScoresError, match=r"^layer 2: .* first for token 0"):
        model(some_tokens(2, 9), some_tokens(2, 9))


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_tight_training_capacity_does_not_reach_generation(
    model_config: MakeConfig, moe_config: MoEConfig, scores: str
) -> None:
    """moe-fairseq top2gate.py: in evaluation an expert keeps a quarter of all tokens, so drops depend on the batch, and
    the room for them made evaluation twelve times as slow as training (fairseq#4788)."""
    moe = replace(moe_config, capacity_factor=0.2, scores=scores)
    tight, free = (
        build(model_config(sparse=True, moe=m), dtype=torch.float64) for m in (moe, replace(moe, capacity_factor=None))
    )
    with torch.no_grad():
        for model in (tight, free):
            model.embedding.weight.mul_(20)
            for layer in model.config.moe_layers:  # experts that decide which token comes next
                model.layers[layer].feed_forward.experts.w_out.mul_(3000)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert not tight(some_tokens(2, 9)).routings[0].kept.all()
    assert generate(tight, prompts, 8) == generate(free, prompts, 8)
    assert generate(tight, prompts[:1], 8) == generate(tight, prompts, 8)[:1]


def test_a_checkpoint_carries_the_balancing_biases(steered: MakeConfig) -> None:
    """vllm#47797: the biases are weights of a checkpoint, to the last digit, in a model of any dtype."""
    model = build(steered())
    output = model(some_tokens(2, 9), some_tokens(2, 9))
    model.update_router_biases(output.routings, rate=0.0123456789)
    restored = build(steered(), dtype=torch.bfloat16)
    missing = restored.load_state_dict(model.state_dict())
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert all(torch.equal(a, b) for a, b in zip(biases(restored), biases(model), strict=True))
    assert all(bias.any() for bias in biases(restored))
