"""The composition root: builds a run in data-flow order and hands validators and savers to the trainer as callables."""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe.checkpoint import (
    CheckpointSaver,
    TrainState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_tokenizer,
    load_weights,
)
from moe.compose import config_hash, differences, from_yaml, to_yaml
from moe.config import RunConfig
from moe.data.loader import EvaluationWindows, TrainLoader
from moe.data.prepare import PreparedCorpus, prepare
from moe.data.shards import TokenShard
from moe.distributed.mesh import make_meshes
from moe.distributed.parallelize import parallelize
from moe.distributed.world import World, end_process, open_world
from moe.dry_run import dry_run, report_folder, write_report
from moe.evaluation.perplexity import SplitScore, evaluate
from moe.generation import continue_texts
from moe.layers.experts import Experts
from moe.model import Transformer
from moe.scaling.flops import flops_per_token
from moe.scaling.memory import memory_bound
from moe.scaling.params import count_params
from moe.summary import print_summary
from moe.training.allocator import keep_freed_memory
from moe.training.metrics import MetricsFile, Validation
from moe.training.optimizer import make_optimizer
from moe.training.progress import Progress
from moe.training.tensorboard import TensorBoard
from moe.training.trainer import Reporter, Trainer

EVALUATION_BATCH_SIZE = 64  # sequences: larger GEMMs for the experts; no figure depends on it, nothing is dropped


def main(configs: list[RunConfig]) -> None:
    """The program behind `train.py` and `moe train`: each run in turn. Of several processes it does not return."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    try:
        for config in configs:
            train(config)
    except (ValueError, OSError) as error:
        if alone:
            raise
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        end_process(1)
    if not alone:
        end_process()


def train(config: RunConfig) -> Path:
    """Train, validate and sample one model, or continue it, or say that it is complete. Returns its run folder.

    Under torchrun every process calls this; together they train the one model.
    """
    if config.parallel.dry_run:
        return write_report(dry_run(config), report_folder(config))
    world = open_world(config.device, timeout_seconds=config.parallel.timeout_seconds)
    run_dir = _train(config, world)
    world.close()  # not after an error: the others may be waiting, and torchrun ends them
    return run_dir


def _train(config: RunConfig, world: World) -> Path:
    if config.train.keep_freed_memory and world.device.type == "cpu":
        keep_freed_memory()
    corpus = world.first_here_first(lambda: prepare(config.data))
    config = _with_vocabulary(config, corpus)
    run_dir = world.on_first(lambda: open_run_folder(config, corpus))
    if world.on_first(lambda: (run_dir / "results.json").exists()):
        if world.rank == 0:
            print(f"{run_dir} is complete: delete it to train again")  # noqa: T201
            print_summary(run_dir)
        return run_dir
    if world.rank == 0 and config.parallel.ep_size > 1:
        print(memory_bound(config, world.size), file=sys.stderr)  # noqa: T201
    model = build_model(config, world)
    if config.init_from is not None:
        _start_from(Path(config.init_from), model, corpus, world)
    optimizer = make_optimizer(model, config.optim)
    state = _resume(config, run_dir, model, optimizer, world)
    if fit(config, corpus, run_dir, model, optimizer, state, world):
        _finish(config, corpus, run_dir, model, state, world)
        if world.rank == 0:
            print_summary(run_dir)
    return run_dir


def build_model(config: RunConfig, world: World) -> Transformer:
    """The model with its first weights, of several ranks on each its shards alone."""
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
            setattr(module, name, buffer.to(world.device))  # offloading is for parameters
    model.reset_parameters(config.seed)
    if world.size == 1:
        for module in model.modules():
            if isinstance(module, Experts):
                module.persistent_grad(config.train.keep_freed_memory and world.device.type == "cpu")
    return model


def fit(
    config: RunConfig,
    corpus: PreparedCorpus,
    run_dir: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    world: World,
) -> bool:
    """Train from `state` on. False if a signal ended it early, with everything saved."""
    loader = TrainLoader(
        corpus.train,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        document_attention=config.data.document_attention,
        micro_batch_size=config.train.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    reporters = _reporters(config, run_dir, state.step) if world.rank == 0 else []

    def validate() -> Validation:
        score = _evaluate(model, corpus.validation, config, config.eval.max_tokens, world)
        return {domain: figures._asdict() for domain, figures in score.domains.items()}

    if config.train.compile and world.size == 1:  # `parallelize` compiles the layers of a shared model
        model.compile()
    saver = CheckpointSaver(
        run_dir / "checkpoints",
        model=model,
        optimizer=optimizer,
        config_yaml=to_yaml(config),
        tokenizer=corpus.tokenizer,
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
            return trainer.run()
    finally:
        for reporter in reporters:
            reporter.close()


def _reporters(config: RunConfig, run_dir: Path, after_step: int) -> list[Reporter]:
    metrics_path = run_dir / "metrics.jsonl"
    return [
        MetricsFile(metrics_path, after_step=after_step),
        TensorBoard(run_dir / "tensorboard", metrics_path, after_step=after_step),
        Progress(first_step=after_step, num_steps=config.train.num_steps),
    ]


def _start_from(path: Path, model: Transformer, corpus: PreparedCorpus, world: World) -> None:
    """Put another run's weights into `model`, whose tokens must mean the same."""
    if load_tokenizer(path).hash != corpus.tokenizer.hash:
        raise ValueError(
            f"init_from {path} was trained with another tokenizer: its embeddings would stand for other tokens here. "
            f"Set data.tokenizer={find_checkpoint(path)}"
        )
    load_weights(path, model=model, world=world)


