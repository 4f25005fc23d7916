from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moe.checkpoint import TrainState
from moe.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from moe.data.loader import TokenBatch
from moe.layers import MoE
from moe.model import Transformer
from moe.training.loss import compute_loss
from moe.training.metrics import StepMetrics, Validation
from moe.training.optimizer import make_optimizer
from moe.training.trainer import Trainer

SEQ_LEN, BATCH = 8, 4


class RandomBatches:
    """Stands in for the loader: a batch is a function of the step."""

    def batch(self, step: int) -> TokenBatch:
        tokens = torch.randint(37, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(step))
        return TokenBatch(tokens[:, :-1], tokens[:, 1:], None, None)


class Listener:
    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []
        self.validations: list[tuple[int, Validation]] = []
        self.messages: list[str] = []

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def validation(self, step: int, domains: Validation) -> None:
        self.validations.append((step, domains))

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None:
        pass


@pytest.fixture
def config(model_config: Callable[..., ModelConfig]) -> RunConfig:
    return RunConfig(
        model=model_config(sparse=True),
        data=DataConfig(name="python", seq_len=SEQ_LEN),
        optim=OptimConfig(lr=0.01, warmup_steps=2, clip_norm=1.0),
        train=TrainConfig(num_steps=6, batch_tokens=SEQ_LEN * BATCH, micro_batch_size=BATCH),
        eval=EvalConfig(),
    )


def make_trainer(config: RunConfig, **changes: object) -> tuple[Trainer, Listener, list[int]]:
    model = Transformer(config.model, recompute=config.train.recompute)
    model.reset_parameters(config.seed)
    listener, saved = Listener(), []
    parts = {
        "model": model,
        "optimizer": make_optimizer(model, config.optim),
        "loader": RandomBatches(),
        "config": config,
        "state": TrainState(),
        "flops_per_token": 10.0,
        "reporters": [listener],
        "validate": lambda: {"docs": {"bits_per_byte": 2.0}},
        "save": lambda state: saved.append(state.step),
    }
    return Trainer(**(parts | changes)), listener, saved


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_accumulation_equals_the_gradient_contract(config: RunConfig) -> None:
    """Gradients of two micro-batches equal those of one loss written by hand over both routing groups."""
    config = replace(config, train=replace(config.train, micro_batch_size=2))
    trainer, _, _ = make_trainer(config)
    batch = RandomBatches().batch(0)
    trainer._accumulate(batch)
    oracle = copy.deepcopy(trainer.model)
    oracle.zero_grad()
    halves = [
        compute_loss(oracle(batch.tokens[i : i + 2], batch.targets[i : i + 2]), None, config.model.moe) for i in (0, 2)
    ]
    (sum(half.loss for half in halves) / 2).backward()
    for (name, actual), expected in zip(trainer.model.named_parameters(), oracle.parameters(), strict=True):
        scale = float(expected.grad.abs().max())
        torch.testing.assert_close(actual.grad, expected.grad, rtol=0, atol=1e-5 * scale, msg=name)


def test_expert_gradients_may_be_scaled_before_norm_and_clipping(config: RunConfig) -> None:
    """The paper's factor (Artetxe et al. 2021): by hand, from the true gradients."""
    scaled = replace(config, optim=replace(config.optim, expert_gradient_scale=3.0, clip_norm=None))
    trainer, _, _ = make_trainer(scaled)
    twin, _, _ = make_trainer(replace(config, optim=replace(config.optim, clip_norm=None)))
    twin._accumulate(RandomBatches().batch(0))
    squares = {name: float(p.grad.square().sum()) for name, p in twin.model.named_parameters()}
    factors = {name: 9.0 if ".experts." in name else 1.0 for name in squares}
    assert set(factors.values()) == {1.0, 9.0}
    expected = sum(factors[name] * square for name, square in squares.items()) ** 0.5
    assert trainer.step().grad_norm == pytest.approx(expected, rel=1e-5)


