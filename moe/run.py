"""The composition root: builds a run in data-flow order and hands validators and savers to the trainer as callables."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from moe.checkpoint import (
    CheckpointSaver,
    DivergedError,
    TrainState,
    find_checkpoint,
    function_changes,
    list_checkpoints,
    load_checkpoint,
    load_config,
    load_tokenizer,
    load_weights,
)
from moe.compose import to_yaml
from moe.config import RunConfig
from moe.console import say
from moe.data.tokenizer import Tokenizer
from moe.distributed.mesh import make_meshes
from moe.distributed.parallelize import parallelize
from moe.distributed.world import World, open_world
from moe.dry_run import dry_run, report_folder, write_report
from moe.instruct.adaptation import adapt_modules, tuned_config
from moe.instruct.best import BestCheckpoint
from moe.instruct.tuning import checkpoint_to_continue, continued_config, open_tuning
from moe.instruct.tuning_report import print_tuning_summary
from moe.layers.experts import Experts
from moe.model import Transformer
from moe.pretraining import Text, write_aside
from moe.run_folder import open_run_folder, record_divergence, require_source
from moe.samples import sample_texts
from moe.scaling.flops import flops_per_token
from moe.scaling.memory import memory_bound
from moe.scaling.params import count_params
from moe.summary import print_summary
from moe.training.allocator import keep_freed_memory
from moe.training.metrics import Validation, stream_metrics
from moe.training.optimizer import make_optimizer
from moe.training.reporters import open_reporters
from moe.training.trainer import Batches, Trainer


def train(config: RunConfig) -> Path:
    """Train, validate and sample one model, or continue it, or say that it is complete. Returns its run folder.

    Under torchrun every process calls this; together they train one model.
    """
    return train_until_stopped(config)[0]


def train_until_stopped(config: RunConfig) -> tuple[Path, str | None]:
    """Like `train`; also returns the signal that stopped training, if any, the same on all ranks."""
    if config.tune is not None:
        own = checkpoint_to_continue(config)  # has everything, and the source may be gone
        config = tuned_config(config) if own is None else continued_config(config, own)
    if config.parallel.dry_run:
        return write_report(dry_run(config), report_folder(config)), None
    world = open_world(config.device, timeout_seconds=config.parallel.timeout_seconds)
    try:
        ended = _train(config, world)
    except DivergedError:  # on all ranks alike
        world.close()
        raise
    world.close()  # not after another error: the others may be waiting, and torchrun ends them
    return ended


def _train(config: RunConfig, world: World) -> tuple[Path, str | None]:
    if config.train.keep_freed_memory and world.device.type == "cpu":
        keep_freed_memory()
    world.on_first(lambda: require_source(config))
    material: Material = Text(config.data, world) if config.tune is None else open_tuning(config, world)
    config = _with_vocabulary(config, material.tokenizer)
    with contextlib.ExitStack() as held:  # by rank 0 on behalf of all
        run_dir = world.on_first(lambda: held.enter_context(open_run_folder(config, material.identity())))
        return run_dir, _train_in(run_dir, config, material, world)


def _train_in(run_dir: Path, config: RunConfig, material: Material, world: World) -> str | None:
    """Start, continue or show the run of an open folder. Returns the signal that stopped it, if any."""
    if world.on_first(lambda: (run_dir / "results.json").exists()):
        if world.rank == 0:
            print(f"{run_dir} is complete: delete it to train again")  # noqa: T201
            _summarise(config, run_dir)
        return None
    if world.rank == 0 and config.parallel.ep_size > 1:
        say(str(memory_bound(config, world.size)))
    model = build_model(config, world)
    resumes = world.on_first(lambda: bool(list_checkpoints(run_dir / "checkpoints")))
    if config.init_from is not None and not resumes:  # a checkpoint has all weights, and the source may be gone
        _start_from(Path(config.init_from), config, model, material.tokenizer, world)
    if config.tune is not None:
        adapt_modules(model, config.tune)
    optimizer = make_optimizer(model, config.optim)
    if world.rank == 0 and not resumes:
        params = count_params(config.model)
        say(
            f"{run_dir}: {params.total:,} parameters, {params.active:,} active; {config.train.num_steps} steps of "
            f"{config.train.batch_tokens:,} tokens"
        )
    state = _resume(config, run_dir, model, optimizer, world) if resumes else TrainState()
    with _recording_divergence(run_dir, config, state, world):
        signal_name = fit(config, material, run_dir, model, optimizer, state, world)
    if state.step == config.train.num_steps:
        _finish(config, material, run_dir, model, state, world)
        if world.rank == 0:
            _summarise(config, run_dir)
    return signal_name


@contextlib.contextmanager
def _recording_divergence(run_dir: Path, config: RunConfig, state: TrainState, world: World) -> Iterator[None]:
    """If the run diverges in the block, which it does on all ranks at once, its folder says so afterwards."""
    try:
        yield
    except DivergedError as error:
        diverged = error  # a name that outlives this clause
        world.on_first(lambda: record_divergence(run_dir, config, state, diverged))
        raise


class Material(Protocol):
    """The training and evaluation data of a run: text, or examples to tune on (moe.instruct.tuning)."""

    tokenizer: Tokenizer

    def identity(self) -> dict[str, str]: ...
    def loader(self, config: RunConfig, run_dir: Path, world: World) -> Batches: ...
    def validate(self, model: Transformer, config: RunConfig, world: World) -> Validation: ...
    def results(self, model: Transformer, config: RunConfig, world: World) -> dict[str, Any]: ...


def build_model(config: RunConfig, world: World) -> Transformer:
    """The model with its initial weights; with several ranks, only this rank's shards."""
    model = Transformer(config.model, backend=config.backend, recompute=config.train.recompute, device="meta")
    if world.size > 1:
        meshes = make_meshes(config.parallel, world.size, world.device.type)
        parallelize(model, meshes, config)
    elif config.parallel.ep_size * config.parallel.dp_replicate > 1:
        raise ValueError(
            f"parallel.ep_size ({config.parallel.ep_size}) and parallel.dp_replicate ({config.parallel.dp_replicate}) "
            f"share a model among processes and this is one: start it with torchrun --nproc_per_node=N train.py ..."
        )
    offloaded = world.size > 1 and config.parallel.cpu_offload
    model.to_empty(device="cpu" if offloaded else world.device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(world.device))  # only parameters are offloaded
    model.reset_parameters(config.seed)
    if world.size == 1:
        for module in model.modules():
            if isinstance(module, Experts):
                module.persistent_grad(config.train.keep_freed_memory and world.device.type == "cpu")
    return model


