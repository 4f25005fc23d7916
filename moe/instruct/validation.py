"""Loss on the targets of held-out examples: nats per target token by level, category and task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from moe.data.loader import TokenBatch
from moe.distributed.world import World
from moe.instruct.examples import ExampleStore
from moe.instruct.packing import best_fit, lay_out
from moe.model import Transformer, autocast

BATCH_POSITIONS = 16384  # per process and forward pass
Figures = dict[str, dict[str, float]]


@torch.no_grad()
def target_losses(
    model: Transformer,
    store: ExampleStore,
    *,
    seq_len: int,
    max_positions: int | None = None,
    precision: str = "fp32",
    world: World | None = None,
) -> Tensor:
    """Nats, counted tokens and UTF-8 bytes of the counted text of each task; (3, number of tasks) float64 on the host.

    Examples are packed as in training and do not attend to each other; nothing is dropped unless the model has an
    evaluation capacity. max_positions: per task, the first examples up to this many, at least one. world: ranks that
    take turns; all must call, and all get the total.
    """
    chosen = _first_examples(store, max_positions)
    device = next(model.parameters()).device if world is None else world.device
    sums = torch.zeros(3, len(store.tasks), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        for batch, tasks in _own_batches(store, chosen, seq_len, world):
            here = TokenBatch._make(None if field is None else field.to(device) for field in batch)
            with autocast(device, precision):
                output = model(
                    here.tokens,
                    here.targets,
                    document_ids=here.document_ids,
                    token_mask=here.token_mask,
                    loss_mask=here.loss_mask,
                )
            assert here.loss_mask is not None
            counted, of = here.loss_mask, tasks.to(device)
            sums[0].index_add_(0, of[counted], output.token_losses[counted].double())
            sums[1].index_add_(0, of[counted], torch.ones_like(of[counted], dtype=torch.float64))
    finally:
        model.train(was_training)
    if world is not None:
        sums = world.sum(sums)
    sums = sums.cpu()
    sizes = np.bincount(store.task_of[chosen], store.counted_bytes[chosen], minlength=len(store.tasks))
    sums[2] = torch.from_numpy(sizes)
    return sums


def by_group(store: ExampleStore, sums: Tensor) -> Figures:
    """Metrics of all examples together, of each level and of each category. sums: from `target_losses`."""
    groups: dict[str, list[int]] = {"all": list(range(len(store.tasks)))}
    for prefix, names in (("", [t.level for t in store.tasks]), ("category ", [t.category for t in store.tasks])):
        for number, name in enumerate(names):
            if name:
                groups.setdefault(prefix + name, []).append(number)
    return {name: figures(*sums[:, own].sum(dim=1).tolist()) for name, own in groups.items()}


def by_task(store: ExampleStore, sums: Tensor) -> Figures:
    return {task.name: figures(*sums[:, number].tolist()) for number, task in enumerate(store.tasks)}


def figures(nats: float, num_targets: float, num_bytes: float) -> dict[str, float]:
    """cross_entropy in nats per counted token, its exponential, and bits per byte of the counted text."""
    mean = nats / max(num_targets, 1.0)
    return {
        "cross_entropy": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": nats / math.log(2.0) / max(num_bytes, 1.0),
        "num_targets": num_targets,
    }


def _first_examples(store: ExampleStore, max_positions: int | None) -> np.ndarray:
    if max_positions is None:
        return np.arange(len(store))
    chosen = []
    for begin, end in zip(store.bounds[:-1].tolist(), store.bounds[1:].tolist(), strict=True):
        before = np.cumsum(store.positions[begin:end]) - store.positions[begin:end]
        chosen.append(begin + np.flatnonzero(before < max_positions))
    return np.concatenate(chosen)


def _batches(
    store: ExampleStore, chosen: np.ndarray, sequences: Sequence[Sequence[int]], seq_len: int
) -> Iterator[tuple[TokenBatch, Tensor]]:
    """Batches, and the task of each position, 0 for padding."""
    rows = max(1, BATCH_POSITIONS // seq_len)
    for begin in range(0, len(sequences), rows):
        group = [[int(chosen[i]) for i in sequence] for sequence in sequences[begin : begin + rows]]
        laid_out = lay_out(store, group, seq_len)
        tasks = np.where(laid_out.token_mask, store.task_of[laid_out.examples], 0)
        yield laid_out.batch(), torch.from_numpy(tasks)


def _own_batches(
    store: ExampleStore, chosen: np.ndarray, seq_len: int, world: World | None
) -> Iterator[tuple[TokenBatch, Tensor]]:
    """Every world.size-th batch. All ranks run equally many, since they meet in every layer; idle turns are masked."""
    packed = best_fit(store.positions[chosen].tolist(), seq_len)
    turn: list[tuple[TokenBatch, Tensor]] = []
    size, rank = (1, 0) if world is None else (world.size, world.rank)
    for batch in _batches(store, chosen, packed, seq_len):
        turn.append(batch)
        if len(turn) == size:
            yield turn[rank]
            turn = []
    if turn:
        first, tasks = turn[0]
        nothing = torch.zeros_like(first.tokens, dtype=torch.bool)
        idle = (first._replace(token_mask=nothing, loss_mask=nothing), tasks)
        yield turn[rank] if rank < len(turn) else idle
