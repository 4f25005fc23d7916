from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe.data.loader import TokenBatch, TrainLoader
from moe.data.shards import ShardWriter, TokenShard
from moe.instruct.encoding import EncodedExample
from moe.instruct.examples import ExampleStore, TaskInfo, write_examples
from moe.instruct.loader import InstructionLoader

SEQ_LEN = 32
TEXT_IDS = 500  # ids from here on are text


@pytest.fixture
def store(tmp_path: Path) -> ExampleStore:
    """Three tasks with examples of 4 to 24 tokens; the last quarter of each is its target."""
    random = np.random.default_rng(0)
    tasks = []
    for name, count in (("a", 60), ("b", 30), ("c", 90)):
        examples = []
        for _ in range(count):
            length = int(random.integers(4, 25))
            tokens = [0, *random.integers(1, TEXT_IDS, length - 2).tolist(), 0]
            examples.append((EncodedExample(tokens, 1, length - length // 4), 3))
        tasks.append((TaskInfo(name, "first" if name < "c" else "second", "x", ""), examples))
    return write_examples(tmp_path / "store", 1000, tasks)


@pytest.fixture
def text(tmp_path: Path) -> TrainLoader:
    writer = ShardWriter(tmp_path / "text", vocab_size=1000, tokenizer_hash="x")
    for number in range(40):
        writer.add("text", [*range(TEXT_IDS + number, TEXT_IDS + number + 50), 0], 50)
    writer.finish()
    return TrainLoader(TokenShard(tmp_path / "text"), seq_len=SEQ_LEN, batch_size=1, seed=5)


def loader(store: ExampleStore, **changes: object) -> InstructionLoader:
    options = {"seq_len": SEQ_LEN, "batch_size": 8, "seed": 5} | changes
    return InstructionLoader(store, [0.2, 0.3, 0.5], **options)


def same(a: TokenBatch, b: TokenBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("with_text", [False, True])
def test_a_batch_is_a_function_of_seed_and_step(store: ExampleStore, text: TrainLoader, with_text: bool) -> None:
    options = {"text": text, "text_share": 0.25} if with_text else {}
    walked = loader(store, **options)
    batches = [walked.batch(step) for step in range(12)]
    for step in (11, 0, 5):
        assert same(loader(store, **options).batch(step), batches[step])
    assert not same(loader(store, seed=6, **options).batch(0), batches[0])


@pytest.mark.parametrize(("world_size", "micro"), [(2, None), (2, 2), (4, 1)])
@pytest.mark.parametrize("with_text", [False, True])
def test_ranks_share_the_global_batch(
    store: ExampleStore, text: TrainLoader, with_text: bool, world_size: int, micro: int | None
) -> None:
    """In each micro-step the ranks together see what one process with as many micro-steps sees."""
    options = {"text": text, "text_share": 0.25} if with_text else {}
    local = micro or 8 // world_size
    for step in (0, 7):
        whole = loader(store, **options).batch(step).split(local * world_size)
        parts = [
            loader(store, rank=rank, world_size=world_size, micro_batch_size=micro, **options).batch(step).split(local)
            for rank in range(world_size)
        ]
        for number, expected in enumerate(whole):
            joined = [torch.cat([part[number][n] for part in parts]) for n in range(5)]
            assert same(TokenBatch(*joined), expected)


def test_shares_of_examples_and_of_text_are_those_asked_for(store: ExampleStore, text: TrainLoader) -> None:
    made = loader(store, text=text, text_share=0.25)
    steps = 40
    report = made.report(steps)
    batches = [made.batch(step) for step in range(steps)]
    of_text = [bool((row >= TEXT_IDS).any()) for batch in batches for row in batch.tokens]
    assert sum(of_text) == report.text_sequences == pytest.approx(0.25 * report.sequences, abs=2)
    assert all(1 <= sum(of_text[i * 8 : i * 8 + 8]) <= 3 for i in range(steps))  # nearly the share in every batch
    assert {row.name: row.intended for row in report.tasks} == {"a": 0.2, "b": 0.3, "c": 0.5}
    assert all(abs(row.sampled - row.intended) < 0.02 for row in report.tasks), report.tasks
    assert [row.name for row in report.benchmarks] == ["first", "second"]
    masks = torch.cat([batch.token_mask for batch in batches]), torch.cat([batch.loss_mask for batch in batches])
    assert report.used == pytest.approx(float(masks[0].float().mean()))
    assert report.counted == pytest.approx(float(masks[1].float().mean()))
    assert report.used > 0.95
    assert report.text_counted == pytest.approx(report.text_sequences * SEQ_LEN / int(masks[1].sum()))


def test_text_is_read_whole_and_in_its_own_order(store: ExampleStore, text: TrainLoader) -> None:
    made = loader(store, text=text, text_share=0.25)
    read = [
        (row, mask, ids)
        for step in range(6)
        for row, mask, ids in zip(
            made.batch(step).tokens, made.batch(step).loss_mask, made.batch(step).document_ids, strict=True
        )
        if (row >= TEXT_IDS).any()
    ]
    windows = {tuple(text.batch(n).tokens[0].tolist()) for n in range(len(read))}
    assert {tuple(row.tolist()) for row, _, _ in read} == windows
    assert all(bool(mask.all()) and len(set(ids.tolist())) == 1 for _, mask, ids in read)


def test_what_cannot_be_divided_is_refused(store: ExampleStore, text: TrainLoader) -> None:
    with pytest.raises(ValueError, match="cannot be divided among 3 ranks"):
        loader(store, world_size=3)
    with pytest.raises(ValueError, match=r"text_share \(.*\) must be above 0 with `text`"):
        loader(store, text=text)
    with pytest.raises(ValueError, match="task number 1 has a share above 0 but no example"):
        empty = write_examples(store.folder.parent / "empty", 9, [(task, []) for task in store.tasks])
        InstructionLoader(empty, [0.0, 1.0, 0.0], seq_len=8, batch_size=1, seed=0)
