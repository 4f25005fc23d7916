"""The data of pretraining: a text corpus, its batches and its held-out splits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moe.config import DataConfig, RunConfig
from moe.console import say
from moe.data import sampling
from moe.data.loader import EvaluationWindows, TrainLoader
from moe.data.prepare import PreparedCorpus, prepare
from moe.data.shards import TokenShard
from moe.distributed.world import World
from moe.evaluation.perplexity import SplitScore, evaluate
from moe.model import Transformer
from moe.training.metrics import Validation

EVALUATION_BATCH_SIZE = 64  # sequences, for larger expert GEMMs; no figure depends on it, as nothing is dropped


class Text:
    """A corpus as the data of a run (moe.run.Material). All ranks of `world` must create one."""

    def __init__(self, config: DataConfig, world: World) -> None:
        self.corpus: PreparedCorpus = world.first_here_first(lambda: prepare(config))
        self.tokenizer = self.corpus.tokenizer

    def identity(self) -> dict[str, str]:
        """Hashes that must match for a run to be continued."""
        return self.corpus.identity()

    def loader(self, config: RunConfig, run_dir: Path, world: World) -> TrainLoader:
        """The training batches. With data.mixture.alpha, prints and saves how much of each domain the run will read."""
        plans = self.corpus.mixture(config.data.mixture, config.train.num_steps * config.train.batch_tokens)
        if plans and world.rank == 0:
            say(sampling.table(plans))
            write_aside(run_dir / "mixture.json", json.dumps([source._asdict() for source in plans], indent=1))
        return TrainLoader(
            self.corpus.train,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            document_attention=config.data.document_attention,
            micro_batch_size=config.train.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            shares={source.name: source.share for source in plans} or None,
            replacement=config.data.mixture.replacement,
        )

    def validate(self, model: Transformer, config: RunConfig, world: World) -> Validation:
        """Figures for each domain of the validation split, over at most eval.max_tokens of each."""
        score = _evaluate(model, self.corpus.validation, config, config.eval.max_tokens, world)
        return {domain: figures._asdict() for domain, figures in score.domains.items()}

    def results(self, model: Transformer, config: RunConfig, world: World) -> dict[str, Any]:
        """Scores of both held-out splits, those of compressors, and the losses of each test document."""
        splits: dict[str, Any] = {}
        documents: dict[str, Any] = {}
        for name in ("validation", "test"):
            score = _evaluate(model, getattr(self.corpus, name), config, None, world)
            splits[name] = {
                "domains": {domain: figures.figures() for domain, figures in score.domains.items()},
                "dead_experts": score.dead_experts if score.tokens_per_expert else None,
                "tokens_per_expert": score.tokens_per_expert,
                "tokens_per_expert_of_domains": score.expert_tokens if score.tokens_per_expert else {},
            }
            documents[name] = {domain: losses._asdict() for domain, losses in score.documents.items()}
        return {"splits": splits, "compressors": self.corpus.compressors, "documents": {"test": documents["test"]}}


def write_aside(path: Path, text: str) -> None:
    """Replace a file atomically: it is either the old one or the complete new one."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


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
