"""fairscale's own MOELayer is the oracle: output, auxiliary loss and every gradient, on one rank and on two."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe.distributed.world import end_process
from moe.interop.fairscale import from_fairscale, to_fairscale
from moe.layers import GShardRouter, MoE, TopKRouter, gshard_load_balance_loss
from moe.layers.noise import gumbel

top2gate = pytest.importorskip("fairscale.nn.moe.top2gate", reason="fairscale is the extra 'fairscale'")
from fairscale.nn.moe import MOELayer  # noqa: E402 - after the skip

D, FF, E = 6, 10, 4
SHAPE = (4, 6, D)  # 24 tokens, divisible by E
TOLERANCE = 3e-6  # of the largest entry, float32
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class NamedExpert(nn.Module):
    def __init__(self, act: str, bias: bool = True) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, FF, bias=bias), nn.Linear(FF, D, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(getattr(F, self.act)(self.fc1(x)))


class ResidualExpert(NamedExpert):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class TanhGeluExpert(NamedExpert):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A real gloo group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def expert(act: str = "gelu", bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, FF, bias=bias), ACTIVATIONS[act](), nn.Linear(FF, D, bias=bias))


def their_layer(experts: list[nn.Module]) -> MOELayer:
    layer = MOELayer(top2gate.Top2Gate(D, E), nn.ModuleList(experts))
    with torch.no_grad():
        layer.gate.wg.weight.mul_(4)  # so that weights are far from 1/2 and loads uneven
    return layer


def same_noise(monkeypatch: pytest.MonkeyPatch, seed: int = 7) -> torch.Generator:
    """fairscale's gate draws from one generator; the equally seeded one that is returned is for ours."""
    theirs = torch.Generator().manual_seed(seed)
    monkeypatch.setattr(top2gate, "gumbel_rsample", lambda shape, device: gumbel(shape, torch.zeros(1), theirs))
    return torch.Generator().manual_seed(seed)


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) + 0.3


def assert_near(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.detach().abs().max())
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * scale)


def their_gradients(layer: MOELayer) -> dict[str, Tensor]:
    """Under our names, of this rank's experts."""
    grads = {"router.weight": layer.gate.wg.weight.grad}
    linears = [[m for m in e.modules() if isinstance(m, nn.Linear)] for e in layer.experts]
    for name, i, attribute in (
        ("w_in", 0, "weight"),
        ("w_out", 1, "weight"),
        ("b_in", 0, "bias"),
        ("b_out", 1, "bias"),
    ):
        if getattr(linears[0][i], attribute) is not None:
            grads[f"experts.{name}"] = torch.stack([getattr(pair[i], attribute).grad for pair in linears])
    return grads