def test_without_balance_losses_micro_batches_change_nothing(config: RunConfig) -> None:
    moe = replace(config.model.moe, load_balance_weight=0.0)
    config = replace(config, model=replace(config.model, moe=moe))
    gradients = []
    for size in (1, 2, 4):
        trainer, _, _ = make_trainer(replace(config, train=replace(config.train, micro_batch_size=size)))
        trainer._accumulate(RandomBatches().batch(0))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    for other in gradients[:2]:
        torch.testing.assert_close(other, gradients[2], rtol=0, atol=1e-5 * float(gradients[2].abs().max()))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_repeats_bit_for_bit_with_and_without_recompute(config: RunConfig, dropout: float) -> None:
    config = replace(config, model=replace(config.model, dropout=dropout))
    runs = []
    for recompute in (False, False, True):
        trainer, listener, _ = make_trainer(replace(config, train=replace(config.train, recompute=recompute)))
        assert trainer.run()
        runs.append([metrics.loss for metrics in listener.steps])
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][-1] != runs[0][0]


@pytest.mark.parametrize("changes", [{"jitter": 0.2}, {"router": "gshard", "second_policy": "sampling"}])
def test_routers_that_draw_repeat_under_recompute_and_differ_by_seed(config: RunConfig, changes: dict) -> None:
    config = replace(config, model=replace(config.model, moe=replace(config.model.moe, **changes)))
    runs = []
    for recompute, seed in ((False, 0), (True, 0), (False, 1)):
        run = replace(config, train=replace(config.train, recompute=recompute), seed=seed)
        trainer, listener, _ = make_trainer(run)  # equal weights: only draws differ by the seed
        trainer.run()
        runs.append([metrics.loss for metrics in listener.steps])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_biases_move_once_a_step_whatever_the_micro_batches(config: RunConfig) -> None:
    """Under accumulation and recompute a bias moves by the load of the whole step, once."""
    moe = replace(config.model.moe, bias_balance_rate=0.125, load_balance_weight=0.0)
    config = replace(config, model=replace(config.model, moe=moe))
    biases = []
    for size, recompute in ((4, False), (1, False), (2, True)):
        train = replace(config.train, micro_batch_size=size, recompute=recompute)
        trainer, _, _ = make_trainer(replace(config, train=train))
        trainer.step()
        (router,) = [m.router for m in trainer.model.modules() if isinstance(m, MoE)]
        biases.append(router.expert_bias)
    assert set(biases[0].abs().tolist()) <= {0.0, 0.125}
    assert biases[0].any()
    assert all(torch.equal(other, biases[0]) for other in biases[1:])


@pytest.mark.parametrize("expert_gradient_scale", [1.0, 3.0])  # of gradients of which there are none
def test_router_scores_that_are_not_finite_skip_the_step_and_name_the_layer(
    config: RunConfig, expert_gradient_scale: float
) -> None:
    optim = replace(config.optim, expert_gradient_scale=expert_gradient_scale)
    trainer, listener, _ = make_trainer(replace(config, optim=optim))
    trainer.step()
    (layer,) = config.model.moe_layers
    weight = trainer.model.layers[layer].feed_forward.router.weight
    with torch.no_grad():
        kept, weight[0] = weight[0].clone(), torch.nan
    metrics = trainer.step()
    assert metrics.skipped
    assert listener.messages[0].startswith(f"step 2, layer {layer}: the router's scores are not finite")
    with torch.no_grad():
        weight[0] = kept
    assert not trainer.step().skipped


def test_bf16_follows_fp32(config: RunConfig) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        trainer, listener, _ = make_trainer(replace(config, train=replace(config.train, precision=precision)))
        trainer.run()
        losses.append([metrics.cross_entropy for metrics in listener.steps])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("clip_norm", [None, 0.01, 1e6])