def open_run_folder(config: RunConfig, corpus: PreparedCorpus) -> Path:
    """The run's folder, made with its config.yaml and corpus.json, or checked to be of this very run."""
    run_dir = Path(config.run_dir) if config.run_dir is not None else Path("runs") / run_name(config)
    config_file, corpus_file = run_dir / "config.yaml", run_dir / "corpus.json"
    identity = corpus.identity()
    if not run_dir.exists() or not any(run_dir.iterdir()):
        run_dir.mkdir(parents=True, exist_ok=True)
        corpus_file.write_text(json.dumps(identity, indent=1))
        _write_aside(config_file, to_yaml(config))  # last: a folder with a config is a run
        return run_dir
    if not config_file.exists():
        raise ValueError(f"run_dir {run_dir} holds other files and no config.yaml; choose an empty or a new folder")
    changed = differences(from_yaml(config_file.read_text()), config)
    stored = json.loads(corpus_file.read_text())
    changed += [f"{key}: {stored[key]} != {identity[key]}" for key in identity if stored.get(key) != identity[key]]
    if changed:
        raise ValueError(
            f"run_dir {run_dir} holds another run; it differs in {'; '.join(changed)}. "
            f"Choose another run_dir, or give the values of that run to continue it"
        )
    if config.resume == "never" and list_checkpoints(run_dir / "checkpoints"):
        raise ValueError(f"run_dir {run_dir} holds this run and resume=never; use resume=auto or another folder")
    return run_dir


def run_name(config: RunConfig) -> str:
    """<model>-<moe>-s<seed>-<hash>: equal configurations share a folder, different ones never do."""
    moe = "dense" if config.model.moe is None else config.model.moe.name
    return f"{config.model.name}-{moe}-s{config.seed}-{config_hash(config)[:8]}"


def _resume(
    config: RunConfig, run_dir: Path, model: Transformer, optimizer: torch.optim.Optimizer, world: World
) -> TrainState:
    if world.on_first(lambda: not list_checkpoints(run_dir / "checkpoints")):
        return TrainState()
    checkpoint = world.on_first(lambda: find_checkpoint(run_dir))
    state = load_checkpoint(checkpoint, model=model, optimizer=optimizer, world=world)
    if world.rank == 0:
        print(f"continuing {run_dir} after step {state.step} of {config.train.num_steps}", file=sys.stderr)  # noqa: T201
    return state


def _finish(
    config: RunConfig, corpus: PreparedCorpus, run_dir: Path, model: Transformer, state: TrainState, world: World
) -> None:
    """Score both held-out splits, write samples.txt and, last, results.json: its presence means complete."""
    splits: dict[str, Any] = {}
    for name in ("validation", "test"):
        score = _evaluate(model, getattr(corpus, name), config, None, world)
        splits[name] = {
            "domains": {domain: figures._asdict() for domain, figures in score.domains.items()},
            "dead_experts": score.dead_experts if score.tokens_per_expert else None,
            "tokens_per_expert": score.tokens_per_expert,
        }
    prompts = config.eval.prompts or [""]
    texts = continue_texts(
        model,
        corpus.tokenizer,
        prompts,
        config.eval.sample_tokens,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        seed=config.seed,
        world=world,
    )
    peak_memory = int(max(world.gather(_peak_memory(world.device))))
    if world.rank > 0:
        return
    samples = "\n\n".join(f"=== {prompt!r}\n{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True))
    _write_aside(run_dir / "samples.txt", samples + "\n")
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
        "peak_memory_bytes": peak_memory,  # of the fullest process
        "splits": splits,
        "compressors": corpus.compressors,
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "num_processes": world.size,
    }
    _write_aside(run_dir / "results.json", json.dumps(results, indent=1))


_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux


def _peak_memory(device: torch.device) -> torch.Tensor:
    """Bytes: the process's on a CPU, the allocator's on a GPU."""
    if device.type == "cuda":
        return torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
    return torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT)


def _evaluate(
    model: Transformer, shard: TokenShard, config: RunConfig, max_tokens: int | None, world: World
) -> SplitScore:
    windows = [
        EvaluationWindows(
            shard,
            domain,
            seq_len=config.seq_len,
            batch_size=EVALUATION_BATCH_SIZE,
            max_tokens=max_tokens,
            document_attention=config.data.document_attention,
        )
        for domain in shard.domains
    ]
    # FSDP2 casts what it gathers
    precision = config.train.precision if world.size == 1 else "fp32"
    return evaluate(model, windows, precision=precision, world=world)


def _with_vocabulary(config: RunConfig, corpus: PreparedCorpus) -> RunConfig:
    """The configuration with model.vocab_size set, checked against the tokenizer."""
    size = corpus.tokenizer.vocab_size
    if config.model.vocab_size is None:
        return replace(config, model=replace(config.model, vocab_size=size))
    if size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {size} tokens but model.vocab_size is {config.model.vocab_size}; "
            f"set model.vocab_size to at least {size} or null"
        )
    return config


def _write_aside(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)
