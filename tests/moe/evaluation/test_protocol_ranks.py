from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.distributed.world import World
from moe.evaluation.protocols import Setting, TaskResult, prepare_task, run_task
from moe.evaluation.scorer import Request, ScoreReport, score
from moe.model import Transformer
from tests.moe.distributed.contract import SEQ_LEN, VOCABULARY, Case, MeshesOf, build
from tests.ranks import run_ranks


class Letters:
    """A token for each letter; 0 separates."""

    eos_id = begin_id = 0

    def encode(self, text: str) -> list[int]:
        return [1 + ord(letter) % (VOCABULARY - 1) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(str(token % 10) for token in tokens)


ANSWER = 9999  # what the model writes after a problem


def requests_of(num: int) -> list[Request]:
    rng = random.Random(num)
    lengths = [rng.randint(2, SEQ_LEN + 1) for _ in range(num)]
    return [Request([rng.randrange(VOCABULARY) for _ in range(length)], 1) for length in lengths]


def read(hub_id: str, subset: str | None, split: str) -> list[dict[str, Any]]:
    if hub_id == "juletxara/mgsm":  # every other problem has the answer that the model writes
        return [{"question": f"{i}", "answer": None, "answer_number": ANSWER + i % 2} for i in range(7)]
    return [{"goal": f"{i}", "sol1": "ab", "sol2": "ba", "label": i % 2} for i in range(7)]


def work(world: World | None, model: Transformer) -> tuple[ScoreReport, ScoreReport, TaskResult, TaskResult]:
    """Five batches, then one, which leaves ranks idle, then a task of each kind."""
    many = score(model, requests_of(11), greedy=True, batch_tokens=20, world=world)
    few = score(model, requests_of(1), world=world)
    settings = Setting("artetxe2021", "piqa"), Setting("xglm", "mgsm", language="sw")
    results = (run_task(model, Letters(), prepare_task(each, read), batch_tokens=20, world=world) for each in settings)
    return many, few, *results


def program(world: World) -> tuple[Any, Any]:
    copies = work(world, build(Case(1), None))
    return copies, work(world, build(Case(world.size, ep=2), MeshesOf(world)(Case(world.size, ep=2))))


def values_of(report: ScoreReport) -> Tensor:
    return torch.tensor([value for each in report.scores for value in each.log_probs])


@pytest.mark.parametrize("ranks", [2, 4])
def test_results_are_the_same_for_any_number_of_ranks(ranks: int) -> None:
    alone = work(None, build(Case(1), None))
    for copies, shared in run_ranks(program, ranks):
        assert copies == alone  # each rank has the whole model: the same batches, the same bits
        for mine, one in zip(shared[:2], alone[:2], strict=True):
            torch.testing.assert_close(values_of(mine), values_of(one))
            assert [each.greedy for each in mine.scores] == [each.greedy for each in one.scores]
        assert shared[2:] == alone[2:]
    assert alone[3].runs[0].credits == (1.0, 0.0) * 3 + (1.0,)
