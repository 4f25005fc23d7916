"""The global load-balance loss over real gloo processes, and biases that stay equal on all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe.distributed.world import end_process
from moe.layers import TopKRouter, load_balance_loss
from moe.layers.initialization import WeightInit

D, E, LENGTHS = 6, 5, (7, 12)  # tokens of each rank, some of them masked


def tokens(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(LENGTHS[rank], D, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return x, torch.arange(LENGTHS[rank]) % 3 != rank


def router() -> TopKRouter:
    made = TopKRouter(D, E, bias_balanced=True, dtype=torch.float64)
    made.reset_parameters(seed=0, init=WeightInit(std=0.8))
    return made


def work(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", len(LENGTHS))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(LENGTHS))
    made, (x, mask) = router(), tokens(rank)
    result: dict[str, object] = {}
    for choices in ("all", "first"):
        routing = made(x, mask)
        loss = load_balance_loss(routing, choices=choices, scope="global", group=dist.group.WORLD)
        share = int(mask.sum()) / sum(int(tokens(r)[1].sum()) for r in range(len(LENGTHS)))
        (gradient,) = torch.autograd.grad(loss * share, made.weight)
        dist.all_reduce(gradient)
        result[choices] = (loss.detach(), gradient)
    made.update_bias([made(x, mask)], rate=0.5, group=dist.group.WORLD)
    result["bias"] = made.expert_bias
    torch.save(result, f"{folder}/{rank}.pt")
    end_process()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=len(LENGTHS))
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(LENGTHS))]


@pytest.mark.parametrize("choices", ["all", "first"])
def test_value_and_gradient_are_those_of_one_process(results: list[dict], choices: str) -> None:
    made = router()
    parts = [tokens(rank) for rank in range(len(LENGTHS))]
    routing = made(torch.cat([x for x, _ in parts]), torch.cat([mask for _, mask in parts]))
    expected = load_balance_loss(routing, choices=choices)
    (gradient,) = torch.autograd.grad(expected, made.weight)
    for result in results:
        loss, summed = result[choices]
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(summed, gradient, rtol=1e-10, atol=1e-13)
    local = load_balance_loss(made(*parts[0]), choices=choices)
    assert float(local.detach()) != pytest.approx(float(expected.detach()), rel=1e-3)  # the scope matters here


def test_biases_move_alike_by_the_load_of_all(results: list[dict]) -> None:
    made = router()
    made.update_bias([made(*tokens(rank)) for rank in range(len(LENGTHS))], rate=0.5)
    assert made.expert_bias.any()
    assert all(torch.equal(result["bias"], made.expert_bias) for result in results)


def test_a_group_is_named_and_never_assumed() -> None:
    routing = router()(tokens(0)[0])
    with pytest.raises(ValueError, match="scope='global' needs a group"):
        load_balance_loss(routing, scope="global")
