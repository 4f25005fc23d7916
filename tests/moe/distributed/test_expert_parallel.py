"""Experts spread over ranks in models that are not this library's: bits, bytes, beside DDP, errors, and NaN."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import moe.layers.experts
from moe.config import ParallelConfig
from moe.distributed.all_to_all import count_traffic
from moe.distributed.expert_parallel import DispatchOptions, apply_expert_parallel
from moe.distributed.mesh import make_meshes
from moe.distributed.parallelize import parallelize
from moe.distributed.world import World
from moe.layers import MoE
from moe.layers.initialization import WeightInit
from moe.layers.routing import Routing, count_assignments
from moe.scaling.communication import all_to_all_bytes
from tests.moe.distributed.contract import Case, MeshesOf, build, rank_batch, relative_error, run_config, trainer_of
from tests.ranks import run_ranks

# widths of whole cache lines: MKL adds in another order where rows begin elsewhere
D, F, E, K = 16, 32, 8, 2
LENGTHS = {2: (7, 0), 4: (5, 0, 9, 3)}  # tokens of each rank
ROUNDING = 1e-10  # float64, of the largest entry; measured 1e-15
WAYS = {
    "flat": DispatchOptions(),
    "overlap": DispatchOptions(num_parts=2),
    "two levels": DispatchOptions(ranks_per_node=2),
    "both": DispatchOptions(ranks_per_node=2, num_parts=2),
}


def layer_of(dtype: torch.dtype = torch.float64, **options: Any) -> MoE:
    layer = MoE(D, F, E, K, bias=True, dtype=dtype, **options)
    layer.reset_parameters(seed=0, init=WeightInit(std=0.5))
    return layer


def tokens(rank: int, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, D, generator=generator, dtype=torch.float64).to(dtype)


def upstream(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    return tokens(100 + rank, count, dtype)


def routing_of(indices: Tensor) -> Routing:
    """A recorded routing with these choices (T, K), of equal weight but for the first."""
    kept = torch.ones_like(indices, dtype=torch.bool)
    weights = torch.tensor([0.75, 0.25], dtype=torch.float64).expand(indices.shape[0], K)
    logits = torch.zeros(indices.shape[0], E, dtype=torch.float64)
    counts = count_assignments(indices, kept, E)
    return Routing(logits, logits, indices, weights, kept, kept, None, None, counts)


@contextmanager
def seen_by_experts() -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Rows, offsets and outputs of every call of the experts' networks within."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    original = moe.layers.experts.expert_ffn

    def watch(rows: Tensor, offsets: Tensor, *rest: Any, **options: Any) -> Tensor:
        out = original(rows, offsets, *rest, **options)
        seen.append((rows.detach().clone(), offsets.clone(), out.detach().clone()))
        return out

    moe.layers.experts.expert_ffn = watch
    try:
        yield seen
    finally:
        moe.layers.experts.expert_ffn = original


def by_expert(seen: list[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """(rows in, rows out) of each expert, over the calls in order."""
    return [
        (rows[a:b], out[a:b])
        for rows, offsets, out in seen
        for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]


def one_pass(layer: MoE, x: Tensor, gradient: Tensor, routing: Routing | None) -> dict[str, Any]:
    """Output, gradients and what the experts saw; with a routing, its choices and weights."""
    x = x.requires_grad_()
    with seen_by_experts() as seen:
        y, _ = layer(x, routing=routing, recorded_weights=routing is not None)
    y.backward(gradient)
    result = {"y": y.detach(), "x": x.grad, "seen": by_expert(seen)}
    for name, parameter in layer.named_parameters():
        gradient = parameter.grad
        result[name] = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return result


def recorded(rank: int, count: int, dtype: torch.dtype) -> Routing:
    with torch.no_grad():
        return layer_of(dtype).router(tokens(rank, count, dtype))


def bits(world: World, mesh: DeviceMesh) -> dict[tuple[str, torch.dtype], Any]:
    count, results = LENGTHS[world.size][world.rank], {}
    for name, options in WAYS.items():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            layer = apply_expert_parallel(layer_of(dtype), mesh, options=options)
            inputs = tokens(world.rank, count, dtype), upstream(world.rank, count, dtype)
            results[name, dtype] = one_pass(layer, *inputs, recorded(world.rank, count, dtype))
    return results


def routed(world: World, mesh: DeviceMesh) -> dict[str, Any]:
    """With the router's own choices, of tokens that no other rank has as many of."""
    layer = apply_expert_parallel(layer_of(), mesh)
    count = LENGTHS[world.size][world.rank]
    result = one_pass(layer, tokens(world.rank, count), upstream(world.rank, count, torch.float64), None)
    for name in ("router.weight",):  # not the experts': left to whoever shares the rest of the model
        result[name] = world.sum(result[name])
    return result


