"""Cases of the gradient contract, the same step by several ranks and by one process, and what each of them measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.checkpoint import TrainState
from moe.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from moe.data.loader import TokenBatch
from moe.distributed.mesh import Meshes, make_meshes
from moe.distributed.parallelize import parallelize
from moe.distributed.world import World
from moe.layers.router_losses import RoutingStatistics, merge_statistics, routing_statistics
from moe.layers.routing import detach_routings
from moe.model import Transformer
from moe.training.loss import compute_loss
from moe.training.optimizer import clip_gradients, gradient_norm, make_optimizer, scale_gradients
from moe.training.trainer import Trainer

SEQ_LEN, VOCABULARY, NUM_EXPERTS = 8, 37, 8
CLIP_NORM = 0.05  # far below the norm of every case
LOSSES = ("loss", "cross_entropy", "load_balance", "router_z")

MODELS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "dropless": {},
    "unbalanced": {"load_balance_weight": 0.0},
    "capacity": {"capacity_factor": 0.7},
    "gshard": {"router": "gshard", "load_balance_choices": "first", "load_balance_reduction": "sum"},
    "shared": {"shared_d_ff": 16, "shared_gate": True},
    "balanced": {"scores": "sigmoid", "bias_balance_rate": 0.05, "load_balance_scope": "sequence"},
    "global": {"load_balance_scope": "global"},
    "sequence": {"load_balance_scope": "sequence"},
    "jitter": {"jitter": 0.3},
    "noisy": {"jitter": 0.3},  # and dropout
}


class Case(NamedTuple):
    """One way to compute one step. `ranks` = 1 is one process and no process group."""

    ranks: int
    model: str = "dropless"
    ep: int = 1
    replicate: int = 1
    micro_batches: int = 1
    recompute: bool = False
    sequences: int = 4  # of each rank
    batch: str = "even"  # "masked": some tokens; "uneven": and fewer sequences here and there; "padded": a whole rank;
    # "answers": all tokens are real and the losses of a few count
    options: tuple[tuple[str, Any], ...] = ()  # of ParallelConfig
    precision: str = "fp64"
    compile: bool = False

    def __str__(self) -> str:
        parts = [f"{self.ranks}ranks", self.model, f"ep{self.ep}"]
        parts += [f"replicate{self.replicate}"] if self.replicate > 1 else []
        parts += [f"micro{self.micro_batches}"] if self.micro_batches > 1 else []
        parts += ["recompute"] if self.recompute else []
        parts += [self.batch] if self.batch != "even" else []
        parts += [f"{self.sequences}sequences"] if self.sequences != 4 else []
        parts += [f"{name}={value}" for name, value in self.options]
        parts += [self.precision] if self.precision != "fp64" else []
        return "-".join(parts)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "fp64" else torch.float32


class Measured(NamedTuple):
    """Of one step: of one process, or of all ranks together as each of them sees it."""

    gradients: dict[str, Tensor]  # whole, by parameter name; empty but on rank 0
    clipped: dict[str, Tensor]  # the same after clipping to CLIP_NORM
    losses: dict[str, float]
    norm: float
    statistics: list[RoutingStatistics]  # per sparse layer


def moe_config(**changes: Any) -> MoEConfig:
    """Eight experts, top-2, with weights of the auxiliary losses high enough that an error in them shows."""
    values: dict[str, Any] = {
        "name": "8e",
        "num_experts": NUM_EXPERTS,
        "top_k": 2,
        "moe_every": 1,
        "router": "topk",
        "scores": "softmax",
        "normalize_weights": True,
        "weight_scale": 1.0,
        "second_policy": "all",
        "shared_gate": False,
        "load_balance_weight": 0.3,
        "load_balance_choices": "all",
        "load_balance_scope": "local",
        "load_balance_reduction": "mean",
        "router_z_loss_weight": 0.1,
    }
    off = ("num_groups", "top_groups", "bias_balance_rate", "jitter", "shared_d_ff")
    off += ("capacity_factor", "eval_capacity_factor")
    return MoEConfig(**{name: None for name in off} | values | changes)


def run_config(case: Case) -> RunConfig:
    """The configuration that a run of this case would have."""
    changes = MODELS[case.model]
    model = ModelConfig(
        name="contract",
        d_model=8,
        d_ff=16,  # rows of whole cache lines: MKL sums in another order where they begin elsewhere
        num_layers=2,
        num_heads=2,
        max_seq_len=SEQ_LEN,
        vocab_size=VOCABULARY,
        init_std=0.4,  # uneven loads and logits that matter
        dropout=0.2 if case.model == "noisy" else 0.0,
        moe=None if changes is None else moe_config(**changes),
    )
    return RunConfig(
        model=model,
        data=DataConfig(name="python"),
        optim=OptimConfig(lr=0.01, clip_norm=CLIP_NORM),
        train=TrainConfig(
            num_steps=100,
            batch_tokens=SEQ_LEN * case.sequences * case.ranks,
            micro_batch_size=case.sequences // case.micro_batches,
            recompute=case.recompute,
            compile=case.compile,
            precision="fp32" if case.precision == "fp64" else case.precision,
        ),
        eval=EvalConfig(),
        parallel=ParallelConfig(ep_size=case.ep, dp_replicate=case.replicate, **dict(case.options)),
    )


def rank_batch(case: Case, rank: int, step: int = 0) -> TokenBatch:
    """What one rank reads: its run of the sequences of all, which depend on their number and the step alone."""
    generator = torch.Generator().manual_seed(step)
    rows = case.sequences * case.ranks
    stream = torch.randint(VOCABULARY, (rows, SEQ_LEN + 1), generator=generator)
    mask = torch.rand(rows, SEQ_LEN, generator=generator) < 0.7
    if case.batch == "padded":
        mask[-case.sequences :] = False  # the last rank's
    first = rank * case.sequences
    own = slice(first, first + case.sequences - (rank % 2 if case.batch == "uneven" else 0))
    tokens, targets = stream[own, :-1].contiguous(), stream[own, 1:].contiguous()
    if case.batch == "answers":
        return TokenBatch(tokens, targets, None, None, mask[own] & (tokens % 3 == 0))
    return TokenBatch(tokens, targets, None if case.batch == "even" else mask[own], None)


class Batches:
    """Stands in for the loader of one rank."""

    def __init__(self, make: Callable[[int], TokenBatch]) -> None:
        self.batch = make


def build(case: Case, meshes: Meshes | None) -> Transformer:
    """The model that `moe.run.build_model` makes, in the case's dtype."""
    config = run_config(case)
    model = Transformer(config.model, recompute=case.recompute, device="meta", dtype=case.dtype)
    if meshes is not None:
        parallelize(model, meshes, config)
    model.to_empty(device="cpu")
    model.reset_parameters(config.seed)
    return model