EXPERTS = {
    "sequential": lambda: expert("gelu"),
    "without_bias": lambda: expert("silu", bias=False),
    "relu": lambda: expert("relu"),
    "named": lambda: NamedExpert("gelu"),
    "tanh": lambda: TanhGeluExpert("gelu"),
    "named_silu": lambda: NamedExpert("silu", bias=False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", EXPERTS)
def test_output_loss_and_every_gradient(
    monkeypatch: pytest.MonkeyPatch, group: None, kind: str, training: bool
) -> None:
    theirs = their_layer([EXPERTS[kind]() for _ in range(E)]).train(training)
    ours = from_fairscale(theirs, eval_as_original=True)
    assert ours.training is training
    assert ours.router.rules == "fairscale"
    generator = same_noise(monkeypatch)
    x, their_x = inputs().requires_grad_(), inputs().requires_grad_()
    expected = theirs(their_x)
    y, routing = ours(x, generator=generator)
    balance = gshard_load_balance_loss(routing, times_experts_squared=False)
    assert not routing.kept.all()  # drops are part of the comparison
    assert_near(y, expected)
    assert_near(balance, theirs.l_aux)
    upstream = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    ((y * upstream).sum() + 2 * balance).backward()
    ((expected * upstream).sum() + 2 * theirs.l_aux).backward()
    assert_near(x.grad, their_x.grad)
    grads = their_gradients(theirs)
    assert set(grads) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_near(parameter.grad, grads[name])


def test_evaluation_is_ours_unless_told(group: None) -> None:
    ours = from_fairscale(their_layer([expert() for _ in range(E)]).eval())
    y, routing = ours(inputs()[:1, :5])  # 5 tokens: fairscale refuses what E does not divide
    assert routing.kept.all()
    assert torch.equal(y, ours(inputs()[:1, :5])[0])


def test_probing_an_expert_draws_nothing(group: None) -> None:
    theirs = their_layer([NamedExpert("silu") for _ in range(E)])
    state = torch.get_rng_state()
    assert from_fairscale(theirs).experts.activation == "silu"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise(group: None, dtype: torch.dtype) -> None:
    theirs = their_layer([expert("silu") for _ in range(E)]).to(dtype)
    state = torch.get_rng_state()
    ours = from_fairscale(theirs)
    again = to_fairscale(ours)
    assert torch.equal(torch.get_rng_state(), state)  # converting draws nothing
    assert list(again.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert again.state_dict()[name].dtype == dtype
        assert torch.equal(again.state_dict()[name], tensor), name
    assert [type(m) for m in again.experts[0]] == [type(m) for m in theirs.experts[0]]
    assert all(p.expert for p in again.experts.parameters())  # the mark by which fairscale knows them
    back = from_fairscale(again)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters(), strict=True))


def test_the_copy_is_a_copy(group: None) -> None:
    theirs = their_layer([expert() for _ in range(E)])
    ours = from_fairscale(theirs)
    before = [p.clone() for p in ours.parameters()]
    again = to_fairscale(ours)
    with torch.no_grad():
        for p in [*theirs.parameters(), *again.parameters()]:
            p.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))