class Foreign(nn.Module):
    """Somebody's model with a layer of ours in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(D, D, dtype=torch.float64)
        self.sparse = layer_of()
        self.last = nn.Linear(D, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.sparse(self.first(x).tanh())[0]).square().mean()


def beside_ddp(world: World, mesh: DeviceMesh) -> dict[str, Tensor]:
    model = apply_expert_parallel(Foreign(), mesh, gradient_divisor=world.size)
    experts = [name for name, _ in model.named_parameters() if ".experts." in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, experts)
    wrapped = DistributedDataParallel(model)  # a name: it reduces only while it lives
    wrapped(tokens(world.rank, 6)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}


def copies(mesh: DeviceMesh, world: World) -> dict[str, Any]:
    layer = apply_expert_parallel(layer_of(), mesh)
    twin, x = copy.deepcopy(layer), tokens(world.rank, 6)
    same = torch.equal(twin(x)[0], layer(x)[0])
    loaded = apply_expert_parallel(MoE(D, F, E, K, bias=True, dtype=torch.float64), mesh)
    loaded.load_state_dict(layer.state_dict())
    return {
        "same": same and torch.equal(loaded(x)[0], layer(x)[0]),
        "apart": twin.experts.w_in.to_local().data_ptr() != layer.experts.w_in.to_local().data_ptr(),
        "names": list(layer.state_dict()),
        "shapes": [tuple(value.shape) for value in layer.state_dict().values()],
    }


def indices_of(rank: int, load: str) -> Tensor:
    """(16, K) experts: each as often as any other, or all of them skewed to the low ones."""
    if load == "even":
        first = torch.arange(16) % E
        return torch.stack([first, (first + 1) % E], dim=1)
    first = (torch.rand(16, generator=torch.Generator().manual_seed(rank)).square() * (E - 1)).long()
    return torch.stack([first, first + 1], dim=1)


def traffic(world: World, mesh: DeviceMesh) -> dict[tuple[str, bool], int]:
    sent = {}
    layer = apply_expert_parallel(layer_of(), mesh)
    for load in ("even", "uneven"):
        for training in (False, True):
            with count_traffic() as counted:
                x = tokens(world.rank, 16).requires_grad_()
                y, _ = layer(x, routing=routing_of(indices_of(world.rank, load)), recorded_weights=True)
                if training:
                    y.sum().backward()
            sent[load, training] = counted.row_bytes
    return sent


def nan_on_one_rank(world: World) -> list[tuple[float, float, bool, bool]]:
    """Of a trainer's step whose activations are NaN on the last rank alone: loss, norm, skipped, weights kept."""
    results, meshes = [], MeshesOf(world)
    for model_name in ("dropless", "capacity", "gshard"):
        case = Case(world.size, model_name, world.size)
        model = build(case, meshes(case))
        trainer = trainer_of(case, world, model, lambda step, case=case: rank_batch(case, world.rank, step))
        if world.rank == world.size - 1:
            model.layers[0].attention.register_forward_hook(lambda module, inputs, out: out * float("nan"))
        before = [p.to_local().clone() for p in model.parameters()]
        step = trainer.step()
        kept = all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))
        results.append((step.loss, step.grad_norm, step.skipped, kept))
    return results


