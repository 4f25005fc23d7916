"""A checkpoint belongs to no rank count: written by one layout of ranks, read by every other, bit for bit."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe.checkpoint import (
    CheckpointSaver,
    TrainState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    model_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from moe.checkpoint import save as saving
from moe.checkpoint.state import local_tensor
from moe.compose import compose, to_yaml
from moe.config import RunConfig
from moe.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer
from moe.distributed.mesh import make_meshes
from moe.distributed.parallelize import parallelize
from moe.distributed.world import World
from moe.model import Transformer
from moe.training.loss import compute_loss
from moe.training.optimizer import make_optimizer
from tests.moe.test_checkpoint import full_disk
from tests.ranks import TIMEOUT_SECONDS, run_ranks

# losses of float64 networks, which differ in the order of sums: what the ranks' gradients are added up in
RELATIVE = 1e-10
NUM_RANKS = 4
MORE_STEPS = 3
SEQ_LEN = 8


class Layout(NamedTuple):
    """How many ranks along each axis."""

    dp_replicate: int
    dp_shard: int
    ep: int


LAYOUTS = [Layout(1, 1, 4), Layout(1, 2, 2), Layout(1, 4, 1), Layout(2, 1, 2)]
ONE = Layout(1, 1, 1)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    """Odd sizes: 97 rows and vectors of 6 over 4 ranks leave shards of several sizes, and empty ones."""
    return compose(
        [
            *("+moe=8e", "model.vocab_size=97", "model.d_model=12", "model.d_ff=8", "model.num_layers=1"),
            *("model.moe.moe_every=1", "model.expert_d_ff=8", "model.num_heads=2", "model.qk_norm=head"),
            *("model.moe.bias_balance_rate=0.01", "model.dropout=0.0", f"model.max_seq_len={SEQ_LEN}"),
            *(f"train.batch_tokens={8 * SEQ_LEN}", f"data.seq_len={SEQ_LEN}", "optim.lr=0.01", "backend=torch"),
        ]
    )


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of `whole` that this rank has of `like`, from torch's rule for it."""
    if not isinstance(like, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))]


class Run:
    """A small model in float64 and its optimizer, on the ranks of `world`, and steps that are the same on any."""

    def __init__(self, config: RunConfig, layout: Layout, world: World | None) -> None:
        self.world = world
        parallel = replace(config.parallel, ep_size=layout.ep, dp_replicate=layout.dp_replicate)
        self.config = replace(config, parallel=parallel)
        self.model = Transformer(self.config.model, device="meta", dtype=torch.float64, backend="torch")
        if world is not None:
            parallelize(self.model, make_meshes(self.config.parallel, world.size, "cpu"), self.config)
        self.model.to_empty(device="cpu").reset_parameters(0)
        self.optimizer = make_optimizer(self.model, self.config.optim)

    def steps(self, first: int, count: int) -> list[float]:
        """The losses of so many updates, each over 4 micro-batches of 2 sequences, one to a rank or all to one."""
        return [self._step(number) for number in range(first, first + count)]

    def _step(self, number: int) -> float:
        tokens = torch.randint(97, (NUM_RANKS, 2, SEQ_LEN + 1), generator=torch.Generator().manual_seed(number))
        total = torch.zeros((), dtype=torch.float64)
        group = None if self.world is None else self.world.group
        for batch in tokens if self.world is None else tokens[self.world.rank :: self.world.size]:
            output = self.model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            loss = compute_loss(output, None, self.config.model.moe, group).loss / NUM_RANKS
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, buffer in self.model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.add_(
                    0.001 * number * torch.arange(len(buffer))
                )  # the routers' balance biases, the same on all ranks
        return float(total if self.world is None else self.world.sum(total))

    def tensors(self) -> dict[str, Tensor]:
        return model_tensors(self.model) | optimizer_tensors(self.model, self.optimizer)

    def whole_tensors(self) -> dict[str, Tensor]:
        """All of every tensor, on each rank."""
        return {
            key: value.full_tensor() if isinstance(value, DTensor) else value.clone()
            for key, value in self.tensors().items()
        }

    def differences(self, whole: dict[str, Tensor]) -> list[str]:
        """The tensors of which this rank's part is not that of `whole`, in any bit."""
        own = self.tensors()
        assert own.keys() == whole.keys()
        return [key for key, value in own.items() if not torch.equal(local_tensor(value), part_of(whole[key], value))]

    def scramble(self) -> None:
        with torch.no_grad():
            for value in self.tensors().values():
                local_tensor(value).fill_(0.123)

    def content(self, tokenizer: Tokenizer) -> dict[str, Any]:
        held = {"model": self.model, "optimizer": self.optimizer, "config_yaml": to_yaml(self.config)}
        return held | {"tokenizer": tokenizer, "world": self.world}

    def save(self, folder: Path, tokenizer: Tokenizer, step: int = 2) -> Path:
        return save_checkpoint(folder, state=TrainState(step=step), keep_last=2, **self.content(tokenizer))

    def load(self, path: Path) -> TrainState:
        return load_checkpoint(path, model=self.model, optimizer=self.optimizer, world=self.world)


