"""An evaluation that ranks share, as copies of a model and as parts of one."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("rouge_score", reason="ROUGE-L is rouge-score's (extra `eval`)")

from moe.data.tokenizer import StreamDecoder
from moe.distributed.world import World
from moe.instruct.evaluation import Evaluated, EvaluationSettings, EvaluationTask, Protocol, evaluate_tasks
from moe.model import Transformer
from tests.moe.distributed.contract import VOCABULARY, Case, MeshesOf
from tests.moe.distributed.contract import build as build_model
from tests.moe.instruct.conftest import record
from tests.ranks import run_ranks


class Letters:
    """A token for each letter; 0 separates."""

    eos_id = begin_id = 0
    vocab_size = VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [1 + ord(letter) % (VOCABULARY - 1) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(97 + token % 26) for token in tokens)

    def stream_decoder(self) -> Any:
        return StreamDecoder(self)


def evaluated(world: World | None, model: Transformer) -> Evaluated:
    rows = [record("", "y" * (1 + i % 3), style="keyword", instruction=f"{i}:", example=f"{i}") for i in range(5)]
    ranked = [row._replace(candidates=(row.targets[0], "zz")) for row in rows]
    tasks = [EvaluationTask(f"b/{name}", "b", "QA", 1, r, r) for name, r in (("ranked", ranked), ("written", rows))]
    protocol = Protocol("test", num_shots=(0,), max_new_tokens=3)
    settings = EvaluationSettings(protocol, batch_tokens=12)
    return evaluate_tasks(model, Letters(), tasks, settings, world=world)


def program(world: World) -> tuple[Evaluated, Evaluated]:
    copies = evaluated(world, build_model(Case(1), None))
    case = Case(world.size, ep=2)
    return copies, evaluated(world, build_model(case, MeshesOf(world)(case)))


def test_ranks_share_the_work_and_agree() -> None:
    """Copies of a model, and one model in parts, against one process."""
    alone = evaluated(None, build_model(Case(1), None))
    for copies, parts in run_ranks(program, 2):
        assert copies == alone
        assert [s["answer"] for s in parts.samples] == [s["answer"] for s in alone.samples]
        for name, entry in alone.results["tasks"].items():
            assert parts.results["tasks"][name]["series"]["loss"]["sums"] == pytest.approx(
                entry["series"]["loss"]["sums"], rel=1e-5
            )