def stopped_by_nan(world: World) -> tuple[str, int]:
    """What a whole run says on this rank, and at which step, when activations on the last rank stay NaN."""
    case = Case(world.size, "dropless", world.size)
    model = build(case, MeshesOf(world)(case))
    trainer = trainer_of(case, world, model, lambda step: rank_batch(case, world.rank, step))
    trainer.config = replace(trainer.config, train=replace(trainer.config.train, max_skipped_steps=2))
    if world.rank == world.size - 1:
        model.layers[0].attention.register_forward_hook(lambda module, inputs, out: out * float("nan"))
    return error_of(trainer.run), trainer.state.step


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def errors(world: World, mesh: DeviceMesh) -> dict[str, str]:
    def shared(**parallel: int) -> Any:
        case = Case(world.size, "dense" if "dense" in parallel else "dropless")
        parallel.pop("dense", None)
        config = replace(run_config(case), parallel=ParallelConfig(**parallel))
        meshes = make_meshes(config.parallel, world.size, "cpu")
        return parallelize(build(case, None), meshes, config)

    def second() -> Any:
        layer = apply_expert_parallel(layer_of(), mesh)
        return torch.autograd.grad(layer(tokens(world.rank, 6))[0].sum(), list(layer.parameters()), create_graph=True)

    options = DispatchOptions(fixed_capacity=True)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    return {
        "second derivative": error_of(second),
        "few experts": error_of(lambda: apply_expert_parallel(MoE(D, F, world.size // 2, 1), mesh)),
        "indivisible": error_of(lambda: apply_expert_parallel(nn.Sequential(MoE(D, F, world.size + 2, 1)), mesh)),
        "dense": error_of(lambda: shared(dense=1, ep_size=2)),
        "mesh": error_of(lambda: shared(ep_size=3)),
        "fixed": error_of(lambda: apply_expert_parallel(layer_of(), mesh, options=options)),
        "limit": error_of(lambda: apply_expert_parallel(layer_of(), mesh, options=DispatchOptions(rows_limit=7))),
        "both": error_of(lambda: apply_expert_parallel(layer_of(), mesh, options=options._replace(rows_limit=64))),
        "twice": error_of(lambda: apply_expert_parallel(apply_expert_parallel(layer_of(), mesh), mesh)),
        "axes": error_of(lambda: apply_expert_parallel(layer_of(), grid)),
        "none": error_of(lambda: apply_expert_parallel(layer_of(), mesh, options=DispatchOptions(ranks_per_node=0))),
        "nodes": error_of(lambda: apply_expert_parallel(layer_of(), mesh, options=DispatchOptions(ranks_per_node=3))),
    }


def placement(world: World) -> float:
    """Which of two experts a rank of four holds, when each is filled with its own number."""
    layer = MoE(D, F, 2, 1)
    with torch.no_grad():
        layer.experts.w_in.copy_(torch.arange(2.0)[:, None, None].expand_as(layer.experts.w_in))
    apply_expert_parallel(layer, make_meshes(ParallelConfig(ep_size=2), world.size, "cpu").sparse["ep"])
    return float(layer.experts.w_in.to_local().mean())


def program(world: World) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("ep",))
    return {
        "bits": bits(world, mesh),
        "routed": routed(world, mesh),
        "ddp": beside_ddp(world, mesh),
        "copies": copies(mesh, world),
        "traffic": traffic(world, mesh),
        "nan": nan_on_one_rank(world),
        "stopped": stopped_by_nan(world),
        "errors": errors(world, mesh) if world.size == 4 else {},
        "placement": placement(world),
    }


@pytest.fixture(scope="module", params=[2, 4], ids=["2ranks", "4ranks"])
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(program, request.param)


def whole(ranks: int, dtype: torch.dtype, *, replay: bool) -> dict[str, Any]:
    """One process with the tokens of all ranks, in rank order."""
    lengths = list(enumerate(LENGTHS[ranks]))
    x = torch.cat([tokens(rank, count, dtype) for rank, count in lengths])
    gradient = torch.cat([upstream(rank, count, dtype) for rank, count in lengths])
    if not replay:
        return one_pass(layer_of(dtype), x, gradient, None)
    parts = [recorded(rank, count, dtype) for rank, count in lengths]
    fields = [torch.cat(f) if f[0] is not None and i < 6 else None for i, f in enumerate(zip(*parts, strict=True))]
    counts = torch.stack([part.tokens_per_expert for part in parts]).sum(dim=0)
    return one_pass(layer_of(dtype), x, gradient, Routing(*fields[:-1], counts))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the ranks: the bits of a product depend on the number of threads that share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_experts_see_and_give_the_bits_of_one_process(
    results: list[dict[str, Any]], way: str, dtype: torch.dtype
) -> None:
    """Rows in and out of each expert, tokens in and out, and every expert's gradients, for the same routing."""
    ranks = len(results)
    wanted, num_local = whole(ranks, dtype, replay=True), E // ranks
    first = 0
    for rank, result in enumerate(results):
        own, count = result["bits"][way, dtype], LENGTHS[ranks][rank]
        experts = slice(rank * num_local, (rank + 1) * num_local)
        for (rows, out), (wanted_rows, wanted_out) in zip(own["seen"], wanted["seen"][experts], strict=True):
            assert torch.equal(rows, wanted_rows)
            assert torch.equal(out, wanted_out)
        for name in ("y", "x"):
            assert torch.equal(own[name], wanted[name][first : first + count]), name
        for name in ("w_in", "w_out", "b_in", "b_out"):
            assert torch.equal(own[f"experts.{name}"], wanted[f"experts.{name}"][experts]), name
        first += count
    assert sum(rows.shape[0] > 0 for rows, _ in wanted["seen"]) >= E - 2  # hardly any is idle


def test_a_rank_without_tokens_serves_its_experts(results: list[dict[str, Any]]) -> None:
    """Rank 1 brings none: outputs and all gradients are those of one process, the router's among them."""
    ranks = len(results)
    wanted, first = whole(ranks, torch.float64, replay=False), 0
    for rank, count in enumerate(LENGTHS[ranks]):
        own = results[rank]["routed"]
        if count:
            for name in ("y", "x"):
                assert relative_error(own[name], wanted[name][first : first + count]) <= ROUNDING, name
        assert relative_error(own["router.weight"], wanted["router.weight"]) <= ROUNDING
        experts = slice(rank * E // ranks, (rank + 1) * E // ranks)
        for name in ("w_in", "w_out", "b_in", "b_out"):
            assert relative_error(own[f"experts.{name}"], wanted[f"experts.{name}"][experts]) <= ROUNDING, name
        first += count


def test_beside_ddp_with_a_gradient_divisor(results: list[dict[str, Any]]) -> None:
    ranks, model = len(results), Foreign()
    model(torch.cat([tokens(rank, 6) for rank in range(ranks)])).backward()
    for result in results:
        assert list(result["ddp"]) == [name for name, _ in model.named_parameters()]
        for name, parameter in model.named_parameters():
            assert relative_error(result["ddp"][name], parameter.grad) <= ROUNDING, name


def test_names_and_shapes_stay_and_copies_are_copies(results: list[dict[str, Any]]) -> None:
    state = layer_of().state_dict()
    for result in results:
        assert result["copies"]["same"]
        assert result["copies"]["apart"]
        assert result["copies"]["names"] == list(state)
        assert result["copies"]["shapes"] == [tuple(value.shape) for value in state.values()]


@pytest.mark.parametrize("training", [False, True])
def test_bytes_sent_are_those_of_the_formula_at_even_load(results: list[dict[str, Any]], training: bool) -> None:
    wanted = all_to_all_bytes(16, D, K, num_ranks=len(results), element_bytes=8, training=training)
    assert [result["traffic"]["even", training] for result in results] == [wanted] * len(results)


@pytest.mark.parametrize("training", [False, True])
def test_bytes_sent_at_uneven_load_are_those_of_the_rows(results: list[dict[str, Any]], training: bool) -> None:
    """A rank's own rows leave for others, and those of others go home from it; their gradients too."""
    ranks = len(results)
    goes_to = [indices_of(rank, "uneven") // (E // ranks) for rank in range(ranks)]  # (T, K) ranks
    sent = []
    for rank, result in enumerate(results):
        leaving = int((goes_to[rank] != rank).sum())
        visiting = sum(int((goes_to[other] == rank).sum()) for other in range(ranks) if other != rank)
        wanted = (2 if training else 1) * (leaving + visiting) * D * 8
        assert result["traffic"]["uneven", training] == wanted
        sent.append(wanted)
    assert len(set(sent)) > 1 or ranks == 2  # what two ranks exchange is the same both ways


def test_nan_on_one_rank_stops_no_rank_and_skips_the_update_on_all(results: list[dict[str, Any]]) -> None:
    for result in results:
        for loss, norm, skipped, kept in result["nan"]:
            assert loss != loss
            assert norm != norm
            assert skipped
            assert kept


def test_nan_that_stays_on_one_rank_stops_the_run_on_all_at_the_same_step(results: list[dict[str, Any]]) -> None:
    for result in results:
        message, step = result["stopped"]
        assert message.startswith("3 updates in a row were skipped")
        assert step == 3


def test_rank_r_holds_expert_r_modulo_e_when_there_are_more_ranks_than_experts(results: list[dict[str, Any]]) -> None:
    """What the error for ep_size > num_experts recommends is the paper's placement (Artetxe et al. 2021)."""
    assert [result["placement"] for result in results] == [rank % 2 for rank in range(len(results))]


MESSAGES = {
    "few experts": "MoE: parallel.ep_size (4) must be at most num_experts (2). For one expert on each of 4 ranks, "
    "copies included, set parallel.ep_size=2: the other ranks hold copies, expert e on the ranks with rank % 2 == e",
    "indivisible": "0: parallel.ep_size (4) must divide num_experts (6); it may be one of 1, 2, 3, 6",
    "dense": "parallel.ep_size (2) spreads experts, and this model is dense; add +moe=",
    "mesh": "parallel.dp_replicate * parallel.ep_size (1 * 3) must divide the number of processes (4); start another "
    "number of them or change an axis",
    "fixed": "fixed_capacity sends a fixed number of rows to every expert, and this router drops nothing",
    "limit": "rows_limit (7) must be at least ranks * min(top_k, experts of a rank) (4 * 2)",
    "second derivative": "create_graph=True differentiates the backward pass, and that of experts on several ranks has",
    "both": "rows_limit (64) must be None with fixed_capacity=True: the capacity of all tokens",
    "twice": "MoE: the experts' weights are DTensors already: call apply_expert_parallel once, before fully_shard",
    "axes": "the mesh must have one axis, not 2 ('dp', 'ep'): give one, as mesh['ep']",
    "none": "ranks_per_node (0) must be at least 1",
    "nodes": "ranks_per_node (3) must divide the ranks that share the experts (4)",
}


@pytest.mark.parametrize("what", MESSAGES)
def test_errors_say_what_to_change_on_every_rank(results: list[dict[str, Any]], what: str) -> None:
    for result in results:
        assert not result["errors"] or MESSAGES[what] in result["errors"][what]