def fit(
    config: RunConfig,
    material: Material,
    run_dir: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    world: World,
) -> str | None:
    """Train from `state` to the last step or a signal, saving everything. Returns the signal's name, if any."""
    loader = material.loader(config, run_dir, world)
    best = _best_checkpoint(config, material, run_dir, model, state, world)
    lacks_validation = _lacks_validation(config, run_dir, state.step, world)
    reporters = open_reporters(config, run_dir, after_step=state.step) if world.rank == 0 else []

    def validate() -> Validation:
        found = material.validate(model, config, world)
        if best is not None:
            best.offer(found, state)
        return found

    if config.train.compile and world.size == 1:  # `parallelize` compiles the layers of a shared model
        model.compile()
    saver = CheckpointSaver(
        run_dir / "checkpoints",
        model=model,
        optimizer=optimizer,
        config_yaml=to_yaml(config),
        tokenizer=material.tokenizer,
        keep_last=config.train.keep_last,
        keep_every=config.train.keep_every,
        world=world,
        in_background=config.train.async_save,
    )
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        loader=loader,
        config=config,
        state=state,
        flops_per_token=flops_per_token(config.model, config.seq_len).training,
        reporters=reporters,
        validate=validate,
        save=saver.save,
        world=world,
    )
    try:
        with saver:
            if config.tune is not None and state.step == 0:
                _record_before(config, material, run_dir, model, world)
            if lacks_validation:
                trainer.report_validation()
            finished = trainer.run()
        if finished and best is not None:
            validate()  # the last step is a candidate too
            load_weights(best.folder, model=model, world=world)
        return trainer.stopped_by
    finally:
        for reporter in reporters:
            reporter.close()


def _lacks_validation(config: RunConfig, run_dir: Path, step: int, world: World) -> bool:
    """Whether metrics.jsonl lacks the validation of `step`, after which training begins.

    Tuning begins with a validation, and a run may have stopped between a step's checkpoint and its validation.
    """
    if step == 0:
        return config.tune is not None
    every = config.eval.every
    if every is None or step % every > 0 or step == config.train.num_steps:
        return False

    def lacks() -> bool:
        path = run_dir / "metrics.jsonl"
        records = stream_metrics(path) if path.exists() else ()
        return not any("validation" in record and record["step"] == step for record in records)

    return world.on_first(lacks)


