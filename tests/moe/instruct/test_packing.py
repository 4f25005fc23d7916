"""Packed examples against the same examples alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe.config import ModelConfig, MoEConfig
from moe.instruct.encoding import EncodedExample
from moe.instruct.examples import ExampleStore, TaskInfo, write_examples
from moe.instruct.packing import Packer, best_fit, lay_out
from moe.instruct.validation import by_group, by_task, target_losses
from moe.model import Transformer
from moe.training.loss import compute_loss

TASKS = [TaskInfo("b/x", "b", "One", "held-out task"), TaskInfo("c/y", "c", "Two", "held-out category")]
TOLERANCE = 2e-5  # of logits of magnitude 1 in float32


@pytest.fixture
def store(tmp_path: Path) -> ExampleStore:
    """Twelve examples of 3 to 9 tokens; first_counted anywhere from 1 to the last token."""
    random = np.random.default_rng(0)
    tasks = []
    for task in TASKS:
        examples = []
        for number in range(6):
            tokens = [0, *random.integers(1, 37, 2 + number).tolist()]
            examples.append((EncodedExample(tokens, 1, int(random.integers(1, len(tokens)))), number + 1))
        tasks.append((task, examples))
    return write_examples(tmp_path / "store", 37, tasks)


@pytest.fixture(params=[False, True], ids=["dense", "sparse"])
def model(request: pytest.FixtureRequest, model_config: Callable[..., ModelConfig]) -> Transformer:
    made = Transformer(model_config(sparse=request.param))
    made.reset_parameters(seed=1)
    return made.eval()


def test_a_store_gives_back_what_was_written(store: ExampleStore) -> None:
    assert len(store) == 12
    assert store.sizes.tolist() == [6, 6]
    assert store.tasks == TASKS
    assert store.lengths.tolist() == [3, 4, 5, 6, 7, 8] * 2
    assert store.tokens(4)[0] == 0
    (store.folder / "examples.npy").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"examples.npy is damaged: sha256"):
        ExampleStore(store.folder)


def test_logits_of_a_packed_example_are_those_of_it_alone(store: ExampleStore, model: Transformer) -> None:
    rows = lay_out(store, [[7, 2, 0], [11, 3]], 16)
    batch = rows.batch()
    packed = model(batch.tokens, document_ids=batch.document_ids, token_mask=batch.token_mask).logits
    for example in (7, 2, 0, 11, 3):
        tokens = torch.from_numpy(store.tokens(example))[None]
        alone = model(tokens[:, :-1]).logits[0].detach()
        here = packed[torch.from_numpy(rows.examples == example)]
        assert torch.allclose(here, alone, atol=TOLERANCE * float(alone.abs().max()))
    ids = torch.zeros_like(batch.document_ids)
    across = model(batch.tokens, document_ids=ids, token_mask=batch.token_mask).logits
    assert not torch.allclose(across[batch.token_mask], packed[batch.token_mask], atol=1e-2)  # the mask matters


def test_every_token_but_an_examples_first_is_predicted_and_targets_alone_count(store: ExampleStore) -> None:
    rows = lay_out(store, [[5, 1]], 14)
    a, b = store.tokens(5), store.tokens(1)
    assert rows.tokens[0].tolist() == [*a[:-1], *b[:-1], 0, 0, 0, 0]
    assert rows.targets[0].tolist() == [*a[1:], *b[1:], 0, 0, 0, 0]
    assert rows.document_ids[0].tolist() == [1] * 7 + [2] * 3 + [0] * 4
    assert rows.token_mask[0].tolist() == [True] * 10 + [False] * 4
    counted = [
        i + 1 >= first
        for tokens, first in ((a, store.first_counted[5]), (b, store.first_counted[1]))
        for i in range(len(tokens) - 1)
    ]
    assert rows.loss_mask[0].tolist() == [*counted, *[False] * 4]
    assert rows.loss_mask[0, [6, 9]].all()  # the separator at the end of each


def test_no_gradient_comes_from_the_losses_of_source_positions(store: ExampleStore, model: Transformer) -> None:
    """The loss is the mean of the counted losses, and its gradient at the others' logits is exactly zero."""
    batch = lay_out(store, [[7, 2, 0], [11, 3]], 16).batch()
    logits = model(batch.tokens, document_ids=batch.document_ids, token_mask=batch.token_mask).logits
    logits = logits.detach().requires_grad_()
    losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.targets)
    output = model(
        batch.tokens,
        batch.targets,
        document_ids=batch.document_ids,
        token_mask=batch.token_mask,
        loss_mask=batch.loss_mask,
    )
    assert batch.loss_mask is not None
    assert torch.allclose(output.token_losses[batch.loss_mask], losses[batch.loss_mask], atol=1e-5)
    part = compute_loss(output._replace(token_losses=losses), batch.token_mask, None, loss_mask=batch.loss_mask)
    part.cross_entropy.backward()
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad[~batch.loss_mask]) == 0
    assert torch.count_nonzero(logits.grad[batch.loss_mask].abs().sum(-1)) == int(batch.loss_mask.sum())