def test_the_update_sees_gradients_of_at_most_the_clip_norm(config: RunConfig, clip_norm: float | None) -> None:
    config = replace(config, optim=replace(config.optim, clip_norm=clip_norm))
    trainer, _, _ = make_trainer(config)
    norms = []

    def record(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    trainer.optimizer.register_step_pre_hook(record)
    reported = trainer.step().grad_norm
    assert reported > 0.1
    assert norms == [pytest.approx(0.01 if clip_norm == 0.01 else reported, rel=1e-4)]


def test_it_learns_a_constant_batch(config: RunConfig) -> None:
    class Constant(RandomBatches):
        def batch(self, step: int) -> TokenBatch:
            return super().batch(0)

    config = replace(config, train=replace(config.train, num_steps=60), optim=replace(config.optim, lr=0.03))
    trainer, listener, _ = make_trainer(config, loader=Constant())
    trainer.run()
    assert listener.steps[-1].cross_entropy < 0.3 * listener.steps[0].cross_entropy


def test_metrics_count_tokens_flops_and_routers(config: RunConfig) -> None:
    trainer, listener, _ = make_trainer(replace(config, train=replace(config.train, histogram_every=2)))
    trainer.run()
    last = listener.steps[-1]
    assert (last.step, last.tokens, last.flops) == (6, 6 * 32, 6 * 32 * 10.0)
    assert [router.layer for router in last.routers] == [1]
    assert sum(last.routers[0].tokens_per_expert) == 32 * config.model.moe.top_k
    assert listener.steps[0].routers[0].tokens_per_expert is None
    assert last.learning_rate == 0.0


def test_validation_and_checkpoints_come_on_time(config: RunConfig) -> None:
    config = replace(config, train=replace(config.train, checkpoint_every=4), eval=EvalConfig(every=3))
    trainer, listener, saved = make_trainer(config)
    assert trainer.run()
    assert saved == [4, 6]
    assert [step for step, _ in listener.validations] == [3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_stops(config: RunConfig, number: signal.Signals) -> None:
    class Interrupting(RandomBatches):
        def batch(self, step: int) -> TokenBatch:
            if step == 2:
                os.kill(os.getpid(), number)
            return super().batch(step)

    trainer, listener, saved = make_trainer(config, loader=Interrupting())
    assert trainer.run() is False
    assert saved == [3]
    assert listener.messages == [f"{number.name}: saved step 3 of 6; the same command continues from it"]


class Poisoned(Transformer):
    """Returns a loss that is not a number in the listed calls."""

    calls = 0
    bad_calls: tuple[int, ...] = ()

    def forward(self, *args: object, **kwargs: object) -> object:
        self.calls += 1
        output = super().forward(*args, **kwargs)
        if self.calls in self.bad_calls:
            return output._replace(token_losses=output.token_losses * float("nan"))
        return output


def test_a_step_that_is_not_finite_changes_no_weight(config: RunConfig) -> None:
    model = Poisoned(config.model)
    model.reset_parameters(0)
    model.bad_calls = (2,)
    trainer, listener, _ = make_trainer(config, model=model, optimizer=make_optimizer(model, config.optim))
    trainer.step()
    before = weights(trainer)
    assert trainer.step().skipped
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    assert (trainer.state.skipped_steps, trainer.state.skipped_in_a_row) == (1, 1)
    assert not trainer.step().skipped
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())
    assert (trainer.state.skipped_steps, trainer.state.skipped_in_a_row) == (1, 0)
    assert "the update is skipped" in listener.messages[0]


def test_too_many_skips_stop_the_run_without_saving(config: RunConfig) -> None:
    config = replace(config, train=replace(config.train, max_skipped_steps=2, checkpoint_every=1))
    model = Poisoned(config.model)
    model.reset_parameters(0)
    model.bad_calls = (2, 3, 4)
    trainer, _, saved = make_trainer(config, model=model, optimizer=make_optimizer(model, config.optim))
    with pytest.raises(ValueError, match=r"3 updates in a row .*max_skipped_steps=2\)\. Start another run from"):
        trainer.run()
    assert saved == [1, 2, 3]
    assert all(value.isfinite().all() for value in weights(trainer).values())
