from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moe.config import ModelConfig, MoEConfig
from moe.layers.router_losses import load_balance_loss, router_z_loss
from moe.model import ModelOutput, Transformer
from moe.training.loss import compute_loss


@pytest.fixture
def output(model_config: Callable[..., ModelConfig]) -> ModelOutput:
    config = model_config(sparse=True, num_layers=4)
    model = Transformer(config)
    tokens = torch.randint(config.vocab_size, (2, 9))
    return model(tokens, tokens.flip(1))


def test_the_parts_add_up(output: ModelOutput, moe_config: MoEConfig) -> None:
    moe = replace(moe_config, load_balance_weight=0.3, router_z_loss_weight=0.2)
    loss = compute_loss(output, None, moe)
    balance = [load_balance_loss(routing) for routing in output.routings]
    z = [router_z_loss(routing) for routing in output.routings]
    assert len(balance) == 2
    expected = output.token_losses.mean() + 0.3 * sum(balance) / 2 + 0.2 * sum(z) / 2
    torch.testing.assert_close(loss.loss, expected)
    torch.testing.assert_close(loss.cross_entropy, output.token_losses.mean())


def test_the_paper_sums_the_layers_and_counts_first_choices(output: ModelOutput, moe_config: MoEConfig) -> None:
    moe = replace(moe_config, load_balance_reduction="sum", load_balance_choices="first")
    expected = sum(load_balance_loss(routing, choices="first") for routing in output.routings)
    torch.testing.assert_close(compute_loss(output, None, moe).load_balance_loss, expected.detach())


def test_masked_tokens_do_not_count(output: ModelOutput) -> None:
    mask = torch.rand(2, 9) < 0.5
    mask[0, 0] = True
    poisoned = output._replace(token_losses=torch.where(mask, output.token_losses, torch.nan), routings=())
    loss = compute_loss(poisoned, mask, None)
    torch.testing.assert_close(loss.loss, output.token_losses[mask].mean())
    assert int(loss.num_tokens) == int(mask.sum())


def test_answers_count_and_all_tokens_are_balanced(output: ModelOutput, moe_config: MoEConfig) -> None:
    """A loss mask moves the cross-entropy alone; each part has a weight of its own in the step."""
    answers = torch.rand(2, 9) < 0.5
    answers[0, 0] = True
    whole, part = (compute_loss(output, None, moe_config, loss_mask=mask) for mask in (None, answers))
    torch.testing.assert_close(part.cross_entropy, output.token_losses[answers].mean())
    assert torch.equal(part.auxiliary, whole.auxiliary)
    assert (int(part.num_targets), part.num_tokens) == (int(answers.sum()), 18)
    expected = part.cross_entropy * int(answers.sum()) / 40 + part.auxiliary * 18 / 90
    torch.testing.assert_close(part.share(num_targets=40, num_tokens=90), expected)


def test_a_dense_model_has_no_auxiliary_losses(output: ModelOutput) -> None:
    loss = compute_loss(output._replace(routings=()), None, None)
    assert loss.load_balance_loss is None
    assert loss.router_z_loss is None
    assert loss.loss.item() == loss.cross_entropy.item()