@pytest.mark.parametrize("splits", [[2, 2], [3, 1], [1, 1, 1, 1]], ids=str)
def test_micro_batches_and_ranks_add_up_to_the_mean_over_all_targets(
    store: ExampleStore, model_config: Callable[..., ModelConfig], moe_config: MoEConfig, splits: list[int]
) -> None:
    """Sequences with few and many targets: a mean of means would be another number."""
    model = Transformer(model_config(sparse=True)).double()
    model.reset_parameters(seed=2)
    batch = lay_out(store, [[5, 4], [0], [11, 10], [6]], 16).batch()
    assert batch.loss_mask is not None and batch.token_mask is not None
    num_targets, num_tokens = int(batch.loss_mask.sum()), int(batch.token_mask.sum())

    def gradients(parts: list[slice]) -> list[torch.Tensor]:
        model.zero_grad()
        for part in parts:
            tokens, targets, token_mask, ids, loss_mask = (field[part] for field in batch)
            output = model(tokens, targets, document_ids=ids, token_mask=token_mask, loss_mask=loss_mask)
            loss = compute_loss(output, token_mask, None, loss_mask=loss_mask)
            loss.share(num_targets, num_tokens).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ends = np.cumsum(splits)
    parts = [slice(int(end - size), int(end)) for end, size in zip(ends, splits, strict=True)]
    for whole, added in zip(gradients([slice(0, 4)]), gradients(parts), strict=True):
        assert torch.allclose(whole, added, rtol=1e-9, atol=1e-12)
    assert len({int(batch.loss_mask[part].sum()) for part in parts}) > 1


def test_best_fit_places_each_once_and_fills_95_percent() -> None:
    random = np.random.default_rng(0)
    for seq_len, mean in ((2048, 300), (512, 150), (256, 120)):
        lengths = np.clip(random.lognormal(np.log(mean), 0.8, 1500).astype(int), 8, seq_len).tolist()
        sequences = best_fit(lengths, seq_len)
        assert sorted(i for sequence in sequences for i in sequence) == list(range(1500))
        filled = [sum(lengths[i] for i in sequence) for sequence in sequences]
        assert max(filled) <= seq_len
        assert sum(filled) / (len(filled) * seq_len) > 0.95
    with pytest.raises(ValueError, match="takes 9 positions, but a sequence has 8"):
        best_fit([3, 9], 8)


def test_packer_reads_every_draw_once_and_repeats() -> None:
    random = np.random.default_rng(1)
    positions = random.integers(5, 60, 300)
    drawn: list[int] = []

    def draw(first: int, count: int) -> np.ndarray:
        examples = np.arange(first, first + count) % 300
        drawn.extend(examples.tolist())
        return examples

    packer = Packer(draw, positions, seq_len=64, pool=100, seed=3)
    sequences = [packer.sequence(n) for n in range(200)]
    assert sorted([*packer._examples, *packer._carried]) == sorted(drawn)
    assert np.mean([positions[sequence].sum() for sequence in sequences]) > 0.95 * 64
    other = Packer(draw, positions, seq_len=64, pool=100, seed=3)
    assert [other.sequence(n) for n in (150, 3)] == [sequences[150], sequences[3]]
    assert Packer(draw, positions, seq_len=64, pool=100, seed=4).sequence(0) != sequences[0]


def test_examples_too_long_for_two_in_a_sequence_still_make_progress() -> None:
    packer = Packer(
        lambda first, count: np.arange(first, first + count) % 10, np.full(10, 40), seq_len=64, pool=16, seed=0
    )
    assert all(len(packer.sequence(n)) == 1 for n in range(100))


def test_validation_sums_the_targets_of_each_task(store: ExampleStore, model: Transformer) -> None:
    sums = target_losses(model, store, seq_len=16)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for example in range(12):
        tokens = torch.from_numpy(store.tokens(example))[None]
        losses = model(tokens[:, :-1], tokens[:, 1:].contiguous()).token_losses[0].detach().double()
        task, first = int(store.task_of[example]), int(store.first_counted[example])
        expected[:, task] += torch.tensor([float(losses[first - 1 :].sum()), len(losses) - first + 1, example % 6 + 1])
    assert torch.allclose(sums, expected, rtol=1e-5)
    groups = by_group(store, sums)
    assert list(groups) == ["all", "held-out task", "held-out category", "category One", "category Two"]
    assert groups["all"]["cross_entropy"] == pytest.approx(float(expected[0].sum() / expected[1].sum()), rel=1e-5)
    assert groups["held-out category"] == groups["category Two"] == by_task(store, sums)["c/y"]
    limited = target_losses(model, store, seq_len=16, max_positions=4)  # examples of 2 and 3 positions of each task
    assert limited[2].tolist() == [3.0, 3.0]
    assert target_losses(model, store, seq_len=16, max_positions=5)[2].tolist() == [3.0, 3.0]
    assert target_losses(model, store, seq_len=16, max_positions=6)[2].tolist() == [6.0, 6.0]