class Written(NamedTuple):
    """What one layout saved after two steps, and the losses of three more."""

    path: Path
    tensors: dict[str, Tensor]
    losses: list[float]


def write(run: Run, layout: Layout, folder: Path, tokenizer: Tokenizer) -> Written:
    run.steps(0, 2)
    path = run.save(folder / "-".join(map(str, layout)), tokenizer)
    return Written(path, run.whole_tensors(), run.steps(2, MORE_STEPS))


class Found(NamedTuple):
    """Of one layout: what differed from what each layout had written, and the losses after the last of them."""

    different: dict[Layout, list[str]]
    losses: list[float]
    continued: Layout


def read(run: Run, layout: Layout, written: dict[Layout, Written]) -> Found:
    """Load what each layout wrote over what was there before, another layout's last; then three more steps."""
    first = list(written).index(layout)
    order = [*list(written)[first:], *list(written)[:first]]
    different = {}
    for source in order:
        run.scramble()
        assert run.load(written[source].path) == TrainState(step=2)
        different[source] = run.differences(written[source].tensors)
    return Found(different, run.steps(2, MORE_STEPS), order[-1])


def write_and_read(world: World, config: RunConfig, folder: Path, tokenizer: Path, alone: Written) -> tuple[dict, dict]:
    """Every layout writes; every layout reads what each wrote and what one process wrote."""
    loaded = open_tokenizer(tokenizer)
    runs = {layout: Run(config, layout, world) for layout in LAYOUTS}
    written = {ONE: alone} | {layout: write(run, layout, folder, loaded) for layout, run in runs.items()}
    return written, {layout: read(run, layout, written) for layout, run in runs.items()}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(["the cat sat on the mat. " * 20, "a dog ran to the red log. " * 20], 300).save(path.parent)
    return path


@pytest.fixture(scope="module")
def exchanged(
    config: RunConfig, tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path
) -> tuple[dict, list[dict]]:
    """What each layout wrote, and what each rank found in it."""
    folder = tmp_path_factory.mktemp("layouts")
    run = Run(config, ONE, None)
    alone = write(run, ONE, folder, open_tokenizer(tokenizer_file))
    results = run_ranks(write_and_read, NUM_RANKS, config, folder, tokenizer_file, alone)
    written = results[0][0]
    return written, [found for _, found in results] + [{ONE: read(run, ONE, written)}]


def test_every_layout_reads_what_every_layout_wrote(exchanged: tuple[dict, list[dict]]) -> None:
    """Weights and optimizer state bit for bit, on each rank; the counters too."""
    written, found = exchanged
    assert set(written) == {ONE, *LAYOUTS}
    assert {layout for each in found for layout in each} == set(written)
    for each in found:
        for layout, result in each.items():
            assert result.different == {source: [] for source in written}, layout
    keys = written[ONE].tensors.keys()
    assert any(key.endswith("expert_bias") for key in keys)  # on all ranks alike, written once
    assert sum(key.endswith("experts.w_in.exp_avg_sq") for key in keys) == 1


def test_training_goes_on_as_if_nothing_had_happened(exchanged: tuple[dict, list[dict]]) -> None:
    """At another layout than the one that wrote: the losses of the run that was not interrupted."""
    written, found = exchanged
    for each in found:
        for layout, result in each.items():
            assert result.continued != layout
            assert result.losses == pytest.approx(written[result.continued].losses, rel=RELATIVE, abs=0)
    assert len({result.continued for each in found for result in each.values()}) == len(written)
    assert len(set(written[ONE].losses)) == MORE_STEPS


def test_all_ranks_write_and_none_writes_what_another_has(exchanged: tuple[dict, list[dict]]) -> None:
    written, _ = exchanged
    for layout, result in written.items():
        files = sorted(result.path.glob("*.safetensors"))
        assert len(files) == (1 if layout == ONE else NUM_RANKS)
        stored = sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)
        assert stored == sum(tensor.nbytes for tensor in result.tensors.values())
        names = {file.name for file in result.path.iterdir()}
        assert set(json.loads((result.path / "checksums.json").read_text())) == names - {"checksums.json"}


PAIR = Layout(1, 1, 2)


