"""What a tuning run trains and is evaluated on: the examples of a benchmark, or the questions of one task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.checkpoint import find_checkpoint, list_checkpoints, load_config, load_tokenizer
from moe.config import RunConfig, TuneConfig
from moe.console import say
from moe.data.loader import TrainLoader
from moe.data.prepare import PreparedCorpus, cache_dir, prepare
from moe.data.tokenizer import Tokenizer
from moe.distributed.world import World
from moe.evaluation.results import bootstrap
from moe.evaluation.scorer import BATCH_TOKENS
from moe.instruct.benchmark import Benchmark
from moe.instruct.encoded import encode_benchmark, make_once
from moe.instruct.examples import ExampleStore, TaskInfo, write_examples
from moe.instruct.finetuning import Question, TaskQuestions, accuracy, read_task
from moe.instruct.loader import InstructionLoader
from moe.instruct.mixing import Task, choose_tasks, task_shares
from moe.instruct.tuning_report import mixture_table, packing_facts
from moe.instruct.validation import Figures, by_group, by_task, target_losses
from moe.model import Transformer


class Tuning:
    """Everything in a run that differs from pretraining (moe.run)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        train: ExampleStore,
        validation: ExampleStore,
        tune: TuneConfig,
        *,
        dropped: dict[str, int] | None = None,
        questions: TaskQuestions | None = None,
        text: PreparedCorpus | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.train = train
        self.validation = validation
        self.tune = tune
        self.dropped = {} if dropped is None else dropped
        self.questions = questions
        self.text = text

    def identity(self) -> dict[str, str]:
        """What must be unchanged when a run resumes."""
        hashes = {"tokenizer": self.tokenizer.hash, "train": self.train.sha256, "validation": self.validation.sha256}
        return hashes if self.text is None else hashes | {"text": self.text.train.sha256}

    @property
    def shares(self) -> list[float]:
        """Share of each training task."""
        tasks = [
            Task(task.name, task.benchmark, task.category, int(size))
            for task, size in zip(self.train.tasks, self.train.sizes, strict=True)
        ]
        return task_shares(
            tasks,
            eta=self.tune.eta,
            benchmark_shares=self.tune.benchmark_shares,
            extra_shares=self.tune.extra_shares,
        )

    def loader(self, config: RunConfig, run_dir: Path, world: World) -> InstructionLoader:
        """The training batches. A summary of what the run will read is printed and saved in mixture.json."""
        text = None
        if self.text is not None:
            text = TrainLoader(
                self.text.train,
                seq_len=config.seq_len,
                batch_size=1,
                seed=config.seed,
                document_attention=config.data.document_attention,
            )
        loader = InstructionLoader(
            self.train,
            self.shares,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            text=text,
            text_share=self.tune.pretraining_share,
            micro_batch_size=config.train.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
        )
        if world.rank == 0:
            report = loader.report(config.train.num_steps)
            say(mixture_table(report))
            (run_dir / "mixture.json").write_text(
                json.dumps(packing_facts(report) | {"dropped": self.dropped}, indent=1)
            )
        return loader

    def validate(self, model: Transformer, config: RunConfig, world: World) -> Figures:
        """Metrics over all held-out examples, each level and each category; for a single task its accuracy too."""
        most = config.eval.max_tokens
        figures = by_group(self.validation, self._losses(model, config, world, most))
        if self.questions is not None:
            figures["all"]["accuracy"] = self._accuracy(model, _first(self.questions.held_out, most), config, world)[0]
        return figures

    def results(self, model: Transformer, config: RunConfig, world: World) -> dict[str, Any]:
        """The entries of results.json: all held-out examples and, for a single task, the reported split."""
        sums = self._losses(model, config, world, None)
        found: dict[str, Any] = {
            "validation": {"groups": by_group(self.validation, sums), "tasks": by_task(self.validation, sums)}
        }
        if self.questions is not None:
            for name, questions in (("held_out", self.questions.held_out), ("evaluation", self.questions.evaluation)):
                value, credits = self._accuracy(model, questions, config, world)
                found[name] = bootstrap(credits, seed=config.seed)._asdict() | {"accuracy": value}
            found["evaluation"]["chance"] = self.questions.chance
        return found

    def _losses(self, model: Transformer, config: RunConfig, world: World, most: int | None) -> Any:
        return target_losses(
            model,
            self.validation,
            seq_len=config.seq_len,
            max_positions=most,
            precision=_precision(config, world),
            world=world,
        )

    def _accuracy(
        self, model: Transformer, questions: Sequence[Question], config: RunConfig, world: World
    ) -> tuple[float, list[float]]:
        found = accuracy(model, questions, batch_tokens=BATCH_TOKENS, precision=_precision(config, world), world=world)
        return found.value, list(found.credits)