def layer_of(**options: object) -> MoE:
    router = GShardRouter(D, E, rules="fairscale", **options.pop("router", {}))
    return MoE(D, FF, E, router=router, **options)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: MoE(D, FF, E), "GShardRouter"),
        (lambda: MoE(D, FF, E, router=GShardRouter(D, E)), "rules=fairseq"),
        (lambda: MoE(D, FF, E, router=TopKRouter(D, E)), "TopKRouter"),
        (lambda: layer_of(router={"second_policy": "all"}), r"second_policy \('all'\)"),
        (lambda: layer_of(router={"batch_prioritized": True}), "batch_prioritized"),
        (lambda: layer_of(router={"normalize_before_dropping": True}), "normalize_before_dropping"),
        (lambda: layer_of(router={"eval_capacity_fraction": 0.5}), "eval_capacity_fraction"),
        (lambda: layer_of(gated=True), "gated"),
        (lambda: layer_of(dropout=0.1), r"dropout \(0.1\)"),
        (lambda: layer_of(shared_d_ff=3), "shared"),
    ],
)
def test_what_fairscale_cannot_express_is_refused(group: None, made: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_fairscale(made())


def test_a_process_group_is_asked_for() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        to_fairscale(layer_of())


def zeros(module: NamedExpert) -> NamedExpert:
    nn.init.zeros_(module.fc2.weight)
    return module


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: nn.Linear(D, D), r"expert 1 \(Linear\) must be Sequential"),
        (lambda: nn.Sequential(*expert(), nn.Dropout(0.1)), "not of 4 modules"),
        (lambda: nn.Sequential(nn.Linear(D, FF), nn.Tanh(), nn.Linear(FF, D)), r"activation \(Tanh\)"),
        (lambda: nn.Sequential(nn.Linear(D, FF), nn.GELU("tanh"), nn.Linear(FF, D)), "must have the same activation"),
        (lambda: nn.Sequential(nn.Linear(D, FF, bias=False), nn.GELU(), nn.Linear(FF, D)), "both Linears or in none"),
        (lambda: nn.Sequential(nn.Linear(D, FF), nn.GELU(), nn.Linear(FF, D + 1)), "must map D to F"),
        (lambda: nn.Sequential(nn.Linear(D, FF + 1), nn.GELU(), nn.Linear(FF + 1, D)), "same shapes"),
        (lambda: nn.Sequential(nn.Linear(D, FF), nn.GELU(), nn.Identity()), "not Identity"),
        (lambda: expert("relu"), "same activation: expert 0 has gelu, expert 1 relu"),
        (lambda: expert(bias=False), "same shapes"),
        (lambda: ResidualExpert("gelu"), "something else"),
        (lambda: zeros(NamedExpert("gelu", bias=False)), "weights zero"),
    ],
)
def test_other_experts_are_refused(group: None, made: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_fairscale(their_layer([expert(), made(), expert(), expert()]))


def test_other_layers_and_gates_are_refused(group: None) -> None:
    class OtherGate(top2gate.Top2Gate):
        pass

    experts = [expert() for _ in range(E)]
    with pytest.raises(ValueError, match="not Linear"):
        from_fairscale(nn.Linear(D, D))
    with pytest.raises(ValueError, match="OtherGate"):
        from_fairscale(MOELayer(OtherGate(D, E), nn.ModuleList(experts)))
    with pytest.raises(ValueError, match=r"\(8, 6\) must be \(4, 6\)"):
        from_fairscale(MOELayer(top2gate.Top2Gate(D, 8), nn.ModuleList(experts)))


def rank_program(rank: int, folder: str) -> None:
    """One of two ranks: fairscale's layer over both, ours alone on the rank's own tokens."""
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)  # the same gate on both ranks, as data parallelism keeps it
    gate = top2gate.Top2Gate(D, E)
    experts = [expert("gelu") for _ in range(E)]
    theirs = MOELayer(gate, nn.ModuleList(experts[rank * 2 : rank * 2 + 2]))
    with torch.no_grad():
        gate.wg.weight.mul_(4)
    ours = from_fairscale(theirs)
    with pytest.MonkeyPatch.context() as patch:
        generator = same_noise(patch, seed=rank)
        x, their_x = inputs(rank).requires_grad_(), inputs(rank).requires_grad_()
        expected = theirs(their_x)
    y, routing = ours(x, generator=generator)
    balance = gshard_load_balance_loss(routing, times_experts_squared=False)
    (y.square().sum() + balance).backward()
    (expected.square().sum() + theirs.l_aux).backward()
    again = to_fairscale(ours)
    odd = MoE(D, FF, 3, router=GShardRouter(D, 3, rules="fairscale"))
    with pytest.raises(ValueError, match=r"num_experts \(3\) must be divisible by .* ranks \(2\)"):
        to_fairscale(odd)
    only_rank_0 = dist.new_group([0])
    if rank == 0:
        assert len(to_fairscale(odd, only_rank_0).experts) == 3
    else:
        with pytest.raises(ValueError, match=r"this process \(rank 1\) must belong to the group"):
            to_fairscale(odd, only_rank_0)
    result = {
        "output": (y, expected),
        "loss": (balance, theirs.l_aux),
        "of_x": (x.grad, their_x.grad),
        "ours": {name: p.grad for name, p in ours.named_parameters()},
        "theirs": their_gradients(theirs),
        "drops": int((~routing.kept).sum()),
        "round_trip": all(torch.equal(again.state_dict()[k], v) for k, v in theirs.state_dict().items()),
        "in_place": torch.equal(ours.experts.w_in[2 * rank], experts[2 * rank][0].weight),
    }
    torch.save(result, f"{folder}/rank{rank}.pt")
    end_process()


def test_two_ranks_with_half_the_experts_each(tmp_path: Path) -> None:
    """Compared: of each rank its output, l_aux and gradients of x and gate, all from its own tokens; of each expert
    the gradient on the rank that owns it, which holds both ranks' tokens, with the sum of ours over the two ranks."""
    torch.multiprocessing.spawn(rank_program, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for result in ranks:
        for name in ("output", "loss", "of_x"):
            assert_near(*result[name])
        assert_near(result["ours"]["router.weight"], result["theirs"]["router.weight"])
        assert result["drops"] > 0
        assert result["round_trip"]
        assert result["in_place"]
    assert not torch.equal(ranks[0]["output"][0], ranks[1]["output"][0])
    for name in ("experts.w_in", "experts.w_out", "experts.b_in", "experts.b_out"):
        summed = ranks[0]["ours"][name] + ranks[1]["ours"][name]
        assert_near(summed, torch.cat([result["theirs"][name] for result in ranks]))
