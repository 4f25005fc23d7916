"""Gradients in memory that is used again are the gradients that fresh memory would hold, whatever is done with them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe.distributed.world import end_process
from moe.kernels.expert_ffn import GradientMemory
from moe.layers import MoE
from moe.layers.initialization import WeightInit

D, FF, E = 6, 10, 5
WEIGHTS = ("w_in", "w_gate", "w_out")


def layer(*, persistent: bool) -> MoE:
    made = MoE(D, FF, E, gated=True, bias=True)
    made.reset_parameters(seed=0, init=WeightInit(std=0.7))
    made.experts.persistent_grad(persistent)
    return made


def inputs(step: int) -> Tensor:
    return torch.randn(9, D, generator=torch.Generator().manual_seed(step))


def addresses(made: MoE) -> list[int]:
    return [getattr(made.experts, name).grad.data_ptr() for name in WEIGHTS]


def plain(made: MoE, step: int) -> None:
    made(inputs(step))[0].square().sum().backward()


def accumulated(made: MoE, step: int) -> None:
    for micro_batch in range(3):
        made(inputs(3 * step + micro_batch))[0].square().sum().backward()


def twice_in_one_graph(made: MoE, step: int) -> None:
    made(made(inputs(step))[0])[0].square().sum().backward()


def twice_through_one_graph(made: MoE, step: int) -> None:
    loss = made(inputs(step))[0].square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def mixed(use: Callable[[MoE, int], None]) -> Callable[[MoE, int], None]:
    """`use` in mixed precision, where the matrices in bfloat16 have such memory too."""

    def run(made: MoE, step: int) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            use(made, step)

    return run


def with_updates_between(made: MoE, step: int) -> None:
    """A forward that somebody else keeps must not see the weights of the next."""
    kept = made(inputs(step))[0]
    with torch.no_grad():
        made.experts.w_in.mul_(0.5)
    plain(made, step + 1)
    with torch.no_grad():
        made.experts.w_in.mul_(2.0)
    kept.square().sum().backward()


USES = [plain, accumulated, twice_in_one_graph, twice_through_one_graph]
MIXED = {f"mixed {use.__name__}": mixed(use) for use in (*USES, with_updates_between)}


@pytest.mark.parametrize("use", [*USES, *MIXED.values()], ids=[*(use.__name__ for use in USES), *MIXED])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_every_step_has_the_gradients_of_fresh_memory(use: Callable[[MoE, int], None], set_to_none: bool) -> None:
    ours, fresh = layer(persistent=True), layer(persistent=False)
    for step in range(4):
        for made in (ours, fresh):
            made.zero_grad(set_to_none=set_to_none)
            use(made, step)
        for (name, a), b in zip(ours.named_parameters(), fresh.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), (step, name)


@pytest.mark.parametrize("use", [plain, mixed(plain)], ids=["float32", "mixed"])
def test_memory_is_used_again(use: Callable[[MoE, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(persistent=True)
    seen, lent = [], set()
    empty_like = GradientMemory.empty_like

    def noted(self: GradientMemory, *args: Any) -> Tensor:
        memory = empty_like(self, *args)
        lent.add((memory.dtype, memory.data_ptr()))
        return memory

    monkeypatch.setattr(GradientMemory, "empty_like", noted)
    for step in range(4):
        made.zero_grad()
        _garbage = [torch.empty(FF * D * E) for _ in range(3)]  # takes what was freed, if it was
        use(made, step)
        seen.append(addresses(made))
    assert seen[0] == seen[1] == seen[2] == seen[3]
    dtypes = [torch.float32] * 3 + ([] if use is plain else [torch.bfloat16] * 3)
    assert sorted(map(str, dtypes)) == sorted(str(dtype) for dtype, _ in lent)


def test_a_gradient_that_somebody_keeps_stays_as_it_is() -> None:
    made = layer(persistent=True)
    plain(made, 0)
    kept = made.experts.w_in.grad
    before = kept.clone()
    made.zero_grad()
    plain(made, 1)
    assert torch.equal(kept, before)
    assert not torch.equal(made.experts.w_in.grad, before)
    (gradient,) = torch.autograd.grad(made(inputs(2))[0].square().sum(), made.experts.w_in)
    copied = gradient.clone()
    plain(made, 3)
    assert torch.equal(gradient, copied)


def test_copies_have_memory_of_their_own() -> None:
    made = layer(persistent=True)
    plain(made, 0)
    made.zero_grad()
    other = copy.deepcopy(made)
    plain(made, 0)
    plain(other, 1)
    assert not set(addresses(made)) & set(addresses(other))
    fresh = layer(persistent=False)
    plain(fresh, 0)
    assert torch.equal(made.experts.w_out.grad, fresh.experts.w_out.grad)
    stored = pickle.loads(pickle.dumps(made))  # pickled by us a line above
    assert stored.experts.w_in.shape == made.experts.w_in.shape
    assert "memory" not in "".join(made.state_dict())


def test_another_dtype_gets_another_block() -> None:
    made = layer(persistent=True)
    plain(made, 0)
    made.zero_grad()
    made.double()(inputs(0).double())[0].square().sum().backward()
    assert made.experts.w_in.grad.dtype == torch.float64


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    results = {}
    for kind in ("ddp", "fsdp2"):
        for persistent in (True, False):
            made: nn.Module = layer(persistent=persistent)
            made = DistributedDataParallel(made) if kind == "ddp" else fully_shard(made)
            optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
            for step in range(3):
                optimizer.zero_grad()
                made(inputs(2 * step + rank))[0].square().mean().backward()
                optimizer.step()
            tensors = [p.full_tensor() if kind == "fsdp2" else p.detach() for p in made.parameters()]
            results[kind, persistent] = torch.cat([tensor.flatten() for tensor in tensors])
    buffer = io.BytesIO()
    torch.save(results, buffer)
    Path(folder, f"{rank}.pt").write_bytes(buffer.getvalue())
    end_process()


def test_data_parallel_and_sharded_training_are_unchanged(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind in ("ddp", "fsdp2"):
        assert torch.equal(results[0][kind, True], results[0][kind, False])
        assert torch.equal(results[0][kind, True], results[1][kind, True])
    torch.testing.assert_close(results[0]["ddp", True], results[0]["fsdp2", True], rtol=1e-5, atol=1e-6)