def _record_before(config: RunConfig, material: Material, run_dir: Path, model: Transformer, world: World) -> None:
    """Write before.json: the results of the untuned model, the baseline for tuning."""
    found = material.results(model, config, world)
    if world.rank == 0:
        write_aside(run_dir / "before.json", json.dumps(found, indent=1))


def _best_checkpoint(
    config: RunConfig, material: Material, run_dir: Path, model: Transformer, state: TrainState, world: World
) -> BestCheckpoint | None:
    if config.tune is None or config.tune.keep_best is None:
        return None
    saver = CheckpointSaver(
        run_dir / "best",
        model=model,
        optimizer=None,
        config_yaml=to_yaml(config),
        tokenizer=material.tokenizer,
        keep_last=1,
        world=world,
    )
    return BestCheckpoint(saver, config.tune.keep_best, run_dir / "metrics.jsonl", state, world)


def _start_from(path: Path, config: RunConfig, model: Transformer, tokenizer: Tokenizer, world: World) -> None:
    """Load another run's weights into `model`, whose tokenizer must be the same.

    If they compute another function here, that may be intended (a RunConfig does not know what was typed): only warn.
    """
    if load_tokenizer(path).hash != tokenizer.hash:
        raise ValueError(
            f"init_from {path} was trained with another tokenizer: its embeddings would stand for other tokens here. "
            f"Set data.tokenizer={find_checkpoint(path)}"
        )
    load_weights(path, model=model, world=world)
    changes = {} if config.tune is not None else function_changes(load_config(path).model, config.model)
    if changes and world.rank == 0:
        here = ", ".join(f"{key}={new}" for key, (_, new) in changes.items())
        there = " ".join(f"{key}={old}" for key, (old, _) in changes.items())
        say(
            f"warning: with {here} the weights of init_from {path} compute another function than there; "
            f"unless you mean that, add {there}"
        )


def _resume(
    config: RunConfig, run_dir: Path, model: Transformer, optimizer: torch.optim.Optimizer, world: World
) -> TrainState:
    checkpoint = world.on_first(lambda: find_checkpoint(run_dir))
    state = load_checkpoint(checkpoint, model=model, optimizer=optimizer, world=world)
    if world.rank == 0:
        say(f"continuing {run_dir} after step {state.step} of {config.train.num_steps}")
    return state


def _finish(
    config: RunConfig, material: Material, run_dir: Path, model: Transformer, state: TrainState, world: World
) -> None:
    """Score the held-out data, write samples.txt and, last, results.json: its presence means complete."""
    found = material.results(model, config, world)
    documents = found.pop("documents", None)
    samples = sample_texts(model, material.tokenizer, config.eval, seed=config.seed, world=world)
    peak_memory = int(max(world.gather(_peak_memory(world.device))))
    if world.rank > 0:
        return
    write_aside(run_dir / "samples.txt", "\n\n".join(samples) + "\n")
    if documents is not None:
        write_aside(run_dir / "documents.json", json.dumps(documents))
    params = count_params(config.model)
    flops = flops_per_token(config.model, config.seq_len)
    results = {
        "total_params": params.total,
        "active_params": params.active,
        "forward_flops_per_token": flops.forward,
        "training_flops_per_token": flops.training,
        "training_flops": state.flops,
        "steps": state.step,
        "tokens": state.tokens,
        "skipped_steps": state.skipped_steps,
        "seconds": state.seconds,
        "tokens_per_second": state.tokens / state.seconds,
        "peak_memory_bytes": peak_memory,  # maximum over processes
        **found,
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "num_processes": world.size,
    }
    write_aside(run_dir / "results.json", json.dumps(results, indent=1))


_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux


def _peak_memory(device: torch.device) -> torch.Tensor:
    """Peak bytes: of the process on a CPU, of the allocator on a GPU."""
    if device.type == "cuda":
        return torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
    return torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT)


def _summarise(config: RunConfig, run_dir: Path) -> None:
    if config.tune is None:
        print_summary(run_dir)
    else:
        print_tuning_summary(run_dir)


def _with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The configuration with model.vocab_size set, checked against the tokenizer."""
    size = tokenizer.vocab_size
    if config.model.vocab_size is None:
        return replace(config, model=replace(config.model, vocab_size=size))
    if size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {size} tokens but model.vocab_size is {config.model.vocab_size}; "
            f"set model.vocab_size to at least {size} or null"
        )
    return config