def outcome(action: Callable[[], Any]) -> str:
    """What `action` raised, with its type."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mishaps(world: World, config: RunConfig, folder: Path, tokenizer_file: Path) -> dict[str, Any]:
    """Things that go wrong on rank 1 alone, and what each rank makes of them."""
    tokenizer = open_tokenizer(tokenizer_file)
    run = Run(config, PAIR, world)
    run.steps(0, 1)
    good = run.save(folder, tokenizer, step=1)
    told: dict[str, Any] = {}
    with full_disk() if world.rank == 1 else contextlib.nullcontext():
        told["disk"] = outcome(lambda: run.save(folder, tokenizer, step=2))
    experts = run.model.layers[0].feed_forward.experts.w_in.to_local()
    before = experts.detach().clone()
    if world.rank == 1:
        experts.data[-1, 0, 0] = float("nan")
    told["nan"] = outcome(lambda: run.save(folder, tokenizer, step=2))
    experts.data.copy_(before)
    world.meet()
    told["folder"] = names(folder)
    run.load(good)
    told["background"] = in_background(run, folder, tokenizer)
    world.meet()
    if world.rank == 0:
        (file,) = good.glob("shard-00002-*")
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    world.meet()
    told["flip"] = outcome(lambda: run.load(good))
    told["weights"] = outcome(lambda: load_weights(good, model=run.model, world=world))
    return told


def in_background(run: Run, folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Save beside training that changes every tensor, then a save that fails on rank 1."""
    assert run.world is not None
    told: dict[str, Any] = {}
    begin, write_tensors = threading.Event(), saving.write_tensors

    def slow(*arguments: Any) -> None:
        assert begin.wait(TIMEOUT_SECONDS)
        write_tensors(*arguments)

    saver = CheckpointSaver(folder, keep_last=5, in_background=True, **run.content(tokenizer))
    with saver, pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_tensors", slow)
        for step in (3, 4):  # the second copy is made into the first one's memory
            begin.clear()
            expected = run.whole_tensors()
            saver.save(TrainState(step=step))
            state = TrainState(step=step)
            run.steps(step, 2)  # collectives of training and of the saver, at the same time
            run.scramble()
            assert not (folder / f"step_{step:08d}").exists()
            begin.set()
            run.steps(step, 1)
            saver.wait()
            assert run.load(folder / f"step_{step:08d}") == state
            told[f"step {step}"] = run.differences(expected)
            run.steps(step, 1)
        with full_disk() if run.world.rank == 1 else contextlib.nullcontext():
            saver.save(TrainState(step=5))
            run.steps(5, 1)
            saver._writing.exception()
        told["error"] = outcome(lambda: saver.save(TrainState(step=6)))
        told["once"] = outcome(saver.wait)
    return told


def test_what_happens_to_one_rank_is_known_to_all(config: RunConfig, tmp_path: Path, tokenizer_file: Path) -> None:
    first, second = run_ranks(mishaps, 2, config, tmp_path, tokenizer_file)
    assert first == second
    assert first["folder"] == ["latest", "step_00000001"]
    for error in (first["disk"], first["background"]["error"]):
        assert error.startswith("OSError: checkpoint ")
        assert "could not be written (rank 1: " in error
        assert "File too large" in error
        assert f"earlier checkpoints in {tmp_path} are untouched" in error
    poisoned = "model.layers.0.feed_forward.experts.w_in"
    assert first["nan"].startswith(f"DivergedError: rank 1: step 2 is not saved: {poisoned} ")
    assert first["background"] | {"error": ""} == {"step 3": [], "step 4": [], "error": "", "once": "nothing"}
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000003", "step_00000004"]
    for error in (first["flip"], first["weights"]):
        assert error.startswith("ValueError: rank ")
        assert "shard-00002-model-00001-of-00001.safetensors is damaged: sha256" in error


def save_forever(rank: int, config: RunConfig, folder: Path, tokenizer_file: Path, store: str) -> None:
    """Checkpoint after checkpoint, every number in one of them the number of its step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"), dist.group.WORLD, TIMEOUT_SECONDS)
    run, tokenizer = Run(config, PAIR, world), open_tokenizer(tokenizer_file)
    for step in range(1, 100_000):
        for value in run.tensors().values():
            local_tensor(value).fill_(step)
        run.save(folder, tokenizer, step=step)


def test_killed_while_saving(config: RunConfig, tmp_path: Path, tokenizer_file: Path) -> None:
    """kill -9 at random moments, one rank first: the newest folder is whole, and the other rank does not hang."""
    context = multiprocessing.get_context("forkserver")  # imports once, then forks
    context.set_forkserver_preload(["torch", "moe.checkpoint", "moe.distributed.parallelize", "moe.training.loss"])
    rng, left_behind = random.Random(0), 0
    for trial in range(4):
        folder = tmp_path / str(trial)
        ranks = [
            context.Process(
                target=save_forever, args=(rank, config, folder, tokenizer_file, str(tmp_path / f"store{trial}"))
            )
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        while not list_checkpoints(folder):
            assert all(process.is_alive() for process in ranks)
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.2))
        os.kill(ranks[(trial + 1) % 2].pid, signal.SIGKILL)
        if trial > 0:
            os.kill(ranks[trial % 2].pid, signal.SIGKILL)
        for process in ranks:
            process.join(TIMEOUT_SECONDS)
        assert all(process.exitcode not in (0, None) for process in ranks)
        left_behind += bool(list(folder.glob(".*_step_*")))
        for path in list_checkpoints(folder):
            alone = Run(config, ONE, None)
            step = int(path.name.removeprefix("step_"))
            assert alone.load(path).step == step
            assert all(bool((value == step).all()) for value in model_tensors(alone.model).values())
        assert find_checkpoint(folder) == path
        alone.save(folder, open_tokenizer(tokenizer_file), step=step + 1)
        assert not list(folder.glob(".*_step_*"))
    assert left_behind > 0, "no kill hit a save: nothing was tested"