def trainer_of(case: Case, world: World, model: Transformer, make: Callable[[int], TokenBatch]) -> Trainer:
    """A trainer that reports, saves and validates nothing."""
    config = run_config(case)
    return Trainer(
        model=model,
        optimizer=make_optimizer(model, config.optim),
        loader=Batches(make),
        config=config,
        state=TrainState(),
        flops_per_token=1.0,
        reporters=[],
        validate=dict,
        save=lambda state: None,
        world=world,
    )


class MeshesOf:
    """The meshes of a process, each made once: a process group costs time."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._made: dict[tuple[int, int], Meshes] = {}

    def __call__(self, case: Case) -> Meshes:
        key = (case.replicate, case.ep)
        if key not in self._made:
            self._made[key] = make_meshes(run_config(case).parallel, self._world.size, "cpu")
        return self._made[key]


def measure(world: World, cases: list[Case]) -> dict[Case, Measured]:
    """Gradients and figures of one step of each case, by the trainer itself."""
    meshes = MeshesOf(world)
    return {case: _measure(case, world, meshes(case)) for case in cases}


def _measure(case: Case, world: World, meshes: Meshes) -> Measured:
    model = build(case, meshes)
    trainer = trainer_of(case, world, model, lambda step: rank_batch(case, world.rank, step))
    torch.manual_seed(world.rank)  # of dropout
    total = trainer._accumulate(rank_batch(case, world.rank))
    if trainer.state.loss_scale is not None:
        scale_gradients(model.parameters(), 1.0 / trainer.state.loss_scale)
    norm = gradient_norm(model.parameters(), world)
    gradients = _gradients(model, world)
    clip_gradients(model.parameters(), norm, CLIP_NORM)
    parts = (total.loss, total.cross_entropy, total.load_balance, total.router_z)
    losses = {name: value or 0.0 for name, value in zip(LOSSES, parts, strict=True)}
    return Measured(gradients, _gradients(model, world), losses, float(norm), total.statistics)


def _gradients(model: Transformer, world: World) -> dict[str, Tensor]:
    whole = {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()}
    return whole if world.rank == 0 else {}


def expected(case: Case) -> Measured:
    """The same step by one process, written out: no trainer, no ranks, the routing groups that the case has."""
    same = Case(case.ranks, case.model, micro_batches=case.micro_batches, sequences=case.sequences, batch=case.batch)
    return _expected(same)


@lru_cache
def _expected(case: Case) -> Measured:
    config = run_config(case)
    model = build(case, None)
    model.train()
    groups = routing_groups(case)
    num_tokens = sum(int(mask.sum()) for _, _, mask, _ in groups)
    num_targets = sum(int(counted.sum()) for *_, counted in groups)
    losses = dict.fromkeys(LOSSES, 0.0)
    statistics = []
    for tokens, targets, mask, counted in groups:
        output = model(tokens, targets, token_mask=mask)
        part = compute_loss(output, mask, config.model.moe, loss_mask=counted)
        of_targets, of_tokens = int(counted.sum()) / num_targets, int(mask.sum()) / num_tokens
        loss = part.cross_entropy * of_targets + (0.0 if part.auxiliary is None else part.auxiliary * of_tokens)
        loss.backward()
        losses["loss"] += float(loss.detach())
        losses["cross_entropy"] += float(part.cross_entropy.detach()) * of_targets
        losses["load_balance"] += float(part.load_balance_loss or 0.0) * of_tokens
        losses["router_z"] += float(part.router_z_loss or 0.0) * of_tokens
        statistics.append([routing_statistics(routing) for routing in detach_routings(output.routings)])
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients.values()]))
    clipped = {name: gradient * (CLIP_NORM / (norm + 1e-6)) for name, gradient in gradients.items()}
    layers = [merge_statistics(list(layer)) for layer in zip(*statistics, strict=True)]
    return Measured(gradients, clipped, losses, float(norm), layers)


def routing_groups(case: Case) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Tokens, targets, mask and what counts, of those routed together: a micro-batch of one rank, or of all."""
    parts = [rank_batch(case, rank).split(case.sequences // case.micro_batches) for rank in range(case.ranks)]
    steps = list(zip(*parts, strict=True))  # [micro-batch][rank]
    together = steps if case.model == "global" else [(part,) for step in steps for part in step]
    groups = []
    for group in together:
        tokens, targets = (torch.cat([part[i] for part in group]) for i in (0, 1))
        masks = [torch.ones_like(part.tokens, dtype=torch.bool) if part[2] is None else part[2] for part in group]
        counts = [mask if part.counted is None else part.counted for part, mask in zip(group, masks, strict=True)]
        groups.append((tokens, targets, torch.cat(masks), torch.cat(counts)))
    return groups


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest entry wanted; infinite for anything but zeros where those are wanted."""
    scale = float(wanted.abs().max())
    difference = float((actual.double() - wanted.double()).abs().max())
    return difference / scale if scale > 0.0 else (0.0 if difference == 0.0 else float("inf"))


def with_options(case: Case, **options: Any) -> Case:
    """The same case with other fields of ParallelConfig."""
    return case._replace(options=tuple(options.items()))
