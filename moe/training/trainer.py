"""The training loop. It sees batches, a model, an optimizer and callables, but no tasks or layers."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from moe.checkpoint import DivergedError, TrainState
from moe.config import RunConfig
from moe.data.loader import TokenBatch
from moe.distributed.all_to_all import count_traffic
from moe.distributed.world import World
from moe.kernels.topk_routing import NonFiniteScoresError
from moe.layers.initialization import parameter_generator
from moe.layers.router_losses import RoutingStatistics, merge_statistics, routing_statistics
from moe.layers.routing import detach_routings
from moe.model import Transformer, autocast
from moe.training.loss import compute_loss
from moe.training.loss_scale import FIRST_SCALE, update_scale
from moe.training.metrics import StepMetrics, Validation, router_metrics
from moe.training.optimizer import (
    clip_gradients,
    gradient_norm,
    learning_rate,
    scale_expert_gradients,
    scale_gradients,
    set_learning_rate,
)
from moe.training.over_ranks import merge_over_ranks, rank_metrics
from moe.training.signals import StopRequest, signal_of_any_rank


class Reporter(Protocol):
    """Anything that receives the metrics of steps: a file, a display, TensorBoard."""

    def step(self, metrics: StepMetrics) -> None: ...
    def validation(self, step: int, domains: Validation) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


class Batches(Protocol):
    """Training batches by number, counted from 0, of text or of packed examples."""

    def batch(self, step: int) -> TokenBatch: ...


class BatchLosses:
    """Token-weighted sums over the micro-batches of one step."""

    def __init__(self) -> None:
        self.loss = self.cross_entropy = 0.0
        self.load_balance: float | None = None
        self.router_z: float | None = None
        self.statistics: list[RoutingStatistics] = []  # one per sparse layer


class Trainer:
    """Trains `model` in place, from `state.step` to step `config.train.num_steps`.

    `validate` returns the figures of each domain and `save` writes a checkpoint; both are passed in. With a `world` of
    several ranks `parallelize` must have sharded the model, and every rank runs a trainer; all make the same decisions,
    because these depend on figures from all ranks.
    """

    def __init__(
        self,
        *,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        loader: Batches,
        config: RunConfig,
        state: TrainState,
        flops_per_token: float,
        reporters: Sequence[Reporter],
        validate: Callable[[], Validation],
        save: Callable[[TrainState], None],
        world: World | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loader = loader
        self.config = config
        self.state = state
        self.flops_per_token = flops_per_token
        self.reporters = reporters
        self.validate = validate
        self.save = save
        self.device = next(model.parameters()).device if world is None else world.device
        self.world = World(0, 1, self.device, None, math.inf) if world is None else world
        self.stopped_by: str | None = None  # a signal on any rank; after the last step it stops nothing here
        if config.train.precision == "fp16" and state.loss_scale is None:
            state.loss_scale = FIRST_SCALE

    def run(self) -> bool:
        """Train to the last step and return True; on a signal to stop, save, say so and return False.

        Raises TimeoutError naming the other ranks that are gone or hang.
        """
        try:
            return self._run()
        except RuntimeError as error:
            explained = self.world.explain(error)
            if explained is error:
                raise
            raise explained from error

    def _run(self) -> bool:
        config, state = self.config, self.state
        with StopRequest() as stop:
            while state.step < config.train.num_steps:
                if self.device.type == "cpu":
                    self.world.meet()  # names a hanging rank here, not somewhere in a collective
                metrics = self.step()
                for reporter in self.reporters:
                    reporter.step(metrics)
                finished = state.step == config.train.num_steps
                every = config.train.checkpoint_every
                self.stopped_by = signal_of_any_rank(stop, self.world)
                if finished or self.stopped_by is not None or (every is not None and state.step % every == 0):
                    self.save(state)
                if self.stopped_by is not None and not finished:
                    saved = f"saved step {state.step} of {config.train.num_steps}"
                    self._announce(f"{self.stopped_by}: {saved}; the same command continues from it")
                    return False
                if config.eval.every is not None and state.step % config.eval.every == 0 and not finished:
                    self.report_validation()
            self.stopped_by = signal_of_any_rank(stop, self.world)
        return True

    def step(self) -> StepMetrics:
        """One optimizer step, from batch to metrics."""
        config, state = self.config, self.state
        started_at = time.perf_counter()
        state.step += 1
        # every random draw of a step follows from (seed, step), so a resumed run repeats the same draws
        torch.manual_seed((config.seed << 32) + state.step)
        if self.world.rank > 0:  # other tokens need other dropout draws; rank 0 draws what one process would
            stream = parameter_generator(config.seed, state.step, "dropout", *self._own_stream)
            assert stream is not None
            torch.manual_seed(stream.initial_seed())
        lr = learning_rate(state.step, config.train.num_steps, config.optim)
        set_learning_rate(self.optimizer, lr)
        with count_traffic() as traffic:
            losses = self._losses(self.loader.batch(state.step - 1))
        scale_expert_gradients(self.model, config.optim.expert_gradient_scale)
        norm = gradient_norm(self.model.parameters(), self.world)
        loss_scale = state.loss_scale
        if loss_scale is not None:
            norm = norm / loss_scale
        grad_norm = float(norm)
        finite = math.isfinite(losses.loss) and math.isfinite(grad_norm)
        if finite:
            if loss_scale is not None:
                scale_gradients(self.model.parameters(), 1.0 / loss_scale)
            if config.optim.clip_norm is not None and grad_norm > config.optim.clip_norm:
                clip_gradients(self.model.parameters(), norm, config.optim.clip_norm)
            self.optimizer.step()
            if config.model.moe is not None and config.model.moe.bias_balance_rate is not None:
                self.model.update_router_biases(losses.statistics, config.model.moe.bias_balance_rate)
        self.optimizer.zero_grad(set_to_none=True)  # validation and checkpoints need no gradients in memory
        explained = loss_scale is not None and update_scale(state, finite=finite)
        self._count_skips(finite, losses.loss, grad_norm, explained=explained)
        seconds = time.perf_counter() - started_at
        state.tokens += config.train.batch_tokens
        state.flops += self.flops_per_token * config.train.batch_tokens
        state.seconds += seconds
        with_counts = state.step % config.train.histogram_every == 0
        layers = config.model.moe_layers
        return StepMetrics(
            step=state.step,
            tokens=state.tokens,
            flops=state.flops,
            seconds=state.seconds,
            cross_entropy=losses.cross_entropy,
            load_balance_loss=losses.load_balance,
            router_z_loss=losses.router_z,
            loss=losses.loss,
            grad_norm=grad_norm,
            learning_rate=lr,
            tokens_per_second=config.train.batch_tokens / seconds,
            skipped=not finite,
            routers=[
                router_metrics(layer, statistics, with_counts=with_counts)
                for layer, statistics in zip(layers, losses.statistics, strict=not math.isnan(losses.loss))
            ],
            ranks=rank_metrics(traffic, seconds, self.world),
            loss_scale=loss_scale,
        )

    def _losses(self, batch: TokenBatch) -> BatchLosses:
        """Like `_accumulate`, but NaN in a router yields a NaN loss, so that the update is skipped."""
        try:
            return self._accumulate(batch)
        except NonFiniteScoresError as error:
            self._announce(f"step {self.state.step}, {error}")
            losses = BatchLosses()
            losses.loss = losses.cross_entropy = math.nan
            return losses

    def _accumulate(self, batch: TokenBatch) -> BatchLosses:
        """Forward and backward of each micro-batch; gradients add up to those of the mean over the whole batch."""
        config = self.config
        micro_batches = [
            TokenBatch._make(None if field is None else field.to(self.device) for field in micro_batch)
            for micro_batch in batch.split(config.micro_batch_size)
        ]
        num_tokens, num_targets = self._count(batch.token_mask, batch), self._count(batch.counted, batch)
        total = BatchLosses()
        statistics: list[list[RoutingStatistics]] = []  # [micro-batch][sparse layer]
        self.model.train()
        generator = None
        if config.model.moe is not None and config.model.moe.draws:  # from (seed, step), so that a resumed run repeats
            generator = parameter_generator(config.seed, self.state.step, "router.noise", *self._own_stream)
        for micro_batch in micro_batches:
            with self._precision():
                output = self.model(
                    micro_batch.tokens,
                    micro_batch.targets,
                    document_ids=micro_batch.document_ids,
                    token_mask=micro_batch.token_mask,
                    loss_mask=micro_batch.loss_mask,
                    generator=generator,
                )
                part = compute_loss(
                    output, micro_batch.token_mask, config.model.moe, self.world.group, loss_mask=micro_batch.loss_mask
                )
            loss = part.share(num_targets, num_tokens)
            (loss if self.state.loss_scale is None else loss * self.state.loss_scale).backward()
            total.loss += float(loss.detach())
            total.cross_entropy += float(part.cross_entropy.detach()) * int(part.num_targets) / num_targets
            if part.load_balance_loss is not None and part.router_z_loss is not None:
                share = int(part.num_tokens) / num_tokens
                total.load_balance = (total.load_balance or 0.0) + float(part.load_balance_loss) * share
                total.router_z = (total.router_z or 0.0) + float(part.router_z_loss) * share
            statistics.append([routing_statistics(routing) for routing in detach_routings(output.routings)])
        layers = [merge_statistics(list(layer)) for layer in zip(*statistics, strict=True)]
        total.statistics = merge_over_ranks(layers, self.world)
        return self._over_ranks(total)

    def _count(self, mask: torch.Tensor | None, batch: TokenBatch) -> int:
        """The number of the step's positions that `mask` keeps, over all ranks; None keeps all."""
        if mask is None:
            return batch.targets.numel() * self.world.size  # the loader gives every rank equally many
        return max(1, int(self.world.sum(mask.sum().to(self.device))))

    def _over_ranks(self, total: BatchLosses) -> BatchLosses:
        """The losses of the step, summed over the ranks' shares."""
        if self.world.size == 1:
            return total
        own = [total.loss, total.cross_entropy, total.load_balance or 0.0, total.router_z or 0.0]
        sums = self.world.sum(torch.tensor(own, dtype=torch.float64, device=self.device)).tolist()
        total.loss, total.cross_entropy = sums[:2]
        if total.load_balance is not None:
            total.load_balance, total.router_z = sums[2:]
        return total

    @property
    def _own_stream(self) -> tuple[int, ...]:
        """Seed parts that separate this rank's random draws from rank 0's, which match one process."""
        return () if self.world.rank == 0 else (self.world.rank,)

    def _precision(self) -> contextlib.AbstractContextManager:
        # with several ranks FSDP2 casts what it gathers
        return contextlib.nullcontext() if self.world.size > 1 else autocast(self.device, self.config.train.precision)

    def _count_skips(self, finite: bool, loss: float, grad_norm: float, *, explained: bool) -> None:
        """explained: by too high a loss scale, which is how float16 finds the highest one that fits."""
        state, limit = self.state, self.config.train.max_skipped_steps
        if finite:
            state.skipped_in_a_row = 0
            return
        state.skipped_steps += 1
        if explained:
            self._announce(f"step {state.step}: overflow in float16, the update is skipped; scale {state.loss_scale:g}")
            return
        count = state.skipped_in_a_row = state.skipped_in_a_row + 1
        self._announce(f"step {state.step}: loss {loss}, gradient norm {grad_norm}: the update is skipped")
        if count > limit:
            skipped = "1 update was" if count == 1 else f"{count} updates in a row were"
            raise DivergedError(
                f"{skipped} skipped because loss or gradient was not finite (train.max_skipped_steps={limit}). Start "
                f"another run from a checkpoint of this one, run_dir=NEW init_from=OLD, with a lower optim.lr, more "
                f"optim.warmup_steps or optim.clip_norm"
            )

    def report_validation(self) -> None:
        """Validate, and tell every reporter."""
        domains = self.validate()
        for reporter in self.reporters:
            reporter.validation(self.state.step, domains)

    def _announce(self, text: str) -> None:
        for reporter in self.reporters:
            reporter.message(text)