def open_tuning(config: RunConfig, world: World) -> Tuning:
    """Read, encode and store what `config.tune` names; `config` comes from `tuned_config` or `continued_config`.

    Raises ValueError for unreadable data, examples that do not fit, and shares that do not match the tasks.
    """
    tune = config.tune
    assert tune is not None
    own = checkpoint_to_continue(config)
    source = config.init_from if own is None else str(own)
    assert source is not None
    tokenizer = load_tokenizer(source)
    text = None
    if tune.pretraining_share > 0:
        text = world.first_here_first(
            lambda: prepare(replace(config.data, tokenizer=str(find_checkpoint(Path(source)))))
        )
    if tune.task is not None:
        return _open_task(config, tokenizer, world, text)
    assert tune.benchmark is not None
    folder = Path(tune.benchmark)
    world.on_first(lambda: Benchmark(folder, verify=False).verify())
    benchmark = Benchmark(folder, verify=False)
    tasks = training_tasks(benchmark, tune, config.seed)
    encoded = world.first_here_first(
        lambda: encode_benchmark(
            benchmark,
            tasks,
            tokenizer,
            tune,
            seq_len=config.seq_len,
            seed=config.seed,
            cache=cache_dir(config.data),
        )
    )
    opened = Tuning(tokenizer, encoded.train, encoded.validation, tune, dropped=encoded.dropped, text=text)
    _require_examples(opened)
    return opened


def checkpoint_to_continue(config: RunConfig) -> Path | None:
    """The newest checkpoint of the tuning run that a command with its run_dir continues; None if there is none.

    It has everything that `init_from` gave the run. Without run_dir a run's folder is named by what is in its source.
    """
    found = [] if config.run_dir is None else list_checkpoints(Path(config.run_dir) / "checkpoints")
    if not found:
        return None
    stored = load_config(found[-1])
    return found[-1] if stored.tune is not None and stored.init_from == config.init_from else None


def continued_config(config: RunConfig, checkpoint: Path) -> RunConfig:
    """Like `moe.instruct.adaptation.tuned_config`, from a checkpoint of the run itself."""
    stored = load_config(checkpoint)
    names = ("tokenizer", "text_format", "allow_lossy_tokenizer")
    data = replace(config.data, **{name: getattr(stored.data, name) for name in names})
    return replace(config, model=stored.model, data=data)


def training_tasks(benchmark: Benchmark, tune: TuneConfig, seed: int) -> list[str]:
    """The names of the training tasks of this run."""
    tasks = [Task(entry.task, entry.benchmark, entry.category, entry.records) for entry in benchmark.tasks("train")]
    supervised = {
        entry.task for split in ("validation", "test") for entry in benchmark.tasks(split) if entry.level == 3
    }
    return choose_tasks(
        tasks,
        num_tasks=tune.num_tasks,
        num_categories=tune.num_categories,
        always=sorted(supervised),
        always_categories=tune.always_categories,
        seed=seed,
    )


def _open_task(config: RunConfig, tokenizer: Tokenizer, world: World, text: PreparedCorpus | None) -> Tuning:
    tune = config.tune
    assert tune is not None
    assert tune.task is not None
    task = tune.task
    questions = read_task(task, tokenizer, seq_len=config.seq_len, seed=config.seed)
    info = TaskInfo(task.name, task.protocol, "", "")
    parts = {
        name: [
            (question.example(tokenizer.eos_id, tune.loss_on), question.counted_bytes(tune.loss_on))
            for question in chosen
        ]
        for name, chosen in (("train", questions.train), ("validation", questions.held_out))
    }
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        for name, examples in parts.items():
            write_examples(folder / name, tokenizer.vocab_size, [(info, examples)])

    folder = world.first_here_first(lambda: make_once(cache_dir(config.data) / f"task-{digest}", write))
    train, held_out = (ExampleStore(folder / name) for name in parts)
    return Tuning(tokenizer, train, held_out, tune, questions=questions, text=text)


def _require_examples(tuning: Tuning) -> None:
    for name, store in (("train", tuning.train), ("validation", tuning.validation)):
        if len(store) == 0:
            raise ValueError(
                f"the {name} split has no example: the benchmark has none, or none fits the context (tune.long_targets)"
            )
    empty = [task.name for task, size in zip(tuning.train.tasks, tuning.train.sizes, strict=True) if size == 0]
    if empty:
        raise ValueError(f"no example of {empty[0]} fits the context: raise data.seq_len, or leave the task out")


def _first(questions: Sequence[Question], most: int | None) -> Sequence[Question]:
    """The first questions up to `most` positions, at least one."""
    if most is None:
        return questions
    used = 0
    for count, question in enumerate(questions):
        used += question.positions
        if used >= most:
            return questions[: count + 1]
    return questions


def _precision(config: RunConfig, world: World) -> str:
    """The autocast precision: with several ranks FSDP2 does the casting, so it is off."""
    return config.train.precision if world.size == 1 else "fp32"
